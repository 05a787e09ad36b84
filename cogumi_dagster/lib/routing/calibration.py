"""From the base's token log-probabilities to the chance that its answer is right.

Three methods, all a logistic function: *temperature* and *Platt* scaling of the raw confidence (the
geometric mean of the token probabilities), and *quantile*, a logistic regression on the 16 confidence
features. Cross-validation inside the fitting rows chooses; the report is on rows that had no part in it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation import statistics as stats
from cogumi_dagster.lib.routing.features import (
    CONFIDENCE_DIMENSIONS,
    MIN_ROWS,
    QUANTILES,
    Examples,
    Floats,
    confidence_features,
    read_examples,
)

log = logging.getLogger(__name__)

Indices = NDArray[np.int64]
Method = Literal["temperature", "platt", "quantile"]
METHODS: tuple[Method, ...] = get_args(Method)

MEAN = len(QUANTILES) + 1
"""Place of the mean log-probability among the confidence features."""

FOLDS = 5
ENOUGH_TEST_ROWS = 50
"""With at least this many rows of the test split, the report is on them alone."""

QUANTILE_PENALTY = 10.0
"""L2 weight on the 16 standardised features: 50-100 labels must do (arXiv 2410.02173)."""

ROWS_PER_BIN = 20


def logit(probs: Floats) -> Floats:
    """log p / (1 - p), with p kept inside [1e-6, 1 - 1e-6]."""
    inside = np.clip(probs, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def sigmoid(values: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -40.0, 40.0))))


def raw_confidence(confidence: Floats) -> Floats:
    """Geometric mean of the token probabilities, from confidence features (n, 16): what is calibrated."""
    return np.asarray(np.exp(confidence[:, MEAN]))


def base_rate(passed: Floats) -> float:
    """The share of right answers, with one of each kind added: never 0 or 1."""
    return float((passed.sum() + 1) / (len(passed) + 2))


def soft_logistic(features: Floats, targets: Floats, penalty: float) -> tuple[Floats, float]:
    """Logistic regression of targets in [0, 1] (n,) on dense features (n, k), by Newton's method.

    ``penalty`` is the L2 weight, with the meaning of scikit-learn's 1/C; the bias is not penalised.
    Returns weights (k,) and bias.
    """
    inputs = np.hstack([features, np.ones((len(features), 1))])
    ridge = np.full(inputs.shape[1], penalty)
    ridge[-1] = 1e-9
    weights = np.zeros(inputs.shape[1])
    weights[-1] = logit(targets.mean(keepdims=True))[0]
    for _ in range(50):
        probs = sigmoid(inputs @ weights)
        slope = inputs.T @ (probs - targets) + ridge * weights
        curve = (inputs * (probs * (1 - probs))[:, None]).T @ inputs + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curve, slope)
        # A bounded step keeps Newton's method from overshooting where the curve is flat.
        weights = weights - step * min(1.0, 5.0 / (float(np.abs(step).max()) + 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return weights[:-1], float(weights[-1])


@dataclass(frozen=True)
class Calibration:
    """P(right) = sigmoid(weights . inputs + bias). Inputs are the logit of the raw confidence, or the 16 features."""

    method: Literal["temperature", "platt", "quantile", "constant"]
    weights: tuple[float, ...]
    bias: float
    rows: int
    base_rate: float

    def probabilities(self, confidence: Floats) -> Floats:
        """P(right) (n,) of answers with confidence features (n, 16)."""
        if self.method == "constant":
            return np.full(len(confidence), self.base_rate)
        inputs = confidence if self.method == "quantile" else logit(raw_confidence(confidence))[:, None]
        return sigmoid(inputs @ np.array(self.weights) + self.bias)

    def confidence(self, logprobs: Sequence[float], completion_tokens: int) -> float:
        """P(right) of one answer."""
        return float(self.probabilities(confidence_features(logprobs, completion_tokens)[None])[0])

    def save(self, path: Path) -> None:
        """Write JSON, through a temporary file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what ``save`` wrote.

        Raises:
            CogumiError: no such file, or not a calibration.
        """
        mend = "materialize confidence_calibration again"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**{**data, "weights": tuple(float(weight) for weight in data["weights"])})
        except FileNotFoundError:
            raise CogumiError(f"there is no calibration {path}", mend) from None
        except (ValueError, TypeError, KeyError) as error:
            raise CogumiError(f"{path} is not a calibration: {error}", mend) from None
        sizes = {"constant": 0, "temperature": 1, "platt": 1, "quantile": CONFIDENCE_DIMENSIONS}
        numbers = [*found.weights, found.bias, found.base_rate]
        if sizes.get(found.method) != len(found.weights) or not np.isfinite(numbers).all():
            raise CogumiError(f"{path} is not a calibration: {found.method!r} of {len(found.weights)} weights", mend)
        return found


def fit_method(method: Method, confidence: Floats, passed: Floats) -> Calibration:
    """Fit one method on features (n, 16) and labels (n,). Labels of one class give a constant."""
    rate = base_rate(passed)
    if passed.min() == passed.max():
        return Calibration("constant", (), 0.0, len(passed), rate)
    if method == "quantile":
        centre, spread = confidence.mean(axis=0), confidence.std(axis=0)
        spread = np.where(spread > 1e-9, spread, 1.0)
        weights, bias = soft_logistic((confidence - centre) / spread, passed, QUANTILE_PENALTY)
        weights, bias = weights / spread, bias - float(weights @ (centre / spread))
    elif method == "platt":
        # Platt's smoothed targets, so that few rows do not promise certainty.
        right, wrong = passed.sum(), (1 - passed).sum()
        targets = np.where(passed == 1, (right + 1) / (right + 2), 1 / (wrong + 2))
        weights, bias = soft_logistic(logit(raw_confidence(confidence))[:, None], targets, 0.01)
    else:
        inverses = np.geomspace(0.01, 100.0, 401)
        margins = np.outer(inverses, (2 * passed - 1) * logit(raw_confidence(confidence)))
        weights, bias = inverses[[int(np.logaddexp(0.0, -margins).sum(axis=1).argmin())]], 0.0
    return Calibration(method, tuple(float(weight) for weight in weights), float(bias), len(passed), rate)


def log_loss(probs: Floats, passed: Floats) -> float:
    """Mean negative log-likelihood in nats."""
    inside = np.clip(probs, 1e-6, 1 - 1e-6)
    return float(-(passed * np.log(inside) + (1 - passed) * np.log1p(-inside)).mean())


def stratified_folds(examples: Examples, rows: Indices, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Split ``rows`` into (fit, held out) pairs, stratified by domain and label. Equal prompts stay together."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(examples.prompts[row], int(row))

    def order(prompt: str) -> tuple[str, float, str]:
        row = first[prompt]
        return examples.domains[row], examples.passed[row], hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()

    if len(first) < folds:
        raise CogumiError(f"{len(first)} distinct prompts for {folds} folds", "raise routing.examples")
    fold_of = {prompt: place % folds for place, prompt in enumerate(sorted(first, key=order))}
    place = np.array([fold_of[examples.prompts[row]] for row in rows])
    return [(rows[place != fold], rows[place == fold]) for fold in range(folds) if (place == fold).any()]


@dataclass(frozen=True)
class HeldOut:
    """Which rows the shipped model is fitted on, and the (fit, held out) pairs of the report."""

    fit: Indices
    pairs: list[tuple[Indices, Indices]]
    description: str

    @property
    def rows(self) -> Indices:
        return np.sort(np.concatenate([held_out for _, held_out in self.pairs]))

    @property
    def folds(self) -> Indices:
        """Which pair held out each of ``rows`` (n,)."""
        place = {int(row): fold for fold, (_, held_out) in enumerate(self.pairs) for row in held_out}
        return np.array([place[int(row)] for row in self.rows])


def hold_out(examples: Examples, seed: int) -> HeldOut:
    """Keep the test split for the report where it is large enough; else cross-fit the rest as well.

    Rows of the test split are fitted on only when fewer than 20 others exist; the description says so.
    """
    rest, test = np.flatnonzero(~examples.test), np.flatnonzero(examples.test)
    if len(rest) < MIN_ROWS:
        every = np.arange(len(examples))
        said = f"{FOLDS}-fold cross-fitted on {len(every)} rows, rows of the test split among them"
        return HeldOut(every, stratified_folds(examples, every, FOLDS, seed), said)
    if len(test) >= ENOUGH_TEST_ROWS:
        return HeldOut(rest, [(rest, test)], f"the test split: {len(test)} rows, fitted on {len(rest)} others")
    pairs = stratified_folds(examples, rest, FOLDS, seed)
    said = f"{FOLDS}-fold cross-fitted on {len(rest)} rows"
    if len(test):
        pairs.append((rest, test))
        said += f", and {len(test)} rows of the test split"
    return HeldOut(rest, pairs, said)


def choose_and_fit(examples: Examples, rows: Indices, seed: int) -> Calibration:
    """Fit on ``rows`` by the method with the lowest cross-validated log loss among them."""
    confidence, passed = examples.confidence, examples.passed
    losses: dict[Method, float] = {}
    folds = stratified_folds(examples, rows, FOLDS, seed + 1)
    for method in METHODS:
        parts = [
            log_loss(fit_method(method, confidence[fit], passed[fit]).probabilities(confidence[out]), passed[out])
            * len(out)
            for fit, out in folds
        ]
        losses[method] = sum(parts) / len(rows)
    return fit_method(min(METHODS, key=lambda method: losses[method]), confidence[rows], passed[rows])


@dataclass(frozen=True)
class Quality:
    """How good a probability of being right is, on held-out rows, with bootstrap intervals."""

    ece: stats.Estimate
    brier: stats.Estimate
    auroc: stats.Estimate
    aurc: stats.Estimate
    ece_of_perfect: float
    """What a perfectly calibrated predictor would show on as many rows: see ``calibration_noise``."""
    bins: int

    def to_json(self) -> dict[str, Any]:
        return stats.report_json(self)


def bins_for(rows: int) -> int:
    """10 bins where each gets 20 rows; fewer, at least 2, below."""
    return max(2, min(10, rows // ROWS_PER_BIN))


def quality(probs: Floats, passed: Floats, folds: Indices, seed: int) -> Quality:
    """All figures of one probability. Bins are of equal mass; AUROC compares rows of one fold only."""
    rows, bins = np.column_stack([probs, passed, folds]), bins_for(len(probs))

    def estimate(score: Any) -> stats.Estimate:
        return stats.bootstrap(rows, lambda drawn: score(drawn[:, 0], drawn[:, 1]), seed)

    ranked = stats.bootstrap(rows, lambda drawn: stats.auroc(drawn[:, 0], drawn[:, 1], drawn[:, 2]), seed)
    ece = estimate(lambda p, y: stats.expected_calibration_error(p, y, bins))
    noise = stats.calibration_noise(probs, seed, bins)
    return Quality(ece, estimate(stats.brier), ranked, estimate(stats.aurc), noise, bins)


@dataclass(frozen=True)
class CalibrationReport:
    """Before and after calibration on held-out rows, beside what predicting the base rate would get."""

    rows: int
    base_right: stats.Proportion
    held_out: str
    method: str
    before: Quality
    after: Quality
    of_base_rate: Quality
    of_methods: Mapping[str, Quality]
    reliability_before: tuple[stats.ReliabilityBin, ...]
    reliability_after: tuple[stats.ReliabilityBin, ...]
    notes: tuple[str, ...]


def fit_calibration(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[Calibration, CalibrationReport]:
    """Fit the calibration of the base's confidence on ``routing_examples`` and measure it on held-out rows.

    "After" repeats the whole choice of a method inside each fitting part. The base-rate row uses the
    rate of the very rows it is measured on, which favours it.

    Raises:
        CogumiError: fewer than 20 rows, or rows without their fields.
    """
    examples = read_examples(rows)
    plan = hold_out(examples, seed)
    calibration = choose_and_fit(examples, plan.fit, seed)
    predictions = {name: np.full(len(examples), np.nan) for name in ("chosen", *METHODS)}
    for fit, out in plan.pairs:
        predictions["chosen"][out] = choose_and_fit(examples, fit, seed).probabilities(examples.confidence[out])
        for name in METHODS:
            found = fit_method(name, examples.confidence[fit], examples.passed[fit])
            predictions[name][out] = found.probabilities(examples.confidence[out])
    held = plan.rows
    passed, raw = examples.passed[held], raw_confidence(examples.confidence[held])
    after, bins, folds = predictions["chosen"][held], bins_for(len(held)), plan.folds
    report = CalibrationReport(
        rows=len(held),
        base_right=stats.Proportion(int(passed.sum()), len(held)),
        held_out=plan.description,
        method=calibration.method,
        before=quality(raw, passed, np.zeros_like(folds), seed),
        after=quality(after, passed, folds, seed),
        of_base_rate=quality(np.full(len(held), passed.mean()), passed, folds, seed),
        of_methods={name: quality(predictions[name][held], passed, folds, seed) for name in METHODS},
        reliability_before=stats.reliability_bins(raw, passed, bins),
        reliability_after=stats.reliability_bins(after, passed, bins),
        notes=class_notes(examples.passed[plan.fit]),
    )
    log.info("calibration: %s, ECE %.3f -> %.3f", calibration.method, report.before.ece.value, report.after.ece.value)
    return calibration, report


def class_notes(passed: Floats) -> tuple[str, ...]:
    """What a reader must know when the labels teach little."""
    right, wrong = int(passed.sum()), int((1 - passed).sum())
    if min(right, wrong) == 0:
        kind = "right" if right else "wrong"
        return (f"every answer of the base was {kind}: the confidence is a constant and AUROC is undefined",)
    if min(right, wrong) < 10:
        return (f"only {min(right, wrong)} of {right + wrong} answers are of the rarer class: the intervals are wide",)
    return ()
