"""From the merged checkpoint to the small file that is served."""

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.base.assets import (
    base_adapter,
    base_checkpoint,
    student_model,
    trained_student,
    trimmed_student,
)
from cogumi_dagster.defs.compression import checks
from cogumi_dagster.defs.dataset.assets import distillation_dataset
from cogumi_dagster.lib.compression.awq import AwqReport, W4A16Report, export_w4a16, fold_awq_scales
from cogumi_dagster.lib.compression.gguf_model import (
    MODEL_FILE,
    FrontierReport,
    GgufReport,
    export_model,
    measure_frontier,
)  # fmt: skip
from cogumi_dagster.lib.compression.gradual import PruningReport, prune
from cogumi_dagster.lib.compression.package import PackageReport, pack
from cogumi_dagster.lib.compression.recover import RecoveryReport, recover
from cogumi_dagster.lib.curation.dataset import training_pairs
from cogumi_dagster.lib.evaluation.gguf_logits import held_out_pairs
from cogumi_dagster.lib.evaluation.parity_chain import Chain, ChainReport, benchmark, check_chain
from cogumi_dagster.lib.training.batches import Pair


def _train(step: Step) -> list[Pair]:
    return training_pairs(step.path("distillation_dataset") / "train.jsonl")


def _held_out(step: Step) -> list[Pair]:
    pairs = training_pairs(step.path("distillation_dataset") / "validation.jsonl")
    return held_out_pairs(pairs, step.profile.compression.perplexity_tokens)


@artifact(
    group="compression",
    kinds={"pytorch", "safetensors"},
    config=("compression.pruning", "compression.perplexity_tokens", "compute.device"),
    deps=[base_checkpoint, distillation_dataset],
    claims=checks.PRUNED_CHECKPOINT,
    code_version="2",
    pool="gpu",
)
def pruned_checkpoint(step: Step) -> PruningReport:
    """The base with its least useful weights at zero, by layer class; over a schedule, trained between its steps."""
    return prune(
        step.path("base_checkpoint"),
        _train(step),
        _held_out(step),
        step.out,
        step.profile.compression.pruning,
        scratch=step.scratch,
        device=step.compute.device,
        seed=step.profile.seed,
        progress=step.progress,
    )


@artifact(
    group="compression",
    kinds={"pytorch", "safetensors"},
    config=("compression.recovery", "compression.perplexity_tokens", "compute.device"),
    deps=[pruned_checkpoint, base_checkpoint, distillation_dataset],
    claims=checks.RECOVERED_CHECKPOINT,
    code_version="2",
    pool="gpu",
)
def recovered_checkpoint(step: Step) -> RecoveryReport:
    """The pruned base after training on its hardest examples, its zeros kept, the unpruned parent as teacher."""
    return recover(
        step.path("pruned_checkpoint"),
        step.path("base_checkpoint"),
        _train(step),
        _held_out(step),
        step.out,
        step.profile.compression.recovery,
        scratch=step.scratch,
        device=step.compute.device,
        seed=step.profile.seed,
        progress=step.progress,
    )


@artifact(
    group="compression",
    kinds={"pytorch", "safetensors"},
    config=("compression.awq", "compression.perplexity_tokens"),
    deps=[recovered_checkpoint, distillation_dataset],
    claims=checks.AWQ_CHECKPOINT,
    code_version="2",
    pool="gpu",
)
def awq_checkpoint(step: Step) -> AwqReport:
    """Activation-aware scales folded into 16-bit weights: the same function, easier to quantize, and the parent
    of both exports."""
    return fold_awq_scales(
        step.path("recovered_checkpoint"), _train(step), _held_out(step), step.out, step.profile.compression.awq
    )


