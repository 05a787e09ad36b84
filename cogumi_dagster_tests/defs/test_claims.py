"""The asset checks of modifiers and strategies: each passes on a good report and fails on one that misses it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest

from cogumi_dagster.defs.claims import Claim, Verdict, evaluate
from cogumi_dagster.defs.modifiers import checks as modifiers
from cogumi_dagster.defs.strategy import checks as strategy
from cogumi_dagster.lib.evaluation.statistics import Proportion
from cogumi_dagster.lib.profile import Thresholds

Report = dict[str, Any]


def share(successes: int, count: int) -> Report:
    return Proportion(successes, count).to_json()


def tier(number: int, value: float, low: float, high: float) -> Report:
    return {"tier": number, "share": value, "low": low, "high": high}


GOOD: dict[str, tuple[Sequence[Claim], Report]] = {
    "domain_failures": (modifiers.DOMAIN_FAILURES, {"tasks": 400, "not_run": 0}),
    "failure_patterns": (modifiers.FAILURE_PATTERNS, {"silhouette": 0.3, "smallest": 12}),
    "cascade_examples": (
        modifiers.CASCADE_EXAMPLES,
        {
            "verified_share": 0.97,
            "missing_tiers": [],
            "tiers": [tier(1, 0.65, 0.6, 0.7), tier(2, 0.22, 0.2, 0.25), tier(3, 0.13, 0.1, 0.15)],
        },
    ),
    "modifier_adapter": (modifiers.MODIFIER_ADAPTER, {"loss_first": 1.0, "loss_last": 0.2}),
    "packaged_modifier": (
        modifiers.PACKAGED_MODIFIER,
        {
            "pruning": {"chosen": 0.8},
            "unpruned_bytes": 20_000_000,
            "package": {"bytes_after": 3_000_000, "bit_identical": True},
            "parity": {"mean_kl": 1e-5},
        },
    ),
    "modifier_evaluation": (
        modifiers.MODIFIER_EVALUATION,
        {
            "improves": True,
            "regresses": False,
            "repaired": share(90, 200),
            "kept": share(99, 100),
            "not_run": 0,
            "benchmarks": [{"base": share(10, 164), "not_run": ""}],
            "near_lessons": 0,
            "contaminated_lessons": 0,
        },
    ),
    "strategy_journal": (strategy.STRATEGY_JOURNAL, {"strategies": 3}),
    "learned_strategy": (strategy.LEARNED_STRATEGY, {"traces": 98, "wanted": 100, "rejected": 2, "imbalance": 0.01}),
    "strategy_adapter": (strategy.STRATEGY_ADAPTER, {"loss_first": 1.0, "loss_last": 0.2}),
    "strategy_evaluation": (
        strategy.STRATEGY_EVALUATION,
        {
            "adapter_balanced_accuracy": {"value": 0.99, "low": 0.96, "high": 1.0, "count": 120},
            "untrained_balanced_accuracy": {"value": 0.4, "low": 0.3, "high": 0.5, "count": 120},
            "constant_balanced_accuracy": 0.5,
            "p_value": 1e-9,
            "suites": [{"aims": {}, "missed": ()}, {"aims": {"accuracy": 0.99}, "missed": ()}],
        },
    ),
}

MISSES: list[tuple[str, str, Callable[[Report], Any]]] = [
    ("domain_failures", "all_judged", lambda r: r.update(not_run=1)),
    ("failure_patterns", "silhouette", lambda r: r.update(silhouette=0.01)),
    ("failure_patterns", "sizes", lambda r: r.update(smallest=1)),
    ("cascade_examples", "verified_share", lambda r: r.update(verified_share=0.5)),
    ("cascade_examples", "tier_1_share", lambda r: r["tiers"][0].update(share=0.1)),
    ("cascade_examples", "tiers_on_target", lambda r: r["tiers"][2].update(share=0.2)),
    ("modifier_adapter", "loss_fell", lambda r: r.update(loss_last=1.1)),
    ("packaged_modifier", "pruned_share", lambda r: r["pruning"].update(chosen=0.6)),
    ("packaged_modifier", "packed_share", lambda r: r["package"].update(bytes_after=5_000_000)),
    ("packaged_modifier", "bit_identical", lambda r: r["package"].update(bit_identical=False)),
    ("packaged_modifier", "parity", lambda r: r["parity"].update(mean_kl=1.0)),
    ("packaged_modifier", "within_budget", lambda r: r["package"].update(bytes_after=10**9)),
    ("modifier_evaluation", "repairs_failures", lambda r: r.update(improves=False)),
    ("modifier_evaluation", "keeps_successes", lambda r: r.update(regresses=True)),
    ("modifier_evaluation", "all_judged", lambda r: r["benchmarks"][0].update(not_run="no sandbox")),
    ("modifier_evaluation", "repaired_share", lambda r: r.update(repaired=share(50, 200))),
    ("modifier_evaluation", "kept_share", lambda r: r.update(kept=share(97, 100))),
    ("modifier_evaluation", "held_out_is_new", lambda r: r.update(near_lessons=1)),
    ("modifier_evaluation", "benchmark_is_new", lambda r: r.update(contaminated_lessons=1)),
    ("strategy_journal", "strategies_tried", lambda r: r.update(strategies=1)),
    ("learned_strategy", "verified_share", lambda r: r.update(wanted=400)),
    ("learned_strategy", "classes_balanced", lambda r: r.update(imbalance=0.2)),
    ("strategy_adapter", "loss_fell", lambda r: r.update(loss_last=1.1)),
    ("strategy_evaluation", "better_than_untrained", lambda r: r["untrained_balanced_accuracy"].update(value=0.97)),
    ("strategy_evaluation", "balanced_accuracy", lambda r: r["adapter_balanced_accuracy"].update(value=0.6)),
    ("strategy_evaluation", "beyond_chance", lambda r: r["adapter_balanced_accuracy"].update(low=0.49)),
    ("strategy_evaluation", "gain_significant", lambda r: r.update(p_value=0.2)),
    ("strategy_evaluation", "suites_reach_aims", lambda r: r["suites"][1].update(missed=("accuracy",))),
]


def verdicts(asset: str, change: Callable[[Report], Any] = lambda report: None) -> dict[str, Verdict]:
    claims, good = GOOD[asset]
    report = deepcopy(good)
    change(report)
    return {claim.name: evaluate(claim, report, Thresholds()) for claim in claims}


def test_every_claim_is_missed_by_one_report_here() -> None:
    assert {(asset, name) for asset, name, _ in MISSES} == {
        (a, c.name) for a, (claims, _) in GOOD.items() for c in claims
    }


@pytest.mark.parametrize("asset", GOOD)
def test_a_good_report_passes_every_claim(asset: str) -> None:
    assert all(verdict.passed for verdict in verdicts(asset).values())


@pytest.mark.parametrize(("asset", "name", "change"), MISSES, ids=[f"{asset}-{name}" for asset, name, _ in MISSES])
def test_what_misses_a_claim_fails_it(asset: str, name: str, change: Callable[[Report], Any]) -> None:
    found = verdicts(asset, change)
    assert found[name].value is not None and not found[name].passed


@pytest.mark.parametrize(
    ("asset", "name", "change"),
    [
        ("cascade_examples", "tiers_on_target", lambda r: r.update(missing_tiers=[2])),
        ("modifier_evaluation", "keeps_successes", lambda r: r.update(kept=share(0, 0), benchmarks=[])),
        (
            "modifier_evaluation",
            "keeps_successes",
            lambda r: r.update(kept=share(0, 0), benchmarks=[{"base": share(0, 164), "not_run": ""}]),
        ),
        ("modifier_evaluation", "kept_share", lambda r: r.update(kept=share(0, 0))),
        ("strategy_evaluation", "suites_reach_aims", lambda r: r.update(suites=[])),
    ],
)
def test_what_could_not_be_measured_does_not_pass(asset: str, name: str, change: Callable[[Report], Any]) -> None:
    verdict = verdicts(asset, change)[name]
    assert verdict.value is None and not verdict.passed


def test_an_adapter_that_is_worse_gains_nothing_however_small_p() -> None:
    def worse(report: Report) -> None:
        report["adapter_balanced_accuracy"].update(value=0.2, low=0.1)

    assert verdicts("strategy_evaluation", worse)["gain_significant"].value == 1.0


def test_a_benchmark_that_regresses_is_evaluated_where_the_base_had_nothing_to_keep() -> None:
    found = verdicts("modifier_evaluation", lambda r: r.update(kept=share(0, 0), regresses=True))
    assert found["keeps_successes"].value == 0.0


def test_traces_that_were_never_drawn_count_against_the_verified_share() -> None:
    assert verdicts("learned_strategy", lambda r: r.update(traces=50, rejected=0))["verified_share"].value == 0.5
