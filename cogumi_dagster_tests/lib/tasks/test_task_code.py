"""Code tasks: what is taken as code, literal judgement, and verdicts with and without a sandbox."""

import pytest

from cogumi_dagster.lib.sandbox import sandbox_available
from cogumi_dagster.lib.tasks import code
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Task
from cogumi_dagster.lib.tasks.library_functions import library_functions

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0], reason=sandbox_available()[1])
TAKE = Task(
    "code", "code_function", "easy", "p",
    payload={"name": "take", "examples": [{"call": "take(2, 'abc')", "value": "['a', 'b']"},
                                          {"call": "take(9, range(2))", "value": "[0, 1]"}]},
)  # fmt: skip
EVEN = Task(
    "code", "code_expression", "easy", "p",
    payload={"variable": "xs", "examples": [{"input": "[1, 2, 4]", "value": "[2, 4]"},
                                            {"input": "[3]", "value": "[]"}]},
)  # fmt: skip


def test_extract_code_takes_the_block_that_defines_the_name() -> None:
    text = "First:\n```python\nx = 1\n```\nthen\n```\ndef f():\n    return 1\n```"
    assert code.extract_code(text, "f") == "def f():\n    return 1\n"
    assert code.extract_code("def f(): pass", "f") == "def f(): pass"
    assert code.extract_code("```python\ndef f(): pass", "f") == "def f(): pass"


@needs_sandbox
def test_functions_run_on_all_examples() -> None:
    good = "```python\nfrom itertools import islice\ndef take(n, it):\n    return list(islice(it, n))\n```"
    assert code.CODE_FUNCTION.verify(TAKE, good).passed is True
    half = code.CODE_FUNCTION.verify(TAKE, "def take(n, it): return ['a', 'b']")
    assert (half.passed, half.score) == (False, 0.5)
    assert code.CODE_FUNCTION.verify(TAKE, "def take(n, it): return tuple(it)[:n]").passed is False


@needs_sandbox
@pytest.mark.parametrize(
    ("response", "passed"),
    [
        ("```python\n[x for x in xs if x % 2 == 0]\n```", True),
        ("`[x for x in xs if not x % 2]`", True),
        ("result = list(filter(lambda x: x % 2 == 0, xs))", True),
        ("```python\n[2, 4]\n```", False),
        ("```python\nxs)) or ((lambda xs: [2, 4])(xs\n```", False),
        ("```python\nfilter(lambda x: x % 2 == 0, xs)\n```", False),
    ],
)
def test_expressions_run_on_all_inputs(response: str, passed: bool) -> None:
    assert code.CODE_EXPRESSION.verify(EVEN, response).passed is passed


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "sandbox_available", lambda: (False, "bubblewrap is not installed"))
    verdict = code.CODE_FUNCTION.verify(TAKE, "def take(n, it): return list(it)[:n]")
    assert verdict.passed is None and verdict.reason == "not run: bubblewrap is not installed"
    assert code.CODE_EXPRESSION.verify(EVEN, "`xs`").passed is None


@pytest.mark.parametrize(
    ("response", "value", "passed"),
    [
        ("Answer: [1, 2]", "[1, 2]", True),
        ("Answer: [1,2].", "[1, 2]", True),
        ("Answer: (1, 2)", "[1, 2]", False),
        ("Answer: 1", "True", False),
        ("Answer: 1.0", "1", False),
        ("Answer: `'abc'`", "'abc'", True),
        ("Answer: abc", "'abc'", True),
        ("It returns\n[1, 2]", "[1, 2]", True),
        ("Answer: {'b': 2, 'a': 1}", "{'a': 1, 'b': 2}", True),
        ("Answer: {'b': True, 'a': 1}", "{'a': 1, 'b': 1}", False),
        ("Answer: [1, 2]\nAnswer: [2]", "[1, 2]", False),
    ],
)
def test_literals_are_compared_with_their_types(response: str, value: str, passed: bool) -> None:
    assert code.judge_literal(response, value).passed is passed


def test_expression_tasks_cannot_be_passed_by_a_constant() -> None:
    for difficulty in DIFFICULTIES:
        for task in code.CODE_EXPRESSION.generate(40, 0, difficulty):
            assert len({one["value"] for one in task.payload["examples"]}) > 1


def test_a_function_of_a_held_out_task_is_shown_nowhere() -> None:
    held_out, shown = set(), set()
    for difficulty in DIFFICULTIES:
        held_out |= {t.source for t in code.CODE_FUNCTION.generate(200, 0, difficulty) if t.split != "train"}
        shown |= {t.source for t in code.CODE_OUTPUT.generate(1000, 0, difficulty)}
    assert held_out and shown and not held_out & shown


def test_library_functions_carry_licence_and_origin() -> None:
    functions = library_functions()
    assert len(functions) >= 60
    assert {"take", "frequencies"} <= {one.name for one in functions}
    assert {one.licence for one in functions} == {"MIT", "BSD-3-Clause"}
    assert all('"""' not in one.source for one in functions)
