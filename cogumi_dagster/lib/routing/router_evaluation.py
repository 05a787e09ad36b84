"""What routing is worth: the routed system beside always-base, one modifier, chance and an oracle.

All figures are of rows that had no part in fitting what decided on them. Where a modifier was not run on
a row, the other systems fall back on the base there, but a router that sends the row to it is wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogumi_dagster.lib.evaluation import statistics as stats
from cogumi_dagster.lib.routing.calibration import Indices, Quality, bins_for, quality
from cogumi_dagster.lib.routing.features import Examples, Floats


@dataclass(frozen=True)
class HeldOutRouting:
    """Decisions on held-out ``rows``. The last three fields have one entry for every example, used or not."""

    rows: Indices
    folds: Indices
    """Which fit decided each of ``rows``."""
    confidence: Floats
    """(n, 3): P(right) by the router, by its network alone, by its calibration alone."""
    routes: tuple[str | None, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True)
class RouterReport:
    """Held-out figures of a router. Accuracies count right answers of a whole system."""

    held_out: str
    rows: int
    parameters: int
    bytes: int
    milliseconds_median: float
    milliseconds_p99: float
    thresholds: Mapping[str, float]
    of_router: Quality
    of_network: Quality
    of_calibration: Quality
    auroc_of_family: stats.Estimate
    """Of how often the base is right on a task's family, counted on the other folds: what knowing the kind of task is
    worth without a look at the answer."""
    reliability: tuple[stats.ReliabilityBin, ...]
    base_right_majority: stats.Proportion
    """Always saying the commoner of right and wrong."""
    base_right_accuracy: stats.Proportion
    """Saying right from a confidence of 1/2."""
    base_right_balanced: float
    domain_accuracy: stats.Proportion
    domain_majority: stats.Proportion
    escalated: stats.Proportion
    systems: Mapping[str, stats.Proportion]
    """``routed``, ``base``, ``own_modifier`` (always the domain's), ``best_single``, ``oracle``."""
    best_single: str
    random_accuracy: float
    """Expected accuracy of a router that escalates as many rows, by chance."""
    against: Mapping[str, stats.PairedDifference]
    """Routed minus base, own modifier and best single, on the same rows."""
    gain_recovered: stats.Estimate
    """(routed - base) / (oracle - base). NaN when the oracle gains nothing."""
    by_domain: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]

    @property
    def headline(self) -> tuple[float, float]:
        """Accuracy of the routed system and of the base alone."""
        return self.systems["routed"].value, self.systems["base"].value


def report_routing(
    examples: Examples,
    held_out: HeldOutRouting,
    seed: int,
    *,
    description: str,
    thresholds: Mapping[str, float],
    parameters: int,
    bytes_saved: int,
    seconds: Floats,
    notes: tuple[str, ...],
) -> RouterReport:
    """Score held-out decisions. ``seconds`` are the times of single decisions."""
    rows = held_out.rows
    passed, confidence = examples.passed[rows], held_out.confidence[rows]
    outcomes, best_single = _outcomes(examples, held_out)
    escalated = np.array([held_out.routes[row] is not None for row in rows])
    said_right = (confidence[:, 0] >= 0.5).astype(float)
    truth, guess = [examples.domains[row] for row in rows], [held_out.domains[row] for row in rows]
    milliseconds = 1000 * np.quantile(seconds, [0.5, 0.99])
    others = ("base", "own_modifier", "best_single")
    return RouterReport(
        held_out=description,
        rows=len(rows),
        parameters=parameters,
        bytes=bytes_saved,
        milliseconds_median=round(float(milliseconds[0]), 4),
        milliseconds_p99=round(float(milliseconds[1]), 4),
        thresholds=dict(thresholds),
        of_router=quality(confidence[:, 0], passed, held_out.folds, seed),
        of_network=quality(confidence[:, 1], passed, held_out.folds, seed),
        of_calibration=quality(confidence[:, 2], passed, held_out.folds, seed),
        auroc_of_family=_auroc_of_family(examples, held_out, seed),
        reliability=stats.reliability_bins(confidence[:, 0], passed, bins_for(len(rows))),
        base_right_majority=stats.majority_baseline(passed.tolist()),
        base_right_accuracy=stats.Proportion.of(said_right == passed),
        base_right_balanced=stats.balanced_accuracy(passed.tolist(), said_right.tolist()),
        domain_accuracy=stats.Proportion.of(np.array([a == b for a, b in zip(truth, guess, strict=True)])),
        domain_majority=stats.majority_baseline(truth),
        escalated=stats.Proportion.of(escalated),
        systems={name: stats.Proportion.of(right) for name, right in outcomes.items()},
        best_single=best_single,
        random_accuracy=_random_accuracy(examples, rows, int(escalated.sum())),
        against={name: stats.paired_difference(outcomes["routed"], outcomes[name], seed) for name in others},
        gain_recovered=_gain_recovered(outcomes, seed),
        by_domain=_by_domain(truth, outcomes, escalated),
        notes=notes + _notes(examples, held_out),
    )


