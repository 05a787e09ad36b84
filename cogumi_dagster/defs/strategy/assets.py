"""The strategy study: a teacher keeps a journal and distils a strategy; the student learns to execute it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from cogumi_dagster.defs.artifact import PRICES, Step, artifact
from cogumi_dagster.defs.base.assets import base_checkpoint
from cogumi_dagster.defs.compression.assets import gguf_model
from cogumi_dagster.defs.partitions import strategy_partitions
from cogumi_dagster.defs.strategy import checks
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.compression.quantize import unquantize_file
from cogumi_dagster.lib.modifiers.package import ADAPTER_FILE, export_adapter
from cogumi_dagster.lib.modifiers.train import task_pairs, train_on_served_weights
from cogumi_dagster.lib.strategy.evaluate import (
    ADAPTER,
    StrategyEvaluation,
    answer_stages,
    ask_teacher,
    evaluate_strategy,
)
from cogumi_dagster.lib.strategy.journal import JournalReport, keep_journal
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.strategy.teacher import CatalogueTeacher, SolverTeacher, StrategyTeacher
from cogumi_dagster.lib.strategy.traces import STRATEGY_FILE, StrategyReport, learn_strategy
from cogumi_dagster.lib.teaching.asking import Asker
from cogumi_dagster.lib.teaching.teach import settle_doubts
from cogumi_dagster.lib.training.lora import TrainingReport
from cogumi_dagster.lib.training.student import package_version


@contextmanager
def _teacher(step: Step) -> Iterator[StrategyTeacher | None]:
    """The profile's teacher where it is one of the catalogue; None for the solver."""
    teaching, name = step.profile.teaching, step.profile.strategy.teacher
    teacher = step.teachers.catalogue.get(name)
    if teacher.provider == "solver":
        yield None
        return
    with step.teachers.journal(step.store.root, step.run_id) as journal, step.teachers.local() as local:
        settle_doubts(journal, teaching.on_doubt)
        asker = Asker(
            step.teachers.catalogue, journal, local, cap_usd=teaching.max_usd_per_run, on_doubt=teaching.on_doubt,
            concurrency=teaching.concurrency, engine_version=package_version(),
        )  # fmt: skip
        yield CatalogueTeacher(asker, teacher, teaching.max_tokens)


@artifact(
    group="strategy",
    kinds={"gguf", "jsonl"},
    config=(
        "strategy.journal_batches", "strategy.batch_problems", "strategy.distil_every",
        "teaching.max_tokens", "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    asks=("strategy.teacher",),
    tasks="strategy",
    deps=[gguf_model],
    partitions_def=strategy_partitions,
    claims=checks.STRATEGY_JOURNAL,
    code_version="11",
    pool="gpu",
    retry_policy=dg.RetryPolicy(max_retries=2, delay=20, backoff=dg.Backoff.EXPONENTIAL),
)  # fmt: skip
def strategy_journal(step: Step) -> JournalReport:
    """The teacher's journal: batches attempted, verdicts seen, strategies written and tried. Offline the solver is the
    teacher: the student attempts, and the solver's strategies are tried on it."""
    strategy, family = step.profile.strategy, strategy_family(step.name)

    def keep(teacher: StrategyTeacher) -> JournalReport:
        return keep_journal(
            teacher,
            family,
            step.out,
            batches=strategy.journal_batches,
            problems=strategy.batch_problems,
            distil_every=strategy.distil_every,
            seed=step.profile.seed,
            progress=step.progress,
        )

    with _teacher(step) as teacher:
        if teacher is not None:
            return keep(teacher)
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE, kept=step.answers) as engine:
        return keep(SolverTeacher(engine, family))


