"""What a strategy must show."""

from collections.abc import Mapping
from typing import Any

from cogumi_dagster.defs.claims import Claim, ratio


def _missed(report: Mapping[str, Any]) -> int | None:
    """Not evaluated where no suite with an aim was taken."""
    suites = [suite for suite in report["suites"] if suite["aims"]]
    return sum(len(suite["missed"]) for suite in suites) if suites else None


def _p_of_gain(report: Mapping[str, Any]) -> float:
    better = report["adapter_balanced_accuracy"]["value"] > report["untrained_balanced_accuracy"]["value"]
    return float(report["p_value"]) if better else 1.0


def _gain(report: Mapping[str, Any]) -> float:
    others = report["untrained_balanced_accuracy"]["value"], report["constant_balanced_accuracy"]
    return float(report["adapter_balanced_accuracy"]["value"] - max(others))


def _above_chance(report: Mapping[str, Any]) -> float:
    return float(report["adapter_balanced_accuracy"]["low"] - report["constant_balanced_accuracy"])


STRATEGY_JOURNAL = (Claim("strategies_tried", "strategies", "strategies that were tried on problems", at_least=2),)
LEARNED_STRATEGY = (
    Claim("verified_share", lambda m: m["traces"] / m["wanted"], "share of the wanted traces that there are: the family has a problem for them, and its verifier accepts them", at_least=0.8),
    Claim("classes_balanced", "imbalance", "largest difference between the shares of a family's classes; of open answers, repeats of the commonest", at_most=0.05),
)  # fmt: skip
STRATEGY_ADAPTER = (
    Claim("loss_fell", ratio("loss_last", "loss_first"), "training loss, last fifth of the steps over the first", at_most=0.999),
)  # fmt: skip
STRATEGY_EVALUATION = (
    Claim("better_than_untrained", _gain, "gain in balanced accuracy over the untrained student and the commonest answer, whichever is better", at_least=0.05),
    Claim("balanced_accuracy", "adapter_balanced_accuracy", "balanced accuracy of the served student with adapter", at_least="strategy_balanced_accuracy"),
    Claim("beyond_chance", _above_chance, "lower end of its balanced accuracy's interval over that of always giving the commonest answer", at_least=0.0),
    Claim("gain_significant", _p_of_gain, "McNemar's p of adapter against no adapter, the same problems; 1 where it is no better", at_most=0.05),
    Claim("suites_reach_aims", _missed, "aims of the family's suites that the student misses", at_most=0),
)  # fmt: skip
