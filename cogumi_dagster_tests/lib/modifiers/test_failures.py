from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.modifiers import failures as module
from cogumi_dagster.lib.modifiers.failures import (
    MODIFIER_DOMAINS,
    find_failures,
    held_out_tasks,
    training_tasks,
)
from cogumi_dagster.lib.profile import MODIFIERS
from cogumi_dagster.lib.tasks import code
from cogumi_dagster.lib.tasks.base import Verdict


def half_right(tasks: list[Any], solutions: dict[str, str]) -> Callable[[str | None, str], str]:
    right = {task.prompt for task in tasks[::2]}
    return lambda adapter, prompt: solutions[prompt] if prompt in right else "I do not know"


def test_every_modifier_has_domains_and_pure_tasks() -> None:
    assert set(MODIFIER_DOMAINS) == set(MODIFIERS)
    for name in ("reasoning", "automation"):
        tasks = held_out_tasks(name, 20, 0)
        assert len(tasks) == 20
        assert {task.split for task in tasks} == {"test"}
        assert {task.domain for task in tasks} <= set(MODIFIER_DOMAINS[name])


def test_failures_and_successes_are_parted(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    tasks = training_tasks("automation", 16, 0, ())
    engine = scripted_engine(half_right(tasks, solutions(tasks)))
    report = find_failures(engine, "automation", tmp_path, count=16, min_failures=3, seed=0)
    failed, passed = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("failures", "successes"))
    assert report.tasks == 16
    assert (report.failures, report.successes) == (len(failed), len(passed)) == (8, 8)
    assert report.not_run == 0
    assert report.accuracy.value == 0.5
    assert sum(row.count for row in report.by_family.values()) == 16
    assert {row["task"]["id"] for row in failed} | {row["task"]["id"] for row in passed} == {task.id for task in tasks}
    assert all(adapter is None for adapter, _ in engine.asked), "the base alone"


def test_too_few_failures_are_said(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    known = solutions(training_tasks("automation", 8, 0, ()))
    engine = scripted_engine(lambda adapter, prompt: known[prompt])
    with pytest.raises(CogumiError, match="fails on only 0 of 8 automation tasks"):
        find_failures(engine, "automation", tmp_path, count=8, min_failures=1, seed=0)


def test_without_a_sandbox_too_few_failures_say_so(
    scripted_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "sandbox_available", lambda: (False, "no bubblewrap"))
    engine = scripted_engine(lambda adapter, prompt: "```python\nxs\n```")
    with pytest.raises(CogumiError, match=r"of 8 code tasks, fewer than 8 \(\d were not run") as error:
        find_failures(engine, "code", tmp_path, count=8, min_failures=8, seed=0)
    assert "install bubblewrap" in error.value.mend


def test_a_verifier_that_rejects_its_solver_stops_before_asking(
    scripted_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scripted_engine(lambda adapter, prompt: "x")
    monkeypatch.setattr(module, "verify", lambda task, text: Verdict(False, "no"))
    with pytest.raises(CogumiError, match="rejects its own solution"):
        find_failures(engine, "automation", tmp_path, count=8, min_failures=1, seed=0)
    assert engine.asked == []


def test_some_requests_are_in_no_lesson_whatever_is_filled_in() -> None:
    held_out = held_out_tasks("automation", 120, 0)
    new = {task.split_by for task in held_out if task.split_by}
    assert len(new) >= 5 and 0.2 < sum(bool(task.split_by) for task in held_out) / 120 < 0.8
    lessons = training_tasks("automation", 200, 0, held_out)
    assert not any(task.split_by for task in lessons), "what decides alone is held out"


def test_no_lesson_of_code_is_of_an_expression_that_is_held_out() -> None:
    """In whichever family: the value of an expression shows it word for word."""
    held_out = held_out_tasks("code", 100, 0)
    expressions = {task.split_by for task in held_out if task.split_by}
    lessons = training_tasks("code", 100, 0, held_out)
    assert len(expressions) > 30 and not expressions & {task.split_by for task in lessons}
    kinds = {task.kind for task in held_out if task.kind}
    assert 10 < len(kinds) < len(expressions) and kinds & {task.kind for task in lessons}, (
        "forms are taught, with other values"
    )