@artifact(
    group="compression",
    kinds={"safetensors"},
    config=("compression.awq", "compression.perplexity_tokens"),
    deps=[awq_checkpoint, distillation_dataset],
    claims=checks.W4A16_CHECKPOINT,
    code_version="2",
    pool="gpu",
)
def w4a16_checkpoint(step: Step) -> W4A16Report:
    """4-bit weights in compressed-tensors form, for vLLM and transformers."""
    return export_w4a16(
        step.path("awq_checkpoint"), _train(step), _held_out(step), step.out, step.profile.compression.awq
    )


@artifact(
    group="compression",
    kinds={"gguf"},
    config=(
        "compression.gguf_type", "compression.imatrix", "compression.budget_mb", "compression.perplexity_tokens",
    ),
    deps=[awq_checkpoint, distillation_dataset],
    claims=checks.GGUF_MODEL,
    code_version="2",
)  # fmt: skip
def gguf_model(step: Step) -> GgufReport:
    """The file that is served: GGUF in the profile's quantization or to its byte budget, held against its 16-bit
    parent."""
    return export_model(
        step.path("awq_checkpoint"),
        _held_out(step),
        step.out,
        step.profile.compression,
        calibration=_train(step),
        seed=step.profile.seed,
        progress=step.progress,
    )


@artifact(
    group="compression",
    kinds={"zstd"},
    config=("compression.zstd_level", "compression.dictionary_kb"),
    deps=[gguf_model],
    claims=checks.PACKAGED_BASE,
    code_version="2",
)
def packaged_base(step: Step) -> PackageReport:
    """The served file packed: its tensors as planes, then zstd, with a dictionary where it pays; unpacked again and
    compared byte for byte."""
    compression = step.profile.compression
    return pack(
        step.path("gguf_model") / MODEL_FILE,
        step.out,
        level=compression.zstd_level,
        dictionary_kb=compression.dictionary_kb,
    )


@artifact(
    group="compression",
    kinds={"gguf"},
    config=(
        "compression.frontier_types", "compression.budget_mb", "compression.perplexity_tokens",
        "compression.zstd_level", "compression.parity_tasks",
    ),
    deps=[awq_checkpoint, gguf_model, distillation_dataset],
    claims=checks.COMPRESSION_FRONTIER,
    code_version="3",
    pool="gpu",
)  # fmt: skip
def compression_frontier(step: Step) -> FrontierReport:
    """Bytes, perplexity, score, speed, zeros kept and zstd ratio of the same parent in each quantization and in the
    served file's mix, and predicted bytes."""
    return measure_frontier(
        step.path("awq_checkpoint"),
        _held_out(step),
        step.out,
        step.profile.compression,
        tasks=benchmark(step.profile.compression.parity_tasks),
        served=step.path("gguf_model"),
        seed=step.profile.seed,
        progress=step.progress,
    )


@artifact(
    group="compression",
    kinds={"json"},
    config=("compression.parity_tasks", "student.trim_vocabulary"),
    deps=[
        student_model, trimmed_student, base_adapter, base_checkpoint, recovered_checkpoint, awq_checkpoint, gguf_model,
        packaged_base,
    ],
    claims=checks.PARITY_CHAIN,
)  # fmt: skip
def parity_chain(step: Step) -> ChainReport:
    """Adapter, merged, recovered, AWQ parent, f16 GGUF, quantized, unpacked and served on the same tasks: ids,
    divergence from link to link, perplexity and score. A broken link names itself and the likely cause."""
    return check_chain(
        Chain(
            student=step.path(trained_student(step)),
            adapter=step.path("base_adapter"),
            merged=step.path("base_checkpoint"),
            recovered=step.path("recovered_checkpoint"),
            awq=step.path("awq_checkpoint"),
            quantized=step.path("gguf_model") / MODEL_FILE,
            package=step.path("packaged_base"),
        ),
        step.out,
        tasks=step.profile.compression.parity_tasks,
        progress=step.progress,
    )


ASSETS = [
    pruned_checkpoint, recovered_checkpoint, awq_checkpoint, w4a16_checkpoint, gguf_model, packaged_base,
    compression_frontier, parity_chain,
]  # fmt: skip
