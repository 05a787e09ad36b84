"""The statistics that stand next to every score: intervals, paired tests, baselines, calibration.

Labels are 0 or 1 and probabilities are of label 1, unless a docstring says otherwise. A statistic that
the data leave undefined (AUROC of one class) is NaN, and ``null`` in JSON: never 0.0.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi_dagster.lib.errors import CogumiError

Floats = NDArray[np.float64]

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: two-sided 95 %."""
SIGNIFICANCE = 0.05
"""A p-value below it counts as a difference."""

RESAMPLES = 1000
"""Bootstrap resamples: the ends of a 95 % interval then vary by about 1 % of its width between seeds."""


def json_number(value: float) -> float | None:
    """A finite number to 6 decimals; None, which is null in JSON, for NaN and infinity."""
    return round(value, 6) if math.isfinite(value) else None


@dataclass(frozen=True)
class Proportion:
    """``successes`` out of ``count``, with the Wilson 95 % interval."""

    successes: int
    count: int
    effective: float | None = None
    """As many independent rows as tell as much as these; None where they are independent."""

    @classmethod
    def of(cls, flags: ArrayLike, groups: Sequence[Hashable] | None = None) -> "Proportion":
        """The share of true among ``flags`` (n,). ``groups`` (n,) says which rows are alike, as paraphrases are.

        The interval is then of n over the design effect (Kish 1965), from the variance of a ratio over groups; at most
        n, and the number of groups where that variance is zero.
        """
        chosen = np.asarray(flags, dtype=bool)
        successes, count = int(chosen.sum()), len(chosen)
        if groups is None:
            return cls(successes, count)
        if count != len(groups):
            raise CogumiError(f"{len(groups)} groups for {count} flags", "give one each")
        residuals: Counter[Hashable] = Counter()  # times count, and so exact
        for group, flag in zip(groups, chosen, strict=True):
            residuals[group] += count * bool(flag) - successes
        many = len(residuals)
        if many == count:
            return cls(successes, count)
        spread = sum(residual**2 for residual in residuals.values()) / count**2 * many / max(many - 1, 1)
        tells = min(count, successes * (1 - successes / count) * count / spread) if spread > 0 else many
        return cls(successes, count, tells)

    @property
    def value(self) -> float:
        return self.successes / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if self.effective is None or not self.count:
            return wilson(self.successes, self.count)
        return wilson(self.value * self.effective, self.effective)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "value": json_number(self.value),
            "low": json_number(low),
            "high": json_number(high),
            "successes": self.successes,
            "count": self.count,
        }


@dataclass(frozen=True)
class Estimate:
    """A statistic of ``count`` rows with its 95 % interval. NaN where it is undefined."""

    value: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, Any]:
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: json_number(number) for name, number in ends.items()}, "count": self.count}


