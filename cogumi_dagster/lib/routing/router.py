"""The router: keep the base's answer, or ask the modifier of the prompt's domain.

A network and the calibration each give P(the base is right); a blend of the two is the confidence. Below
the domain's threshold the modifier answers. Thresholds are versioned with the weights: they hold for them
only (RouteLLM#36).
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import RoutingConfig
from cogumi_dagster.lib.routing import calibration as cal
from cogumi_dagster.lib.routing.features import (
    FEATURES,
    HASH_DIMENSIONS,
    TEXT_DIMENSIONS,
    Examples,
    Floats,
    confidence_features,
    fold_text,
    hash_text,
    read_examples,
)
from cogumi_dagster.lib.routing.network import (
    DomainClassifier,
    Network,
    checked_array,
    fit_domains,
    fit_network,
)
from cogumi_dagster.lib.routing.router_evaluation import HeldOutRouting, RouterReport, report_routing

log = logging.getLogger(__name__)

BASE = "base"
INNER_FOLDS = 3
POOLED_WEIGHT = 10.0
"""All domains together count as this many rows in a domain's choice of threshold: its own few rows are noisy."""

TIMED_CALLS = 200


@dataclass(frozen=True)
class Decision:
    """Who answers. ``confidence`` is P(the base's answer is right); ``modifier`` is the domain's, used or not."""

    route: str
    confidence: float
    modifier: str | None
    domain: str
    threshold: float
    seconds: float


@dataclass(frozen=True)
class Blend:
    """P(right) = sigmoid(network * logit + calibration * logit + bias): two opinions, weighed on held-out rows."""

    network: float
    calibration: float
    bias: float

    def probabilities(self, of_network: Floats, of_calibration: Floats) -> Floats:
        logits = self.network * cal.logit(of_network) + self.calibration * cal.logit(of_calibration) + self.bias
        return cal.sigmoid(logits)


@dataclass(frozen=True)
class Router:
    """Everything that a decision needs, immutable: calls from many threads are safe."""

    network: Network
    classifier: DomainClassifier
    calibration: cal.Calibration
    blend: Blend
    thresholds: Mapping[str, float]
    modifiers: Mapping[str, str | None]
    hidden: tuple[int, ...]

    def confidences(self, features: Floats) -> Floats:
        """P(the base is right) (n,) from features (n, 128)."""
        calibrated = self.calibration.probabilities(features[:, TEXT_DIMENSIONS:])
        return self.blend.probabilities(self.network.probabilities(features), calibrated)

    def decide(self, prompt: str, logprobs: Sequence[float], completion_tokens: int) -> Decision:
        """Decide on an answer that the base has given. An answer without log-probabilities has confidence 0."""
        start = time.perf_counter()
        hashed = hash_text(prompt, HASH_DIMENSIONS)
        confidence = 0.0
        if len(logprobs):
            features = np.concatenate([fold_text(hashed), confidence_features(logprobs, completion_tokens)])
            confidence = float(self.confidences(features[None])[0])
        domain = self.classifier.choose(hashed)
        route = self.route(domain, confidence) or BASE
        modifier, threshold = self.modifiers[domain], self.thresholds[domain]
        return Decision(route, confidence, modifier, domain, threshold, time.perf_counter() - start)

    def route(self, domain: str, confidence: float) -> str | None:
        """The modifier that answers, or None to keep the base's answer."""
        return self.modifiers[domain] if confidence < self.thresholds[domain] else None

    def save(self, folder: Path) -> None:
        """Write weights.npz, calibration.json and router.json."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            **self.network.to_arrays(),
            "domain_weights": self.classifier.weights.astype(np.float16),
            "domain_bias": self.classifier.bias,
        }
        np.savez_compressed(folder / "weights.npz", **arrays)
        self.calibration.save(folder / "calibration.json")
        card = {
            "features": FEATURES,
            "hidden": list(self.hidden),
            "domains": list(self.classifier.domains),
            "modifiers": dict(self.modifiers),
            "thresholds": dict(self.thresholds),
            "blend": [self.blend.network, self.blend.calibration, self.blend.bias],
        }
        temporary = folder / f".router.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, folder / "router.json")

    @classmethod
    def load(cls, folder: Path) -> "Router":
        """Read what ``save`` wrote.

        Raises:
            CogumiError: a file is missing or broken, or the router was trained on other features.
        """
        mend = "materialize router_model again"
        try:
            card = json.loads((folder / "router.json").read_text(encoding="utf-8"))
            with np.load(folder / "weights.npz", allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            if card["features"] != FEATURES:
                raise CogumiError(f"{folder} reads features {card['features']!r}, this version {FEATURES!r}", mend)
            hidden, domains = tuple(int(size) for size in card["hidden"]), tuple(str(name) for name in card["domains"])
            weights = checked_array(arrays, "domain_weights", (len(domains), HASH_DIMENSIONS))
            return cls(
                network=Network.from_arrays(arrays, hidden),
                classifier=DomainClassifier(domains, weights, checked_array(arrays, "domain_bias", (len(domains),))),
                calibration=cal.Calibration.load(folder / "calibration.json"),
                blend=Blend(*(float(value) for value in card["blend"])),
                thresholds={name: float(card["thresholds"][name]) for name in domains},
                modifiers={name: card["modifiers"][name] for name in domains},
                hidden=hidden,
            )
        except FileNotFoundError as error:
            raise CogumiError(f"the router in {folder} lacks {Path(str(error.filename)).name}", mend) from None
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            raise CogumiError(f"the router in {folder} is broken: {error!r}", mend) from None


def fit_router(
    rows: Sequence[Mapping[str, Any]], calibration: cal.Calibration, config: RoutingConfig, seed: int, out: Path
) -> RouterReport:
    """Fit a router on ``routing_examples``, save it in the folder ``out``, and measure it on held-out rows.

    Each reported row is decided by a router that did not see it, calibration, blend and thresholds included.

    Raises:
        CogumiError: fewer than 20 rows, rows without their fields, a domain with two modifiers.
    """
    examples = read_examples(rows)
    plan = cal.hold_out(examples, seed)
    confidence = np.full((len(examples), 3), np.nan)
    routes: list[str | None] = [None] * len(examples)
    domains = [""] * len(examples)
    for fit, held in plan.pairs:
        found = build_router(examples, fit, None, config, seed)
        features = examples.features[held]
        confidence[held, 0] = found.confidences(features)
        confidence[held, 1] = found.network.probabilities(features)
        confidence[held, 2] = found.calibration.probabilities(examples.confidence[held])
        for row in held:
            domains[row] = found.classifier.choose(examples.hashed[row])
            routes[row] = found.route(domains[row], confidence[row, 0])
    build_router(examples, plan.fit, calibration, config, seed).save(out)
    router = Router.load(out)
    held_out = HeldOutRouting(plan.rows, plan.folds, confidence, tuple(routes), tuple(domains))
    report = report_routing(
        examples,
        held_out,
        seed,
        description=plan.description,
        thresholds=router.thresholds,
        parameters=router.network.parameters,
        bytes_saved=sum(path.stat().st_size for path in out.iterdir() if path.is_file()),
        seconds=_time_decisions(router, rows),
        notes=cal.class_notes(examples.passed[plan.fit]),
    )
    log.info("router: AUROC %.3f, routed %.3f, base %.3f", report.of_router.auroc.value, *report.headline)
    return report


def _time_decisions(router: Router, rows: Sequence[Mapping[str, Any]]) -> Floats:
    """Seconds (200,) of ``decide`` on the rows' own prompts, after 20 calls to warm up."""
    calls = [rows[i % len(rows)] for i in range(TIMED_CALLS + 20)]
    found = [
        router.decide(row["prompt"], row["base"]["logprobs"], row["base"]["completion_tokens"]).seconds for row in calls
    ]
    return np.array(found[20:])


