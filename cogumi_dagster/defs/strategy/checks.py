"""What a strategy must show."""

from collections.abc import Mapping
from typing import Any

from cogumi_dagster.defs.claims import Claim, ratio


def _missed(report: Mapping[str, Any]) -> int | None:
    """Not evaluated where no suite with an aim was taken."""
    suites = [suite for suite in report["suites"] if suite["aims"]]
    return sum(len(suite["missed"]) for suite in suites) if suites else None


def _p_of_gain(report: Mapping[str, Any]) -> float:
    better = report["adapter_balanced_accuracy"] > report["untrained_balanced_accuracy"]
    return float(report["p_value"]) if better else 1.0


STRATEGY_JOURNAL = (Claim("strategies_tried", "strategies", "strategies that were tried on problems", at_least=2),)
LEARNED_STRATEGY = (
    Claim("verified_share", lambda m: m["traces"] / (m["traces"] + m["rejected"]), "share of the teacher's traces that their verifier accepts", at_least=0.8),
    Claim("classes_balanced", "imbalance", "largest difference between the shares of a family's classes; of open answers, repeats of the commonest", at_most=0.05),
)  # fmt: skip
STRATEGY_ADAPTER = (
    Claim("loss_fell", ratio("loss_last", "loss_first"), "training loss, last fifth of the steps over the first", at_most=0.999),
)  # fmt: skip
STRATEGY_EVALUATION = (
    Claim("better_than_untrained", lambda m: m["adapter_balanced_accuracy"] - max(m["untrained_balanced_accuracy"], m["majority"]["value"]), "gain in balanced accuracy over the untrained student and the commonest answer, whichever is better", at_least=0.05),
    Claim("balanced_accuracy", lambda m: m["stages"][2]["balanced_accuracy"], "balanced accuracy of the served student with adapter", at_least="strategy_balanced_accuracy"),
    Claim("beyond_chance", _p_of_gain, "McNemar's p of adapter against no adapter, the same problems; 1 where it is no better", at_most=0.05),
    Claim("suites_reach_aims", _missed, "aims of the family's suites that the student misses", at_most=0),
)  # fmt: skip