def report_json(report: Any) -> dict[str, Any]:
    """A frozen report as plain JSON, nested reports too: fields in order, each number finite or null."""
    return {name: _plain(getattr(report, name)) for name in report.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return _plain(value.to_json())
    if hasattr(value, "__dataclass_fields__"):
        return report_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over the same items, with a bootstrap interval and an exact test of wins against losses."""

    difference: Estimate
    wins: int
    losses: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        p_value = json_number(self.p_value)
        return {**self.difference.to_json(), "wins": self.wins, "losses": self.losses, "p_value": p_value}


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: what was predicted and what came true."""

    predicted: float
    observed: float
    successes: int
    count: int

    def to_json(self) -> dict[str, Any]:
        share = Proportion(self.successes, self.count).to_json()
        return {"predicted": round(self.predicted, 6), "observed": share.pop("value"), **share}


def wilson(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion. (0, 1) when nothing was counted. Counts may be effective ones.

    Raises:
        CogumiError: ``successes`` is not between 0 and ``count``.
    """
    if not 0 <= successes <= count:
        raise CogumiError(f"{successes} successes out of {count}", "count successes among the same items")
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the formula is exact but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test. ``b`` and ``c`` count the items that only one of the two got right."""
    if min(b, c) < 0:
        raise CogumiError(f"McNemar's test of {b} against {c}", "give counts of discordant pairs")
    total, fewer = b + c, min(b, c)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    tail = math.fsum(math.exp(value - total * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)


def grouped_mcnemar(before: Sequence[bool], after: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """``sign_flips`` of what each of ``groups`` (n,) wins less what it loses from ``before`` (n,) to ``after`` (n,)."""
    moved: Counter[Hashable] = Counter()
    for first, second, group in zip(before, after, groups, strict=True):
        moved[group] += second - first
    return sign_flips(list(moved.values()))


def sign_flips(differences: Sequence[int]) -> float:
    """Exact two-sided p of the sum of ``differences``, where each may as well have had the other sign.

    One difference is the wins less the losses of items that come out alike. With an item to each it is McNemar's test.
    """
    moved = [abs(difference) for difference in differences if difference]
    seen, sums = abs(sum(differences)), Counter({0: 1})
    for size in moved:
        flipped: Counter[int] = Counter()
        for total, ways in sums.items():
            flipped[total + size] += ways
            flipped[total - size] += ways
        sums = flipped
    return sum(ways for total, ways in sums.items() if abs(total) >= seen) / 2 ** len(moved)


def bootstrap(
    values: ArrayLike, statistic: Callable[[Floats], float], seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """``statistic`` of ``values`` (n,) or (n, k) with a percentile bootstrap 95 % interval over the n rows.

    Resamples where the statistic is undefined (NaN) are left out. When most are, the interval is NaN.

    Raises:
        CogumiError: no rows.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0:
        raise CogumiError("a bootstrap of no rows", "give at least one row")
    draw = np.random.default_rng(seed)
    picks = (rows[draw.integers(0, len(rows), len(rows))] for _ in range(resamples))
    seen = np.array([statistic(pick) for pick in picks])
    seen = seen[np.isfinite(seen)]
    low, high = np.quantile(seen, [0.025, 0.975]) if len(seen) > resamples / 2 else (math.nan, math.nan)
    return Estimate(float(statistic(rows)), float(low), float(high), len(rows))


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int) -> PairedDifference:
    """Compare two systems on the same items; ``a`` and ``b`` are scores (n,).

    The p-value is McNemar's for scores of 0 and 1, and the sign test's for others: the same formula.
    """
    difference = _vector(a, "a") - _same_length(_vector(b, "b"), a)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(bootstrap(difference, lambda d: float(d.mean()), seed), wins, losses, mcnemar(wins, losses))


def majority_baseline(labels: Sequence[Hashable]) -> Proportion:
    """The score of always giving the commonest label."""
    if len(labels) == 0:
        return Proportion(0, 0)
    return Proportion(Counter(labels).most_common(1)[0][1], len(labels))


def balanced_accuracy(labels: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Mean recall over the classes that occur in ``labels``. 1 / classes is what a constant gets."""
    if len(labels) != len(predictions):
        raise CogumiError(f"{len(predictions)} predictions for {len(labels)} labels", "give one each")
    totals = Counter(labels)
    right = Counter(label for label, guess in zip(labels, predictions, strict=True) if label == guess)
    return math.fsum(right[label] / total for label, total in totals.items()) / len(totals) if totals else math.nan


def mean_of_shares(shares: Sequence[Proportion]) -> Estimate:
    """The mean of independent proportions (recalls: balanced accuracy) with a 95 % interval.

    The interval recovers each side's variance from the Wilson intervals (MOVER; Zou and Donner 2008, after Newcombe
    1998), so that it does not vanish where all are right or all are wrong, as a bootstrap's does.
    """
    known = [share for share in shares if share.count]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    values = [share.value for share in known]
    ends = [wilson(share.successes, share.count) for share in known]
    mean = math.fsum(values) / len(values)
    down = math.sqrt(sum((value - low) ** 2 for value, (low, _) in zip(values, ends, strict=True))) / len(values)
    up = math.sqrt(sum((high - value) ** 2 for value, (_, high) in zip(values, ends, strict=True))) / len(values)
    return Estimate(mean, max(0.0, mean - down), min(1.0, mean + up), sum(share.count for share in known))


def auroc(scores: ArrayLike, labels: ArrayLike, folds: ArrayLike | None = None) -> float:
    """The chance that a random positive scores above a random negative; ties count half. NaN with one class.

    ``folds`` (n,) names the model that gave each score: only scores of one model are compared. Pooled
    scores of a cross-fit are biased below chance, since a fold that holds out positives was fitted
    with fewer of them and scores everything lower (Forman and Scholz 2010).
    """
    values, truth = _pair(scores, labels)
    fold = np.zeros(len(values)) if folds is None else _same_length(_vector(folds, "folds"), values)
    won = pairs = 0.0
    for name in np.unique(fold):
        inside, right = values[fold == name], truth[fold == name]
        positives = right.sum()
        _, group, sizes = np.unique(inside, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
        won += ranks[right == 1].sum() - positives * (positives + 1) / 2
        pairs += positives * (len(right) - positives)
    return float(won / pairs) if pairs else math.nan


def aurc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the risk-coverage curve (arXiv 1805.08206): mean error of the k surest answers, over all k.

    Lower is better. Ties count as if in random order, so a constant score gets the error rate.
    """
    values, truth = _pair(scores, labels)
    if len(values) == 0:
        return math.nan
    _, group, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    error = np.bincount(group, weights=1 - truth) / sizes
    return float((np.cumsum(np.repeat(error, sizes)) / np.arange(1, len(values) + 1)).mean())


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of the probability. p (1 - p) is what the base rate p gets."""
    values, truth = _pair(probs, labels)
    return float(((values - truth) ** 2).mean()) if len(values) else math.nan


def reliability_bins(probs: ArrayLike, labels: ArrayLike, bins: int = 10) -> tuple[ReliabilityBin, ...]:
    """Bins of equal mass, not of equal width. Equal probabilities are never split between two bins."""
    values, truth = _pair(probs, labels)
    found = []
    place = _equal_mass(values, bins)
    for index in np.unique(place):
        inside = place == index
        successes, count = int(truth[inside].sum()), int(inside.sum())
        found.append(ReliabilityBin(float(values[inside].mean()), successes / count, successes, count))
    return tuple(found)


def expected_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Mean gap of predicted and observed share over ``bins`` bins of equal mass (ties stay together).

    It is biased upwards on few rows: read it beside ``calibration_noise``.
    """
    values, truth = _pair(probs, labels)
    if len(values) == 0:
        return math.nan
    gaps = np.bincount(_equal_mass(values, bins), weights=values - truth)
    return float(np.abs(gaps).sum() / len(values))


def calibration_noise(probs: ArrayLike, seed: int, bins: int = 10, draws: int = 200) -> float:
    """The ECE that a perfectly calibrated predictor with these probabilities would show on as many rows.

    With 120 rows and 10 bins it is about 0.1, so an ECE below 0.05 cannot be asked there.
    """
    values = _vector(probs, "probabilities")
    draw = np.random.default_rng(seed)
    shown = [expected_calibration_error(values, draw.random(len(values)) < values, bins) for _ in range(draws)]
    return float(np.mean(shown))


def _equal_mass(values: Floats, bins: int) -> NDArray[np.int64]:
    """The bin of each value: by the rank of the first value equal to it."""
    if bins < 1:
        raise CogumiError(f"{bins} bins", "ask for at least one")
    first = np.searchsorted(np.sort(values), values, side="left")
    return np.asarray(first * bins // max(len(values), 1), dtype=np.int64)


def _vector(values: ArrayLike, name: str) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise CogumiError(f"{name} of shape {vector.shape} must be one list of finite numbers", "leave out the others")
    return vector


def _same_length(vector: Floats, other: ArrayLike) -> Floats:
    if len(vector) != len(np.asarray(other)):
        raise CogumiError(f"{len(vector)} and {len(np.asarray(other))} values", "give one of each for every item")
    return vector


def _pair(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    values = _vector(scores, "scores")
    truth = _same_length(_vector(labels, "labels"), values)
    if not ((truth == 0) | (truth == 1)).all():
        raise CogumiError("labels other than 0 and 1", "give 1 for right and 0 for wrong")
    return values, truth
