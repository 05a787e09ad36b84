"""Routing: when the base's answer can stand, and which modifier answers where it cannot."""

import dagster as dg

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.compression.assets import gguf_model
from cogumi_dagster.defs.modifiers.assets import modifier_evaluation, packaged_modifier, shipped_adapters
from cogumi_dagster.defs.routing import checks
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.routing.calibration import Calibration, CalibrationReport, fit_calibration
from cogumi_dagster.lib.routing.escalation import EscalationReport, fit_escalation
from cogumi_dagster.lib.routing.examples import RoutingExamplesReport, collect_examples
from cogumi_dagster.lib.routing.router import fit_router
from cogumi_dagster.lib.routing.router_evaluation import RouterReport

EXAMPLES = "examples.jsonl"
CALIBRATION = "calibration.json"
ESCALATION = "escalation.npz"


@artifact(
    group="routing",
    kinds={"gguf", "jsonl"},
    config=(
        "routing.examples", "modifiers.ship", "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    tasks="routed",
    deps=[
        gguf_model,
        dg.AssetDep(packaged_modifier, partition_mapping=dg.AllPartitionMapping()),
        dg.AssetDep(modifier_evaluation, partition_mapping=dg.AllPartitionMapping()),
    ],
    claims=checks.ROUTING_EXAMPLES,
    code_version="5",
    pool="gpu",
)  # fmt: skip
def routing_examples(step: Step) -> RoutingExamplesReport:
    """Base and the modifiers that passed their gate on the same held-out tasks (split validation), with token
    log-probabilities."""
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE, shipped_adapters(step), step.answers) as engine:
        return collect_examples(
            engine,
            step.out,
            count=step.profile.routing.examples,
            seed=step.profile.seed,
            progress=step.progress,
        )


@artifact(
    group="routing",
    kinds={"scikitlearn"},
    deps=[routing_examples],
    claims=checks.CONFIDENCE_CALIBRATION,
)
def confidence_calibration(step: Step) -> CalibrationReport:
    """How sure the base's token log-probabilities are, as a probability of being right."""
    calibration, report = fit_calibration(read_jsonl(step.path("routing_examples") / EXAMPLES), step.profile.seed)
    calibration.save(step.out / CALIBRATION)
    return report


@artifact(
    group="routing",
    kinds={"scikitlearn", "numpy"},
    config=("routing.hidden", "routing.target_accuracy"),
    deps=[routing_examples, confidence_calibration],
    claims=checks.ROUTER_MODEL,
    code_version="2",
)
def router_model(step: Step) -> RouterReport:
    """A 128-64-32-1 network for the probability that the base is right, and the classifier of domains."""
    return fit_router(
        read_jsonl(step.path("routing_examples") / EXAMPLES),
        Calibration.load(step.path("confidence_calibration") / CALIBRATION),
        step.profile.routing,
        step.profile.seed,
        step.out,
    )


@artifact(
    group="routing",
    kinds={"scikitlearn", "numpy"},
    config=("routing.escalation_max_bytes",),
    claims=checks.ESCALATION_DETECTOR,
    code_version="2",
)
def escalation_detector(step: Step) -> EscalationReport:
    """Tells from a user's message that the last answer was not good enough; distilled from sentence embeddings
    to a small table of hashed n-grams."""
    return fit_escalation(
        read_jsonl(step.settings.sources / "escalation.jsonl"),
        step.embeddings.embed,
        step.out / ESCALATION,
        step.profile.seed,
        step.profile.routing.escalation_max_bytes,
    )


ASSETS = [routing_examples, confidence_calibration, router_model, escalation_detector]
