import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cogumi_dagster.lib.evaluation.humaneval import load_problems
from cogumi_dagster.lib.inference import Completion
from cogumi_dagster.lib.modifiers import rehearsal as module
from cogumi_dagster.lib.modifiers.rehearsal import WORDINGS, rehearse
from cogumi_dagster.lib.modifiers.train import modifier_pairs, taught
from cogumi_dagster.lib.tasks.library_functions import Header, library_functions, unjudged_headers


def echo(adapter: str | None, prompt: str) -> str:
    """A function of the name that is asked for."""
    header = prompt.split("def ")[1].split("\n")[0]
    return f"```python\ndef {header}\n    return 7\n```"


def test_headers_are_code_with_their_docstring_and_of_no_judged_function() -> None:
    headers = unjudged_headers()
    assert len(headers) > 150, "enough to rehearse"
    judged = {function.name for function in library_functions()}
    for header in headers:
        (function,) = ast.parse(header.text).body
        assert isinstance(function, ast.FunctionDef) and function.name == header.name
        assert len(ast.get_docstring(function) or "") >= 30
        assert len(header.text) < 800 and header.licence
        assert header.name not in judged


def test_the_base_answers_and_its_answers_are_learned_as_they_are(scripted_engine: Callable[..., Any]) -> None:
    engine = scripted_engine(echo)
    rows = rehearse(engine, 40, seed=0)
    assert len(rows) == 40 == len({row["task"]["id"] for row in rows})
    assert all(adapter is None for adapter, _ in engine.asked), "the base alone"
    assert {prompt.split("\n")[0] for _, prompt in engine.asked} == set(WORDINGS)
    assert rows == rehearse(engine, 40, seed=0) != rehearse(engine, 40, seed=1)
    lesson = {"task": {"prompt": "Sort."}, "response": "sorted(xs)", "cluster": 0}
    again = [pair for pair in modifier_pairs([lesson] * 40, rows, 0.5, 0) if pair.group == "replay"]
    assert {(pair.instruction, pair.response) for pair in again} == {(r["task"]["prompt"], r["response"]) for r in rows}
    assert len(taught([], rows)) == 40, "they count as lessons where lessons are looked through"


def test_cut_off_answers_and_those_without_the_function_are_left_out(scripted_engine: Callable[..., Any]) -> None:
    class Cut(type(scripted_engine(echo))):  # type: ignore[misc]
        def chat(self, messages: Any, **options: Any) -> Completion:
            return replace(super().chat(messages, **options), finish_reason="length")

    assert rehearse(Cut(echo), 10, seed=0) == []
    for answer in ("I cannot.", "```python\nreturn 7\n```", "```python\ndef other():\n    return 7\n```", "def ("):
        assert rehearse(scripted_engine(lambda adapter, prompt, answer=answer: answer), 10, seed=0) == []


def test_nothing_is_asked_where_none_are_wanted(scripted_engine: Callable[..., Any]) -> None:
    engine = scripted_engine(echo)
    assert rehearse(engine, 0, seed=0) == [] == engine.asked


def test_a_request_that_a_benchmark_makes_is_not_rehearsed(
    scripted_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = load_problems(1).problems[0]
    headers = [Header(problem.entry_point, "taken.from", "MIT", problem.prompt.strip()), *unjudged_headers()[:5]]
    monkeypatch.setattr(module, "unjudged_headers", lambda: headers)
    rows = rehearse(scripted_engine(echo), 40, seed=0)
    assert len(rows) == 10 and all(row["task"]["source"] != f"taken.from.{problem.entry_point}" for row in rows)
