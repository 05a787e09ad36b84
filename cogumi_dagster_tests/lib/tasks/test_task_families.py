"""Every family: distinct, deterministic, solved by its own solution, and proof against any text."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.sandbox import sandbox_available
from cogumi_dagster.lib.tasks import FAMILIES, families_of, get_family, judged, verify
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Task

EXECUTED = ("code_function", "code_expression", "code_definition")
CASES = [(name, difficulty) for name in FAMILIES for difficulty in DIFFICULTIES]
NASTY = (
    "", " ", "\n\n", "Answer:", "Answer: ", "{", "{" * 3000, "[" * 3000, "Answer: " + "(" * 3000, "\x00", "\ud800",
    "Answer: 1e999999", "Answer: \u00bd", "```python\n```", "```", "YESNO", "9" * 20_000, '{"name": null}',
    "Answer: nan",
    '{"name": 1, "arguments": []}', "Answer: ['a", "1/0", "Answer: 1/0",
)  # fmt: skip


def _number(name: str) -> int:
    return 4 if name in EXECUTED else 30


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_own_solutions_pass(name: str, difficulty: Difficulty) -> None:
    if name in EXECUTED and not sandbox_available()[0]:
        pytest.skip(sandbox_available()[1])
    tasks = get_family(name).generate(_number(name), 7, difficulty)
    assert len(tasks) >= min(20, _number(name)), "the family is (nearly) empty"
    for task in tasks:
        if task.solution is not None:
            verdict = verify(task, task.solution)
            assert verdict.passed is True and verdict.score == 1.0, (task.prompt, task.solution, verdict)


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_tasks_are_distinct_deterministic_and_plain(name: str, difficulty: Difficulty) -> None:
    family = get_family(name)
    tasks = family.generate(20, 3, difficulty)
    assert tasks == family.generate(20, 3, difficulty)
    assert len({task.id for task in tasks}) == len(tasks)
    for task in tasks:
        assert (task.family, task.domain, task.difficulty) == (name, family.domain, difficulty)
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
        assert len(task.prompt) < 1100
        assert task.licence in ("Apache-2.0", "MIT", "BSD-3-Clause")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("conversation_guided", "creative_guided")])
def test_another_seed_gives_other_tasks(name: str) -> None:
    family = get_family(name)
    one, other = ({task.id for task in family.generate(10, seed, "medium")} for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_raises_or_passes_by_chance(name: str) -> None:
    task = get_family(name).generate(1, 5, "medium")[0]
    texts = NASTY if name not in EXECUTED else NASTY[:8]
    if task.solution is None:
        texts = texts[:3]  # constraints such as "do not use the word" hold for almost any text
    for text in texts:
        assert verify(task, text).passed is not True, text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*EXECUTED, "scheduling", "code_output")])
def test_the_solution_of_another_task_fails(name: str) -> None:
    tasks = [task for task in get_family(name).generate(12, 5, "hard") if task.solution is not None]
    for task, other in pairwise(tasks):
        if task.answer != other.answer:
            assert other.solution is not None
            assert verify(task, other.solution).passed is False


def test_a_verdict_survives_json() -> None:
    for name in families_of("math") + families_of("reasoning"):
        task = get_family(name).generate(1, 1, "easy")[0]
        copy = Task.from_json(json.loads(json.dumps(task.to_json())))
        assert copy.solution is not None
        assert verify(copy, copy.solution).passed is True


def test_an_answer_without_its_steps_is_enough() -> None:
    for name in (*families_of("math"), *families_of("science"), "code_value", "code_output", "letter_counting"):
        task = get_family(name).generate(1, 1, "easy")[0]
        assert verify(task, f"Answer: {task.answer}").passed is True, name


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(CogumiError, match="chain_sum"):
        get_family("chain_sums")
    with pytest.raises(CogumiError, match="math"):
        families_of("maths")


def test_rows_of_files_have_no_verifier() -> None:
    assert verify(Task("math", "file", "easy", "p"), "anything").passed is None


def test_every_gate_of_a_circuit_is_worked_out_and_no_parity_is_seen_at_a_glance() -> None:
    truth: dict[str, Callable[[Sequence[int]], object]] = {
        "and": all, "or": any, "nand": lambda b: not all(b), "nor": lambda b: not any(b), "xor": lambda b: sum(b) % 2,
    }  # fmt: skip
    glances = set()
    for task in get_family("circuit_logic").generate(60, 0, "hard"):
        *lines, last = str(task.solution).splitlines()
        for line in lines:
            *sides, value = line.split(" = ")
            worked = [(side.split("(")[0], [int(bit) for bit in re.findall(r"\b[01]\b", side)]) for side in sides]
            assert all(int(truth[gate](bits)) == int(value) for gate, bits in worked if bits), line
            glances.add((worked[-1][0], len(worked[-1][1])))
        assert last == f"Answer: {task.answer}" and lines[-1].endswith(f"= {task.answer}")
    assert {size for gate, size in glances if gate == "xor"} == {2} and max(size for _, size in glances) >= 4


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_sum_is_worked_out_column_by_column(difficulty: Difficulty) -> None:
    for task in get_family("chain_sum").generate(60, 0, difficulty):
        expression = task.prompt.splitlines()[0].removeprefix("Calculate ").removesuffix(".")
        totals = {"plus": 0, "minus": 0}
        for line in str(task.solution).splitlines()[:-1]:
            name, *numbers = line.split()
            if name in totals:
                totals[name] = sum(map(int, numbers))
            elif ":" in line:
                whole, columns = line.split(": ")
                digits = ""
                for column in columns.split(", "):
                    equation, digits = column.split()
                    sides, value = equation.split("=")
                    assert eval(sides) == int(value) and digits.startswith((value, value[-1]))
                    assert len(re.findall(r"\d", sides)) <= 3, "one digit of each number and the one that is carried"
                assert sum(int(number) for number in whole.split("+")) == int(digits)
            elif "nines" in line:
                upper, lower, nines = re.fullmatch(r"(\d+) - (\d+), nines (\d+)", line).groups()  # type: ignore[union-attr]
                assert len(upper) == len(lower) and {int(a) + int(b) for a, b in zip(lower, nines, strict=True)} == {9}
            else:
                assert (name == "over") == (totals["plus"] > totals["minus"])
        assert totals["plus"] - totals["minus"] == eval(expression) == int(str(task.answer))


def test_requests_for_one_expression_are_of_one_split() -> None:
    families = [get_family("code_expression"), get_family("code_definition")]
    tasks = [task for family in families for seed in range(4) for task in family.generate(60, seed, "medium")]
    splits: dict[str | None, set[str]] = {}
    for task in tasks:
        splits.setdefault(task.answer, set()).add(task.split)
        assert Task.from_json(json.loads(json.dumps(task.to_json()))).split == task.split
    assert len(splits) < len(tasks) and all(len(one) == 1 for one in splits.values())


@pytest.mark.skipif(not sandbox_available()[0], reason="no sandbox")
def test_no_function_is_answered_by_a_constant() -> None:
    for difficulty in DIFFICULTIES:
        for task in get_family("code_function").generate(50, 0, difficulty):
            shown = task.payload["examples"][0]["value"]
            constant = f"```python\ndef {task.payload['name']}(*args, **more):\n    return {shown}\n```"
            assert len({one["value"] for one in task.payload["examples"]}) > 1
            assert verify(task, constant).passed is False, task.source


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Answer: 2^3 x 3", True), ("Answer: 2 x 2 x 2 x 3 = 24", True), ("24 = 2**3 x 3", True),
        ("Answer: 2 x 3^3", False), ("Answer: 24", False), ("Answer: 2^2 x 6", False),
    ],
)  # fmt: skip
def test_powers_are_read_as_factors(said: str, right: bool) -> None:
    task = replace(
        get_family("prime_factorization").generate(1, 0, "easy")[0],
        payload={"question": "", "answer": "2 \u00d7 2 \u00d7 2 \u00d7 3", "metadata": {}},
    )
    assert verify(task, said).passed is right


def test_a_sentence_that_says_the_answer_is_read() -> None:
    task = get_family("course_schedule").generate(1, 0, "easy")[0]
    assert verify(task, f"They wait for each other.\nSo the answer is {task.answer}.").passed is True
    assert verify(task, f"Course 3 does not wait for any, so the answer is {task.answer}.").passed is True
    assert verify(task, f"I think the answer is {task.answer}.").passed is True
    assert verify(task, f"I don't think that the answer is {task.answer}.").passed is False


@pytest.mark.parametrize(
    "form",
    [
        "Answer: {} (see above)",
        "Answer: \\boxed{{{}}}",
        "Answer: {}, since nothing waits.",
        "Answer: {} (since G3 is on)",
        "So it is {}.",
    ],
)
@pytest.mark.parametrize("name", ["circuit_logic", "course_schedule"])
def test_a_right_answer_in_another_form_is_right(name: str, form: str) -> None:
    tasks = get_family(name).generate(12, 0, "easy")
    for task in tasks:
        others = {other.answer for other in tasks} - {task.answer}
        assert verify(task, form.format(task.answer)).passed is True
        assert not any(verify(task, form.format(other)).passed for other in others)
    assert len(others) == 1


@pytest.mark.parametrize(
    "said",
    [
        "1/0",
        "Answer: 0 or 1",
        "Answer: 0.1",
        "Answer: 10",
        "and(0, 1) = 0",
        "Answer: -1",
        "Answer: not 1",
        "Answer: anything but 1",
    ],
)
def test_two_bits_or_a_denied_one_are_no_answer(said: str) -> None:
    assert not any(verify(task, said).passed for task in get_family("circuit_logic").generate(12, 0, "easy"))


def test_an_answer_that_was_cut_off_is_wrong() -> None:
    task = get_family("scheduling").generate(1, 0, "easy")[0]
    said = SimpleNamespace(text=str(task.solution), finish_reason="length")
    assert verify(task, said.text).passed is True and judged(task, said).passed is False
    said.finish_reason = "stop"
    assert judged(task, said).passed is True


@pytest.mark.parametrize(
    "name", ["products", "gcd", "leg_counting", "fraction_simplification", "simple_equations", "weekday_offset"]
)
def test_every_step_of_a_calculation_holds(name: str) -> None:
    seen = 0
    for difficulty in DIFFICULTIES:
        for task in get_family(name).generate(60, 0, difficulty):
            for step, value in re.findall(r"(?<![\w*+/-])(\d+(?: ?[-+*/] ?\d+)+) ?= ?(-?\d+)", str(task.solution)):
                assert eval(step) == int(value), task.solution
                seen += 1
    assert seen > 180


def test_a_product_is_added_up_to_its_answer_and_letters_are_numbered_as_they_come() -> None:
    for difficulty in DIFFICULTIES:
        for task in get_family("products").generate(60, 0, difficulty):
            *_, last = re.sub(r"\nAnswer.*", "", str(task.solution)).split()
            assert last == task.answer
        for task in get_family("letter_counting").generate(60, 0, difficulty):
            target, text = re.findall(r'"(.+?)"', task.prompt)[:2]
            signs = [sign for word in text.lower().split() for sign in word]
            written = re.split(r",? ", str(task.solution).splitlines()[0])
            hits = [sign[len(target) :] for sign in written if sign.startswith(target) and sign != target]
            assert [sign if sign[0] != target else target for sign in written] == signs
            assert hits == [str(number) for number in range(1, int(str(task.answer)) + 1)]