@artifact(
    group="strategy",
    kinds={"python", "jsonl"},
    config=("strategy.traces", "strategy.test_problems", "strategy.suite_share", "teaching.max_tokens"),
    asks=("strategy.teacher",),
    tasks="strategy",
    deps=[strategy_journal],
    partitions_def=strategy_partitions,
    claims=checks.LEARNED_STRATEGY,
    code_version="12",
    retry_policy=dg.RetryPolicy(max_retries=2, delay=20, backoff=dg.Backoff.EXPONENTIAL),
)
def learned_strategy(step: Step) -> StrategyReport:
    """The strategy as text, and worked traces of it on training problems, each accepted by its verifier. Offline the
    solver writes both."""
    strategy, family, seed = step.profile.strategy, strategy_family(step.name), step.profile.seed
    with _teacher(step) as teacher:
        return learn_strategy(
            step.path("strategy_journal"),
            family,
            step.out,
            traces=strategy.traces,
            apart=family.measured_on(strategy.test_problems, strategy.suite_share, seed),
            teacher=teacher,
            seed=seed,
            progress=step.progress,
        )


@artifact(
    group="strategy",
    kinds={"pytorch", "peft", "gguf"},
    config=("strategy.training", "compute.device"),
    deps=[learned_strategy, gguf_model, base_checkpoint],
    partitions_def=strategy_partitions,
    claims=checks.STRATEGY_ADAPTER,
    pool="gpu",
)
def strategy_adapter(step: Step) -> TrainingReport:
    """A LoRA that makes the served student execute the strategy, trained on the traces; also as GGUF."""
    gguf, checkpoint = step.path("gguf_model") / MODEL_FILE, step.path("base_checkpoint")
    report = train_on_served_weights(
        gguf,
        checkpoint,
        task_pairs(step.path("learned_strategy") / "traces.jsonl"),
        step.out,
        step.profile.strategy.training,
        scratch=step.scratch,
        device=step.compute.device,
        processes=step.profile.compute.processes,
        seed=step.profile.seed,
        progress=step.progress,
        section="strategy.training",
    )
    export_adapter(step.out, gguf, checkpoint, step.out / ADAPTER_FILE)
    return report


@artifact(
    group="strategy",
    kinds={"gguf"},
    config=(
        "strategy.test_problems", "strategy.batch_problems", "strategy.suite_share", "strategy.machine_usd_per_hour",
        "teaching.max_tokens", "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    asks=("strategy.teacher", PRICES),
    tasks="strategy",
    deps=[learned_strategy, strategy_adapter, gguf_model],
    partitions_def=strategy_partitions,
    claims=checks.STRATEGY_EVALUATION,
    code_version="11",
    pool="gpu",
    retry_policy=dg.RetryPolicy(max_retries=2, delay=20, backoff=dg.Backoff.EXPONENTIAL),
)  # fmt: skip
def strategy_evaluation(step: Step) -> StrategyEvaluation:
    """Untrained student, student told the strategy, student with adapter (served, and on the base's weights in 16 bit),
    and teacher (also told its strategy, where it is a model), on the same class-balanced problems."""
    strategy, seed = step.profile.strategy, step.profile.seed
    (adapter,), (learned,) = step.inputs["strategy_adapter"].values(), step.inputs["learned_strategy"].values()
    adapters, family = {ADAPTER: adapter.path / ADAPTER_FILE}, strategy_family(step.name)
    text = json.loads((learned.path / STRATEGY_FILE).read_text())["text"]
    base, whole = step.path("gguf_model") / MODEL_FILE, step.scratch / "16-bit.gguf"
    count = strategy.test_problems
    with _teacher(step) as teacher:
        taught = ask_teacher(teacher, family, text, count=count, seed=seed, progress=step.progress) if teacher else None
    unquantize_file(base, whole)
    with step.inference.engine(whole, adapters, step.answers, made_for=base) as engine:
        unquantized = answer_stages(engine, family, count=count, seed=seed)
    with step.inference.engine(base, adapters, step.answers) as engine:
        return evaluate_strategy(
            engine,
            family,
            step.out,
            strategy=text,
            batch=strategy.batch_problems,
            unquantized=unquantized,
            taught=taught,
            count=count,
            suite_share=strategy.suite_share,
            training_seconds=adapter.manifest.metrics["report"]["seconds"],
            teaching_usd=learned.manifest.metrics["report"]["usd"],
            machine_usd_per_hour=strategy.machine_usd_per_hour,
            prices=step.teachers.catalogue.prices(),
            seed=seed,
            progress=step.progress,
        )


ASSETS = [strategy_journal, learned_strategy, strategy_adapter, strategy_evaluation]
