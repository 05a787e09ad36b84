import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.planning import teachers
from cogumi_dagster.lib.planning.teachers import plan_modifiers_and_strategies
from cogumi_dagster.lib.profile import ModifiersConfig, Profile, StrategyConfig, TeachingConfig
from cogumi_dagster.lib.strategy.teacher import WRITING_TOKENS
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher


def catalogue() -> Catalogue:
    def of(name: str, tier: int, provider: str = "groq", price: float = 1.0) -> Teacher:
        return Teacher.model_validate(
            {"name": name, "provider": provider, "model": "m", "tier": tier, "api_key_env": "KEY",
             "usd_per_million_input": price, "usd_per_million_output": 2 * price, "reasoning_tokens": 20}
        )  # fmt: skip

    known = (of("cheap", 1), of("better", 2), of("solver", 3, "solver", 0.0), of("local", 1, "local", 0.0))
    return Catalogue(path="t.yaml", teachers={teacher.name: teacher for teacher in known})


def profile(*cascade: str, teacher: str = "solver") -> Profile:
    return Profile(
        name="t",
        teaching=TeachingConfig(max_tokens=100, mix={}),
        modifiers=ModifiersConfig(training_tasks=300, tier1_samples=4, cascade=cascade),
        strategy=StrategyConfig(
            teacher=teacher, journal_batches=6, distil_every=2, batch_problems=10, traces=200, test_problems=30
        ),
    )


def test_a_cascade_is_bounded_by_every_task_in_every_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "SAMPLE", 10)
    rows = plan_modifiers_and_strategies(profile("cheap", "better", "solver"), catalogue(), None)
    assert [(row.domain, row.teacher, row.step, row.tasks, row.calls) for row in rows] == [
        (name, teacher, step, calls, calls)
        for name in ("code", "reasoning", "automation")
        for teacher, step, calls in (("cheap", "tier 1", 1200), ("better", "tier 2", 300))
    ]
    first = rows[0]
    assert first.completion_tokens == 1200 * 120 and first.prompt_tokens > 1200 * 10
    assert first.usd == pytest.approx((first.prompt_tokens + 2 * first.completion_tokens) / 1e6, abs=2e-6)
    assert first.worst_usd is not None and first.worst_usd > first.usd


def test_a_strategy_s_teacher_attempts_writes_and_is_evaluated() -> None:
    rows = plan_modifiers_and_strategies(profile("local", "solver", teacher="better"), catalogue(), None)
    # Six batches of ten, two of them before the first strategy; 200 traces; 30 problems without and 30 with it.
    assert [(row.domain, row.step, row.calls) for row in rows] == [
        ("scheduling", "attempts", 20 + 30),
        ("scheduling", "with strategy", 40 + 200 + 30),
        ("scheduling", "writing", 6 + 2),
    ]
    untold, told, writing = rows
    assert told.prompt_tokens / told.calls > untold.prompt_tokens / untold.calls + 400
    assert writing.completion_tokens == 8 * (WRITING_TOKENS + 20)


def test_what_costs_nothing_is_not_listed_and_who_is_not_there_is_named() -> None:
    assert plan_modifiers_and_strategies(profile("local", "solver"), catalogue(), None) == ()
    with pytest.raises(CogumiError, match="no teacher 'chaep'"):
        plan_modifiers_and_strategies(profile("chaep", "solver"), catalogue(), None)
