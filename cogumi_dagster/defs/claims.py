"""Asset checks as data: a claim holds one figure of an asset's report against a threshold of the profile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from cogumi_dagster.lib.profile import Thresholds

Metric = str | Callable[[Mapping[str, Any]], Any]
"""A dotted path into a report's JSON form, or a function of it."""


def ratio(over: str, under: str) -> Metric:
    """One figure of a report over another."""
    return lambda metrics: _lookup(metrics, over) / _lookup(metrics, under)


@dataclass(frozen=True)
class Claim:
    """One figure of a report and its bound, a number or a key of ``thresholds``.

    A blocking claim that fails stops what is downstream; the others warn.
    """

    name: str
    metric: Metric
    description: str
    at_least: float | str | None = None
    at_most: float | str | None = None
    blocking: bool = False

    def spec(self, asset: str) -> dg.AssetCheckSpec:
        return dg.AssetCheckSpec(self.name, asset=asset, description=self.description, blocking=self.blocking)


@dataclass(frozen=True)
class Verdict:
    """A claim evaluated. ``value`` is None where the figure could not be had, which never passes."""

    check: str
    value: float | None
    bound: str
    threshold: float
    passed: bool
    blocking: bool
    description: str
    interval: tuple[float, float] | None = None
    count: int | None = None

    def result(self) -> dg.AssetCheckResult:
        metadata: dict[str, Any] = {"threshold": self.threshold, "bound": self.bound}
        if self.value is not None:
            metadata["value"] = self.value
        if self.count is not None:
            metadata["count"] = self.count
        if self.interval is not None:
            metadata["interval"] = f"{self.interval[0]:.3f} to {self.interval[1]:.3f} (95 %)"
        severity = dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN
        shown = "not evaluated" if self.value is None else f"{self.value:.4g} ({self.bound} {self.threshold:g})"
        return dg.AssetCheckResult(
            check_name=self.check, passed=self.passed, severity=severity, metadata=metadata, description=shown
        )


def evaluate(claim: Claim, metrics: Mapping[str, Any], thresholds: Thresholds) -> Verdict:
    """Hold a claim against a report's JSON form."""
    found = _value_of(claim.metric, metrics)
    interval, count = None, None
    if isinstance(found, Mapping):  # a proportion or an estimate
        if isinstance(found.get("low"), int | float) and isinstance(found.get("high"), int | float):
            interval = (float(found["low"]), float(found["high"]))
        count = found.get("count")
        found = found.get("value")
    value = float(found) if isinstance(found, int | float) else None
    low = claim.at_least is not None
    wanted = claim.at_least if low else claim.at_most
    threshold = float(getattr(thresholds, wanted)) if isinstance(wanted, str) else float(wanted or 0.0)
    passed = value is not None and (value >= threshold if low else value <= threshold)
    return Verdict(
        claim.name, value, "at least" if low else "at most", threshold, passed, claim.blocking, claim.description,
        interval, count,
    )  # fmt: skip


def _value_of(metric: Metric, metrics: Mapping[str, Any]) -> Any:
    if isinstance(metric, str):
        return _lookup(metrics, metric)
    try:
        return metric(metrics)
    except (ZeroDivisionError, TypeError, ValueError, LookupError):
        return None  # a part of it could not be had: not evaluated


def _lookup(metrics: Mapping[str, Any], path: str) -> Any:
    found: Any = metrics
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
