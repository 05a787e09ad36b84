"""HumanEval: all problems kept, the reference passes, and the benchmark's assertions decide on plain values."""

import pytest

from cogumi_dagster.lib.evaluation import humaneval
from cogumi_dagster.lib.evaluation.humaneval import (
    HumanEval,
    Problem,
    check,
    judge,
    load_problems,
    program_for,
    prompt_for,
)
from cogumi_dagster.lib.sandbox import Opaque, Outcome, sandbox_available

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0], reason=sandbox_available()[1])


@pytest.fixture(scope="module")
def benchmark() -> HumanEval:
    return load_problems()


def _reference_values(problem: Problem) -> list[Outcome]:
    space: dict[str, object] = {}
    exec(problem.prompt + problem.reference, space)  # the benchmark's own code
    return [Outcome(True, eval(call, space)) for call in problem.calls]


def test_no_problem_is_left_out(benchmark: HumanEval) -> None:
    assert (len(benchmark.problems), dict(benchmark.left_out)) == (164, {})


def test_values_of_the_reference_pass_every_test(benchmark: HumanEval) -> None:
    failed = [one.id for one in benchmark.problems if judge(one, _reference_values(one)).passed is not True]
    assert failed == []


def test_values_of_another_problem_pass_none(benchmark: HumanEval) -> None:
    passed = [one.id for one in benchmark.problems if judge(one, [Outcome(True, "?")] * len(one.calls)).passed]
    assert passed == []


def test_one_wrong_value_fails(benchmark: HumanEval) -> None:
    for problem in benchmark.problems[:40]:
        values = _reference_values(problem)
        values[-1] = Outcome(True, ["wrong"])
        assert judge(problem, values).passed is False, problem.id


def test_objects_and_missing_values_fail(benchmark: HumanEval) -> None:
    truthy = next(one for one in benchmark.problems if one.id == "HumanEval/52")
    lie = judge(truthy, [Outcome(True, Opaque("object", "Liar"))] * len(truthy.calls))
    assert lie.passed is False and "of type Liar" in lie.reason
    assert "no value" in judge(truthy, [Outcome(False, None, "boom")] * len(truthy.calls)).reason


def test_random_inputs_are_the_same_in_both_runs(benchmark: HumanEval) -> None:
    adding = next(one for one in benchmark.problems if one.id == "HumanEval/53")
    again = next(one for one in load_problems().problems if one.id == "HumanEval/53")
    assert len(adding.calls) > 100 and adding.calls == again.calls


def test_no_expected_value_enters_the_sandbox(benchmark: HumanEval) -> None:
    problem = next(one for one in benchmark.problems if one.id == "HumanEval/0")
    sent = program_for(problem, "```python\ndef has_close_elements(a, b): return True\n```") + "".join(problem.calls)
    assert "assert" not in sent and problem.reference.strip() not in sent


def test_limit_takes_a_fixed_mix(benchmark: HumanEval) -> None:
    few = load_problems(8).problems
    assert few == benchmark.problems[:8]
    assert [one.id for one in few] != [f"HumanEval/{n}" for n in range(8)]


def test_prompt_shows_the_problem_and_not_the_test(benchmark: HumanEval) -> None:
    problem = benchmark.problems[0]
    assert problem.prompt.strip() in prompt_for(problem) and "assert" not in prompt_for(problem)


@needs_sandbox
def test_responses_in_every_form(benchmark: HumanEval) -> None:
    problem = next(one for one in benchmark.problems if one.id == "HumanEval/38")  # needs a helper of its prompt
    forms = [
        f"Here:\n```python\n{problem.prompt}{problem.reference}```",
        problem.reference,
        f"```python\n{problem.reference}```",
    ]
    assert [check(problem, form).passed for form in forms] == [True, True, True]


@needs_sandbox
def test_lies_and_crashes_fail(benchmark: HumanEval) -> None:
    problem = benchmark.problems[0]
    liar = f"class E:\n    def __eq__(self, o): return True\n\ndef {problem.entry_point}(*a):\n    return E()"
    assert check(problem, f"```python\n{liar}\n```").passed is False
    assert check(problem, "```python\nimport os; os._exit(0)\n```").passed is False
    assert check(problem, "I do not know.").passed is False


def test_without_a_sandbox_nothing_is_run(benchmark: HumanEval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "sandbox_available", lambda: (False, "no bubblewrap"))
    verdict = check(benchmark.problems[0], benchmark.problems[0].reference)
    assert verdict.passed is None and verdict.reason == "not run: no bubblewrap"
