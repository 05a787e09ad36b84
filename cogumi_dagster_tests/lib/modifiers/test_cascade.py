import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.inference.base import Completion, Message
from cogumi_dagster.lib.modifiers.cascade import SAMPLE_TEMPERATURE, CascadeReport, CascadeRow, run_cascade
from cogumi_dagster.lib.tasks.base import Task, Verdict
from cogumi_dagster.lib.teaching import asking
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.providers import Answer

FREE: dict[str, Any] = {"usd_per_million_input": 0.0, "usd_per_million_output": 0.0, "stand_in": True}
TEACHERS = {
    "local": Teacher(name="local", provider="local", model="s", tier=1, temperature=0.0, **FREE),
    "gpt": Teacher(
        name="gpt", provider="openai", model="m", tier=2, api_key_env="K", usd_per_million_input=1.0,
        usd_per_million_output=2.0, requests_per_minute=100_000,
    ),
    "solver": Teacher(name="solver", provider="solver", model="exact", tier=3, **FREE),
}  # fmt: skip


def number(prompt: str) -> int:
    return int(prompt.split()[-1])


class SamplingEngine:
    """Right from the sample on that ``needs`` says for a number."""

    adapters: tuple[str, ...] = ()

    def __init__(self, needs: Callable[[int], int]) -> None:
        self.needs = needs
        self.calls: list[tuple[int, float, int]] = []

    def chat_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: Sequence[int]
    ) -> list[Completion]:
        (sample,) = set(seed)
        self.calls.append((len(conversations), temperature, sample))
        numbers = [number(conversation[-1]["content"]) for conversation in conversations]
        return [Completion(str(n) if sample >= self.needs(n) else "wrong", "stop", 10, 5) for n in numbers]


class FakeApi:
    def __init__(self, right: Callable[[int], bool]) -> None:
        self.right, self.calls = right, 0

    def ask(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None, seed: int) -> Answer:
        self.calls += 1
        n = number(messages[-1]["content"])
        return Answer(str(n) if self.right(n) else "wrong", "stop", 100, 50)

    def models(self) -> set[str]:
        return {"m"}


def tasks(count: int = 20) -> list[Task]:
    return [
        Task("math", "echo", "easy", f"Repeat {i}", answer=str(i), solution=str(i) if i < 18 else None)
        for i in range(count)
    ]


def verify(task: Task, response: str) -> Verdict:
    return Verdict(response == task.answer, "" if response == task.answer else "wrong", float(response == task.answer))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


def run(
    journal: Journal, names: list[str], engine: SamplingEngine, samples: int = 3, **how: Any
) -> tuple[list[CascadeRow], CascadeReport]:
    work = how.pop("work", None) or tasks()
    clusters = how.pop("clusters", None) or {task.id: i % 2 for i, task in enumerate(work)}
    check = how.pop("verify", verify)
    catalogue = Catalogue(path="t", teachers=TEACHERS)
    how = {"max_tokens": 16, "cap_usd": 1.0} | how
    return run_cascade(work, clusters, catalogue, names, journal, lambda: engine, check, samples, **how)  # type: ignore[arg-type,return-value]


def test_each_sample_is_asked_only_for_what_is_still_open(journal: Journal) -> None:
    engine = SamplingEngine(lambda n: 0 if n < 8 else 1 if n < 12 else 9)
    rows, report = run(journal, ["local", "solver"], engine)
    assert engine.calls == [(20, SAMPLE_TEMPERATURE, 0), (12, SAMPLE_TEMPERATURE, 1), (8, SAMPLE_TEMPERATURE, 2)]
    assert [row["sample"] for row in rows[:12]] == [0] * 8 + [1] * 4
    assert [row["teacher"] for row in rows] == ["local"] * 12 + ["solver"] * 6
    assert rows[12]["attempts"] == 4, "three rejected samples and the solver's"
    assert all(row["verdict"]["passed"] is True for row in rows)
    assert report.verified_share == 18 / 20 and report.rejections["solver: no solution"] == 2


