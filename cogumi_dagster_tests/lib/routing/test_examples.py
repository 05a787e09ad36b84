from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation import answers as answers_module
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.routing import examples as module
from cogumi_dagster.lib.routing.examples import (
    MODIFIER_OF,
    ROUTED_DOMAINS,
    collect_examples,
    system_tasks,
)
from cogumi_dagster.lib.tasks.base import Task, Verdict

DRAWN = [Task(domain, "made", "easy", f"{domain} task {n}") for n in range(4) for domain in ("math", "code", "science")]
"""Four of each; math goes to the modifier reasoning, code to code, science to none."""


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(task: Task, response: str) -> Verdict:
        return Verdict({"right": True, "wrong": False}.get(response), response)

    real = answers_module.answer_tasks
    monkeypatch.setattr(module, "answer_tasks", lambda *args, **options: real(*args, judge=judge, **options))
    monkeypatch.setattr(module, "router_tasks", lambda count, seed: DRAWN)


def test_tasks_are_of_one_split_and_of_all_domains_in_equal_parts() -> None:
    tasks = system_tasks(15, 0)
    counts = Counter(task.domain for task in tasks)
    assert set(counts) == set(ROUTED_DOMAINS)
    assert sorted(counts.values()) == [2] * 6 + [3]
    assert {task.split for task in tasks} == {"test"}
    assert MODIFIER_OF["math"] == MODIFIER_OF["reasoning"] == "reasoning"


@pytest.mark.usefixtures("judged")
def test_each_task_is_asked_of_the_base_and_of_its_own_modifier(
    scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    def script(adapter: str | None, prompt: str) -> str:
        if prompt == "code task 3" and adapter:
            return "could not be run"
        return "right" if adapter == "reasoning" or prompt.startswith("science") else "wrong"

    engine = scripted_engine(script, ("code", "reasoning"))
    seen: list[tuple[int, int]] = []
    report = collect_examples(
        engine, tmp_path, count=12, seed=0, progress=lambda done, total, note: seen.append((done, total))
    )
    assert Counter(adapter for adapter, _ in engine.asked) == {None: 12, "code": 4, "reasoning": 4}
    assert seen == [(n, 20) for n in range(1, 21)]
    rows = {row["prompt"]: row for row in read_jsonl(tmp_path / "examples.jsonl")}
    assert "code task 3" not in rows, "no label where one side could not be judged"
    assert (report.rows, report.not_run) == (11, 1)
    math, science = rows["math task 0"], rows["science task 0"]
    assert math["modifier"] == "reasoning" and not math["base"]["passed"]
    assert math["modifiers"]["reasoning"]["passed"]
    assert science["modifier"] is None and science["modifiers"] == {} and science["base"]["passed"]
    assert len(math["base"]["logprobs"]) == math["base"]["completion_tokens"] == 10
    assert report.base_right.successes == 4
    by_domain = {row.domain: row for row in report.domains}
    assert (by_domain["math"].base, by_domain["math"].modified, by_domain["math"].oracle) == (0.0, 1.0, 1.0)
    assert (by_domain["science"].modifier, by_domain["science"].modified) == ("none", 1.0)


@pytest.mark.usefixtures("judged")
def test_nothing_judged_is_an_error(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="no task could be judged"):
        collect_examples(scripted_engine(lambda adapter, prompt: "?"), tmp_path, count=12, seed=0)
    assert not list(tmp_path.iterdir())
