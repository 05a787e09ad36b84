import ast
from collections import Counter
from typing import Any

import pytest

from cogumi_dagster.lib.evaluation.humaneval import load_problems
from cogumi_dagster.lib.modifiers import rehearsal as module
from cogumi_dagster.lib.modifiers.near import NearDuplicates
from cogumi_dagster.lib.modifiers.rehearsal import WORDINGS, rehearsal_lessons
from cogumi_dagster.lib.modifiers.train import modifier_pairs, split_lessons, taught
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Task
from cogumi_dagster.lib.tasks.code import CODE_FUNCTION, extract_code
from cogumi_dagster.lib.tasks.library_functions import (
    FurtherFunction,
    LibraryFunction,
    further_functions,
    library_functions,
)


def everything() -> list[FurtherFunction | LibraryFunction]:
    return [*further_functions(), *library_functions()]


def test_further_functions_run_alone_have_a_docstring_and_are_not_judged() -> None:
    functions = further_functions()
    assert len(functions) > 80, "enough to rehearse"
    judged = {function.name for function in library_functions()}
    for function in everything():
        (header,) = ast.parse(function.header).body
        source = next(node for node in ast.parse(function.source).body if getattr(node, "name", "") == function.name)
        assert isinstance(header, ast.FunctionDef) and isinstance(source, ast.FunctionDef)
        assert ast.dump(header.args) == ast.dump(source.args)
        assert ast.get_docstring(header) and not ast.get_docstring(source) and not source.decorator_list
        assert function.name not in judged or function in library_functions()
        assert len(function.header) <= 600 and len(function.source) <= 1_000
        assert function.licence in {"MIT", "BSD-3-Clause"}
        assert callable(namespace(function.source)[function.name])


def namespace(source: str) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(compile(source, "library", "exec"), space)
    return space


def test_each_is_asked_for_in_every_wording_and_answered_by_its_authors() -> None:
    rows = rehearsal_lessons(10_000, seed=0)
    tasks = [Task.from_json(row["task"]) for row in rows]
    assert len({task.id for task in tasks}) == len(tasks) > 250
    assert set(Counter(task.source for task in tasks).values()) == {len(WORDINGS)}
    sources = {f"{one.module}.{one.name}": one for one in everything()}
    for task, row in zip(tasks, rows, strict=True):
        function = sources[task.source]
        assert extract_code(row["response"], function.name).strip() == function.source
        assert function.header in task.prompt and function.licence == task.licence
    assert rehearsal_lessons(20, seed=0) == rows[:20] != rehearsal_lessons(20, seed=1)
    assert rehearsal_lessons(0, seed=0) == []


def test_a_held_out_function_would_be_seen_to_be_near() -> None:
    rehearsed = NearDuplicates([Task.from_json(row["task"]) for row in rehearsal_lessons(10_000, seed=0)])
    held_out = [one for one in library_functions() if CODE_FUNCTION.task_for(one, "easy").split == "test"]
    assert held_out
    for one in held_out:
        task = CODE_FUNCTION.task_for(one, "easy")
        assert task not in rehearsed and task in NearDuplicates([module._request(one, WORDINGS[0])])


def test_a_function_that_a_held_out_task_asks_for_is_not_rehearsed() -> None:
    held_out = {
        task.source
        for difficulty in DIFFICULTIES
        for task in CODE_FUNCTION.generate(1_000, 0, difficulty)
        if task.split != "train"
    }
    assert held_out and not held_out & {row["task"]["source"] for row in rehearsal_lessons(10_000, seed=0)}


def test_they_are_learned_as_replay_and_count_where_lessons_are_looked_through() -> None:
    rows = rehearsal_lessons(40, seed=0)
    lesson = {"task": {"prompt": "Sort."}, "response": "sorted(xs)", "cluster": 0}
    pairs = modifier_pairs([lesson] * 40, rows, 0.5, 0)
    again = {(pair.instruction, pair.response) for pair in pairs if pair.group == "replay"}
    assert again == {(row["task"]["prompt"], row["response"]) for row in rows}
    train, validation = split_lessons(pairs, 0)
    assert not {pair.response for pair in train} & {pair.response for pair in validation}, "a function is on one side"
    assert len(taught([], rows)) == 40


def test_a_function_that_a_benchmark_asks_for_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = load_problems(1).problems[0]
    leaked = FurtherFunction(problem.entry_point, "taken.from", "MIT", problem.prompt.strip(), "def f():\n    pass")
    monkeypatch.setattr(module, "further_functions", lambda: [leaked, *further_functions()[:5]])
    rows = rehearsal_lessons(40, seed=0)
    assert len(rows) > 10 and all(row["task"]["source"] != f"taken.from.{problem.entry_point}" for row in rows)