def test_the_report_names_missing_tiers_and_compares_the_mix_with_its_targets(journal: Journal) -> None:
    _, report = run(journal, ["local", "solver"], SamplingEngine(lambda n: 0 if n < 12 else 9), samples=1)
    one, two, three = report.tiers
    assert (one.accepted, two.accepted, three.accepted) == (12, 0, 6)
    assert (one.asked, two.asked, three.asked) == (20, 0, 8)
    assert one.share == pytest.approx(2 / 3)
    assert report.missing_tiers == (2,)
    assert "tiers present: 1 and 3" in report.note and "stand-ins: local, solver" in report.note
    assert report.by_cluster == {0: {"tasks": 10, "accepted": 9}, 1: {"tasks": 10, "accepted": 9}}
    assert report.usd == 0.0 and report.usd_per_accepted == 0.0
    json.dumps(report_json(report))


def test_three_tiers_with_costs_of_rejected_attempts(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = FakeApi(lambda n: n < 16)
    monkeypatch.setattr(asking, "connect", lambda teacher: gpt)
    engine = SamplingEngine(lambda n: 0 if n < 12 else 9)
    rows, report = run(journal, ["local", "gpt", "solver"], engine, samples=1)
    assert [tier.accepted for tier in report.tiers] == [12, 4, 2] and gpt.calls == 8
    assert report.usd == pytest.approx(8 * 200e-6), "8 asked, 4 accepted"
    assert report.usd_per_accepted == pytest.approx(8 * 200e-6 / 18)
    by_solver = [row for row in rows if row["teacher"] == "solver"]
    assert {(row["usd"], row["usd_total"], row["tier"]) for row in by_solver} == {(0.0, 200e-6, 3)}
    again, repeated = run(journal, ["local", "gpt", "solver"], engine, samples=1)
    assert again == rows and repeated.usd == 0.0 and repeated.new_calls == 0 and gpt.calls == 8
    assert repeated.usd_per_accepted == report.usd_per_accepted, "what was paid earlier still counts"


def test_a_cascade_over_budget_says_what_is_left(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "connect", lambda teacher: FakeApi(lambda n: True))
    engine = SamplingEngine(lambda n: 0 if n < 12 else 9)
    with pytest.raises(CogumiError, match=r"used up.*left to do: \d of the cascade's 20 failed tasks"):
        run(journal, ["local", "gpt"], engine, samples=1, cap_usd=0.0005)
    rows, report = run(journal, ["local", "gpt"], engine, samples=1)
    assert len(rows) == 20 and report.new_calls < 8, "what was paid stays paid"


def test_no_later_tier_answers_for_one_that_could_not_be_paid(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "connect", lambda teacher: FakeApi(lambda n: True))
    with pytest.raises(CogumiError, match="left to do: 18 of the cascade's 18 failed tasks"):
        run(journal, ["gpt", "solver"], SamplingEngine(lambda n: 9), work=tasks(18), samples=1, cap_usd=0.0)


def test_what_could_not_be_checked_is_not_accepted(journal: Journal) -> None:
    engine = SamplingEngine(lambda n: 0)
    rows, report = run(journal, ["local"], engine, samples=1, verify=lambda t, r: Verdict(None, "not run"))
    assert rows == [] and report.rejections == {"nobody asked: cannot be judged": 20} and not engine.calls
    assert report.usd_per_accepted is None and report.tiers[0].share is None


def test_an_unavailable_tier_is_passed_over(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_key(teacher: Teacher) -> FakeApi:
        raise asking.TeacherError("no key", kind="no key", teacher_down=True)

    monkeypatch.setattr(asking, "connect", no_key)
    _, report = run(journal, ["local", "gpt", "solver"], SamplingEngine(lambda n: 9), samples=1)
    assert report.unavailable == {"gpt": "no key"} and report.missing_tiers == (2,)
    assert report.tiers[1].asked == 0 and report.tiers[2].accepted == 18


def test_bad_orders_and_missing_clusters_are_refused(journal: Journal) -> None:
    engine = SamplingEngine(lambda n: 0)
    with pytest.raises(CogumiError, match="not ordered by tier"):
        run(journal, ["solver", "local"], engine)
    with pytest.raises(CogumiError, match="not ordered by tier: none"):
        run(journal, [], engine)
    with pytest.raises(CogumiError, match=r"20 task.* no cluster"):
        run(journal, ["local"], engine, clusters={"x": 0})