def build_router(
    examples: Examples, rows: Any, calibration: cal.Calibration | None, config: RoutingConfig, seed: int
) -> Router:
    """Fit a router on ``rows`` (indices). Blend and thresholds come from an inner cross-fit of the same rows.

    ``calibration`` None fits one on the rows: what a report must do, since the given one has seen all rows.
    """
    features, passed = examples.features, examples.passed
    inner = np.full((len(examples), 2), np.nan)
    for fit, out in cal.stratified_folds(examples, rows, INNER_FOLDS, seed + 2):
        inner[out, 0] = fit_network(features[fit], passed[fit], config.hidden, seed).probabilities(features[out])
        inner[out, 1] = cal.choose_and_fit(examples, fit, seed).probabilities(examples.confidence[out])
    blend = fit_blend(inner[rows], passed[rows])
    modifiers = _modifiers_by_domain(examples)
    confidence = blend.probabilities(inner[rows, 0], inner[rows, 1])
    return Router(
        network=fit_network(features[rows], passed[rows], config.hidden, seed),
        classifier=fit_domains(examples.hashed[rows], [examples.domains[row] for row in rows]),
        calibration=calibration or cal.choose_and_fit(examples, rows, seed),
        blend=blend,
        thresholds=choose_thresholds(examples, rows, confidence, modifiers, config.target_accuracy),
        modifiers=modifiers,
        hidden=tuple(config.hidden),
    )


def fit_blend(opinions: Floats, passed: Floats) -> Blend:
    """Weigh held-out opinions (n, 2). One that would count against itself is left out."""
    if passed.min() == passed.max():
        return Blend(0.0, 0.0, float(cal.logit(np.array([cal.base_rate(passed)]))[0]))
    logits = cal.logit(opinions)
    weights, bias = cal.soft_logistic(logits, passed, 1.0)
    if weights.min() < 0:
        kept = int(np.argmax(weights))
        alone, bias = cal.soft_logistic(logits[:, [kept]], passed, 1.0)
        weights = np.where(np.arange(2) == kept, max(float(alone[0]), 0.0), 0.0)
    return Blend(float(weights[0]), float(weights[1]), bias)


def _modifiers_by_domain(examples: Examples) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for domain, modifier in zip(examples.domains, examples.own_modifiers, strict=True):
        if found.setdefault(domain, modifier) != modifier:
            raise CogumiError(
                f"domain {domain!r} has two modifiers: {found[domain]!r} and {modifier!r}",
                "give each domain one responsible modifier",
            )
    return found


def choose_thresholds(
    examples: Examples, rows: Any, confidence: Floats, modifiers: Mapping[str, str | None], target: float
) -> dict[str, float]:
    """For each domain, the lowest threshold in [0, target] with the most right answers on ``rows``.

    So the base keeps every answer that is right with probability ``target`` or more, and keeps others
    where its modifier gained nothing. A domain without a modifier has threshold 0.
    """
    gain = np.array([examples.own_passed(row) - examples.passed[row] for row in rows])
    domain = np.array([examples.domains[row] for row in rows])
    pool = np.array([modifiers[name] is not None for name in domain], dtype=bool)
    grid = np.linspace(0.0, target, 101)

    def gains(chosen: Any) -> Floats:
        return np.array([gain[chosen & (confidence < at)].sum() for at in grid])

    pooled = gains(pool) * POOLED_WEIGHT / max(int(pool.sum()), 1)
    return {
        name: float(grid[int(np.argmax(gains(domain == name) + pooled))]) if modifier is not None else 0.0
        for name, modifier in modifiers.items()
    }
