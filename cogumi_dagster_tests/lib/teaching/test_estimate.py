from pathlib import Path

import pytest

from cogumi_dagster.lib.profile import DatasetConfig, DomainTeachers, Profile, TeachingConfig
from cogumi_dagster.lib.tasks.base import Verdict
from cogumi_dagster.lib.teaching import available
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.estimate import DatasetPlan, plan_dataset
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.teach import teach

SOURCES = Path(__file__).parents[3] / "resources" / "sources"


def teacher(name: str, url: str = "", **changes: object) -> Teacher:
    fields: dict[str, object] = {
        "name": name, "provider": "openai", "model": "m", "tier": 2, "api_key_env": "CANARY_KEY",
        "usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "requests_per_minute": 60,
        "base_url": f"{url}/v1",
    }  # fmt: skip
    return Teacher.model_validate(fields | changes)


def profile(judge: str = "rules", examples: int = 120, share: float = 0.5) -> Profile:
    mix = (DomainTeachers(teacher="gpt", share=share), DomainTeachers(teacher="solver", share=1 - share))
    teaching = TeachingConfig(mix={"math": mix}, judge=judge, max_tokens=100, max_usd_per_run=5.0)
    return Profile(name="t", teaching=teaching, dataset=DatasetConfig(examples=examples))


def catalogue(*teachers: Teacher) -> Catalogue:
    solver = Teacher(
        name="solver", provider="solver", model="exact", tier=3, usd_per_million_input=0, usd_per_million_output=0
    )
    return Catalogue(path="t.yaml", teachers={t.name: t for t in (solver, *teachers)})


def estimate(known: Catalogue, journal: Journal | None = None, **how: object) -> DatasetPlan:
    return plan_dataset(profile(**how), SOURCES, known, journal)  # type: ignore[arg-type]


def test_without_history_answers_are_as_long_as_allowed_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "connect", None)
    plan = estimate(catalogue(teacher("gpt", reasoning_tokens=50)))
    gpt, solver = plan.rows
    assert (gpt.teacher, gpt.step, solver.teacher) == ("gpt", "answers", "solver")
    assert gpt.calls + solver.calls == plan.tasks == plan.sampled == 18 and gpt.known == 0
    assert gpt.completion_tokens == 150 * gpt.calls and gpt.basis == "the longest"
    assert gpt.usd is not None and gpt.worst_usd is not None and gpt.usd < gpt.worst_usd
    assert gpt.usd == pytest.approx((gpt.prompt_tokens + 2 * gpt.completion_tokens) / 1e6, abs=2e-6)
    assert gpt.minutes == gpt.calls / 60
    assert (solver.usd, solver.prompt_tokens, solver.minutes) == (0.0, 0, 0.0)
    assert plan.usd == gpt.usd


def test_a_sample_is_scaled_up_and_an_unknown_price_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogumi_dagster.lib.teaching.estimate.SAMPLE", 20)
    plan = estimate(catalogue(teacher("gpt", usd_per_million_output=None)), examples=4000)
    assert (plan.sampled, plan.tasks) == (20, 600)
    assert sum(row.tasks for row in plan.rows) == pytest.approx(600, abs=1)
    assert plan.rows[0].usd is None and plan.usd is None and plan.worst_usd is None


def test_what_the_journal_has_is_not_asked_again_and_tells_how_long_answers_are(server: object, tmp_path: Path) -> None:
    from cogumi_dagster.lib.curation.sources import draw_source_examples

    gpt = teacher("gpt", server.url)  # type: ignore[attr-defined]
    fast = gpt.model_copy(update={"requests_per_minute": 100_000})
    tasks, _ = draw_source_examples("math", SOURCES, 18, 0)
    with Journal(tmp_path / "j.db") as journal:
        before = estimate(catalogue(gpt), journal).rows[0]
        shares = {"gpt": 0.5, "solver": 0.5}
        _, report = teach(
            tasks[:9], "math", shares, catalogue(fast), journal, None, lambda task, text: Verdict(True, ""),
            max_tokens=100, cap_usd=5.0,
        )  # fmt: skip
        asked = report.new_calls
        after = estimate(catalogue(gpt), journal).rows[0]
    assert (after.known, after.calls) == (asked, before.calls - asked) and asked > 0
    assert after.completion_tokens == 10 * after.calls and f"mean of {asked} answers" in after.basis


def test_the_judge_reads_every_answer() -> None:
    plan = estimate(catalogue(teacher("gpt"), teacher("judge")), judge="judge")
    judge = plan.rows[-1]
    assert (judge.teacher, judge.step, judge.calls, judge.tasks) == ("judge", "scores", 18, 18)
    assert judge.prompt_tokens > 18 * 200, "the rubric is in every prompt"
    assert plan.calls == 36
