"""What is shipped: the bundle, its evaluation as a system, and the report."""

from dataclasses import replace

import dagster as dg

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.base.assets import base_checkpoint, student_model
from cogumi_dagster.defs.compression.assets import (
    compression_frontier,
    gguf_model,
    packaged_base,
    parity_chain,
    w4a16_checkpoint,
)
from cogumi_dagster.defs.deployment import checks
from cogumi_dagster.defs.modifiers.assets import gates_passed, modifier_evaluation, packaged_modifier, shipped_adapters
from cogumi_dagster.defs.routing.assets import ESCALATION, escalation_detector, router_model
from cogumi_dagster.defs.strategy.assets import strategy_evaluation
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.evaluation.system import SystemReport, evaluate_system
from cogumi_dagster.lib.modifiers.package import tokenizer_files
from cogumi_dagster.lib.report.card import CardReport, write_card
from cogumi_dagster.lib.routing.escalation import EscalationDetector
from cogumi_dagster.lib.routing.router import Router
from cogumi_dagster.lib.serving.answering import SERVED_TOKENS, Assistant
from cogumi_dagster.lib.serving.bundle import BundleReport, open_bundle, write_bundle

BUNDLE = "bundle"


@artifact(
    group="deployment",
    kinds={"gguf", "json"},
    deps=[
        gguf_model,
        parity_chain,
        base_checkpoint,
        dg.AssetDep(packaged_modifier, partition_mapping=dg.AllPartitionMapping()),
        dg.AssetDep(modifier_evaluation, partition_mapping=dg.AllPartitionMapping()),
        router_model,
        escalation_detector,
    ],
    config=("modifiers.ship", "taught_tokens"),
    claims=checks.SERVING_BUNDLE,
    code_version="3",
)
def serving_bundle(step: Step) -> BundleReport:
    """One folder with a manifest: base, the modifiers that passed their gate, router, escalation detector, and every
    hash and contract."""
    adapters = shipped_adapters(step)
    report = write_bundle(
        step.out / BUNDLE,
        base_gguf=step.path("gguf_model") / MODEL_FILE,
        adapters=adapters,
        contracts={},  # each adapter carries its own in its metadata
        router_dir=step.path("router_model"),
        escalation=step.path("escalation_detector") / ESCALATION,
        tokenizer_files=tokenizer_files(step.path("base_checkpoint")),
        card={
            "profile": step.profile.name,
            "artifacts": step.versions(),
            # at least what its router was calibrated with
            "answer_tokens": max(SERVED_TOKENS, step.profile.taught_tokens),
        },
    )
    open_bundle(step.out / BUNDLE, verify=True)
    passed = gates_passed(step)
    return replace(report, gate_not_passed=tuple(name for name in adapters if not passed[name]))


@artifact(
    group="deployment",
    kinds={"gguf"},
    config=(
        "routing.examples", "humaneval_problems", "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    tasks="routed",
    deps=[serving_bundle],
    claims=checks.SYSTEM_EVALUATION,
    code_version="5",
    pool="gpu",
)  # fmt: skip
def system_evaluation(step: Step) -> SystemReport:
    """The served system on fresh test tasks against the base alone, each modifier, the oracle and the teacher."""
    bundle = open_bundle(step.path("serving_bundle") / BUNDLE)
    router = Router.load(bundle.router_dir)
    with step.inference.engine(bundle.base_gguf, bundle.adapters, step.answers) as engine:
        assistant = Assistant(engine, router, EscalationDetector.load(bundle.escalation), bundle.answer_tokens)
        return evaluate_system(
            engine,
            router,
            assistant,
            step.out,
            count=step.profile.routing.examples,
            humaneval=step.profile.humaneval_problems,
            seed=step.profile.seed,
            progress=step.progress,
        )


@artifact(
    group="deployment",
    kinds={"html", "markdown"},
    deps=[
        student_model,
        w4a16_checkpoint,
        packaged_base,
        compression_frontier,
        dg.AssetDep(modifier_evaluation, partition_mapping=dg.AllPartitionMapping()),
        dg.AssetDep(strategy_evaluation, partition_mapping=dg.AllPartitionMapping()),
        system_evaluation,
    ],
    reports=True,
    claims=checks.MODEL_CARD,
    code_version="4",
)
def model_card(step: Step) -> CardReport:
    """The report: every artifact, every check with its figure, and the plots, as HTML and Markdown."""
    refs = [ref for ref in step.store.artifacts() if ref.manifest.asset != "model_card"]
    return write_card(refs, step.profile, step.out, sources=step.settings.sources)


ASSETS = [serving_bundle, system_evaluation, model_card]