def _outcomes(examples: Examples, held_out: HeldOutRouting) -> tuple[dict[str, Floats], str]:
    """Right or wrong (n,) on the held-out rows for each system, and the name of the best single modifier."""
    rows = held_out.rows
    base = examples.passed[rows]
    names = sorted({name for row in rows for name in examples.modifiers_passed[row]})
    singles = {name: np.array([_or_base(examples, row, name) for row in rows]) for name in names}
    best = max(names, key=lambda name: float(singles[name].mean()), default="none")
    outcomes = {
        "routed": np.array([examples.passed_by(row, held_out.routes[row]) or 0.0 for row in rows]),
        "base": base,
        "own_modifier": np.array([examples.own_passed(row) for row in rows]),
        "best_single": singles.get(best, base),
        "oracle": np.max([base, *singles.values()], axis=0),
    }
    return outcomes, best


def _auroc_of_family(examples: Examples, held_out: HeldOutRouting, seed: int) -> stats.Estimate:
    families = np.array([examples.families[row] for row in held_out.rows])
    passed, folds = examples.passed[held_out.rows], held_out.folds
    rates = np.empty(len(passed))
    for place, (family, fold) in enumerate(zip(families, folds, strict=True)):
        others = passed[(families == family) & (folds != fold)]
        rates[place] = (others.sum() + passed.mean()) / (len(others) + 1)  # one row of the mean, for a rare family
    ranked = np.column_stack([rates, passed, folds])
    return stats.bootstrap(ranked, lambda drawn: stats.auroc(drawn[:, 0], drawn[:, 1], drawn[:, 2]), seed)


def _or_base(examples: Examples, row: int, modifier: str) -> float:
    found = examples.passed_by(row, modifier)
    return float(examples.passed[row]) if found is None else found


def _random_accuracy(examples: Examples, rows: Indices, escalated: int) -> float:
    """Expected accuracy when ``escalated`` rows, drawn among those with a modifier, go to their own one."""
    gains = [examples.own_passed(row) - examples.passed[row] for row in rows if examples.own_modifiers[row]]
    share = min(1.0, escalated / len(gains)) if gains else 0.0
    return float((examples.passed[rows].sum() + share * sum(gains)) / len(rows))


def _gain_recovered(outcomes: Mapping[str, Floats], seed: int) -> stats.Estimate:
    def share(rows: Floats) -> float:
        routed, base, oracle = rows.mean(axis=0)
        return float((routed - base) / (oracle - base)) if oracle > base else float("nan")

    return stats.bootstrap(np.column_stack([outcomes[name] for name in ("routed", "base", "oracle")]), share, seed)


def _by_domain(truth: list[str], outcomes: Mapping[str, Floats], escalated: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for domain in sorted(set(truth)):
        inside = np.array([name == domain for name in truth])
        shares = {name: round(float(right[inside].mean()), 4) for name, right in outcomes.items()}
        found[domain] = {"rows": int(inside.sum()), "escalated": int(escalated[inside].sum()), **shares}
    return found


def _notes(examples: Examples, held_out: HeldOutRouting) -> tuple[str, ...]:
    found = []
    unrun = [row for row in held_out.rows if examples.own_modifiers[row] and _own_missing(examples, row)]
    if unrun:
        found.append(f"on {len(unrun)} rows the domain's modifier was not run: it counts as the base there")
    lost = [row for row in held_out.rows if examples.passed_by(row, held_out.routes[row]) is None]
    if lost:
        found.append(f"{len(lost)} rows were sent to a modifier that was not run on them: they count as wrong")
    if not any(examples.own_modifiers[row] for row in held_out.rows):
        found.append("no domain of these rows has a modifier: the base answers everything")
    return tuple(found)


def _own_missing(examples: Examples, row: int) -> bool:
    return examples.passed_by(row, examples.own_modifiers[row]) is None
