"""The strategy study: a teacher keeps a journal and distils a strategy; the student learns to execute it."""

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.base.assets import base_checkpoint
from cogumi_dagster.defs.compression.assets import gguf_model
from cogumi_dagster.defs.partitions import strategy_partitions
from cogumi_dagster.defs.strategy import checks
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.modifiers.package import ADAPTER_FILE, export_adapter
from cogumi_dagster.lib.modifiers.train import task_pairs, train_on_served_weights
from cogumi_dagster.lib.strategy.evaluate import ADAPTER, StrategyEvaluation, evaluate_strategy
from cogumi_dagster.lib.strategy.journal import JournalReport, keep_journal
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.strategy.traces import StrategyReport, learn_strategy
from cogumi_dagster.lib.training.lora import TrainingReport


@artifact(
    group="strategy",
    kinds={"gguf", "jsonl"},
    config=("strategy.journal_batches", "strategy.batch_problems"),
    deps=[gguf_model],
    partitions_def=strategy_partitions,
    claims=checks.STRATEGY_JOURNAL,
    code_version="2",
    pool="gpu",
)
def strategy_journal(step: Step) -> JournalReport:
    """The teacher's journal: batches attempted, verdicts seen, strategies written and tried."""
    strategy = step.profile.strategy
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE) as engine:
        return keep_journal(
            engine,
            strategy_family(step.name),
            step.out,
            batches=strategy.journal_batches,
            problems=strategy.batch_problems,
            seed=step.profile.seed,
            progress=step.progress,
        )


@artifact(
    group="strategy",
    kinds={"python", "jsonl"},
    config=("strategy.traces",),
    deps=[strategy_journal],
    partitions_def=strategy_partitions,
    claims=checks.LEARNED_STRATEGY,
    code_version="2",
)
def learned_strategy(step: Step) -> StrategyReport:
    """The strategy as text, and worked traces of it on class-balanced problems. Offline the solver writes both."""
    return learn_strategy(
        step.path("strategy_journal"),
        strategy_family(step.name),
        step.out,
        traces=step.profile.strategy.traces,
        seed=step.profile.seed,
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
    )
    export_adapter(step.out, gguf, checkpoint, step.out / ADAPTER_FILE)
    return report


@artifact(
    group="strategy",
    kinds={"gguf"},
    config=("strategy.test_problems", "strategy.suite_share"),
    deps=[strategy_adapter, gguf_model],
    partitions_def=strategy_partitions,
    claims=checks.STRATEGY_EVALUATION,
    code_version="2",
    pool="gpu",
)
def strategy_evaluation(step: Step) -> StrategyEvaluation:
    """Untrained student, student told the strategy, student with adapter, and teacher, on the same class-balanced
    problems, served."""
    adapters = {ADAPTER: step.path("strategy_adapter") / ADAPTER_FILE}
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE, adapters) as engine:
        return evaluate_strategy(
            engine,
            strategy_family(step.name),
            step.out,
            count=step.profile.strategy.test_problems,
            suite_share=step.profile.strategy.suite_share,
            seed=step.profile.seed,
            progress=step.progress,
        )


ASSETS = [strategy_journal, learned_strategy, strategy_adapter, strategy_evaluation]
