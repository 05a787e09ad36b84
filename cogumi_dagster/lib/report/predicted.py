"""What the planner said before a run, beside what the run made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactRef
from cogumi_dagster.lib.planning.hardware import CPU_UTILIZATION, this_machine
from cogumi_dagster.lib.planning.shapes import ModelShape, read_folder
from cogumi_dagster.lib.planning.sizes import (
    TYPES,
    adapter_bytes,
    checkpoint_bytes,
    gguf_adapter_bytes,
    gguf_bytes,
    w4a16_bytes,
)
from cogumi_dagster.lib.planning.training import base_run, on_device, sample_texts
from cogumi_dagster.lib.profile import LoraConfig, Profile

CHECKPOINTS = ("base_checkpoint", "pruned_checkpoint", "recovered_checkpoint", "awq_checkpoint")


@dataclass(frozen=True)
class Comparison:
    """One figure of one artifact. Bytes are predicted exactly; a run's length at most; its time roughly."""

    artifact: str
    figure: str
    predicted: float
    actual: float

    @property
    def error(self) -> float:
        """Predicted over actual, less one."""
        return self.predicted / self.actual - 1


def compare_bytes(refs: Sequence[ArtifactRef], profile: Profile) -> list[Comparison]:
    """Bytes of every artifact whose size follows from the student's shapes; none where there is no student."""
    found = {(ref.manifest.asset, ref.manifest.partition): ref for ref in refs}
    rows = []
    student = _shape(found.get(("student_model", None)))
    trained = _shape(found.get(("trimmed_student", None))) if profile.student.trim_vocabulary else student
    if student is not None:
        rows += _weights(found[("student_model", None)], checkpoint_bytes(student))
    for (asset, _), ref in found.items():
        if trained is not None:
            rows += _of_asset(asset, ref, trained, profile)
    return rows


def compare_training(refs: Sequence[ArtifactRef], profile: Profile, sources: Path) -> list[Comparison]:
    """Tokens, steps and, on a CPU, memory and time of the base adapter's training."""
    adapter = next((ref for ref in refs if ref.manifest.asset == "base_adapter"), None)
    student = next((ref for ref in refs if ref.manifest.asset == "student_model"), None)
    shape = _shape(student)
    report = _report(adapter) if adapter else {}
    if shape is None or "steps" not in report:
        return []
    texts = sample_texts(profile, sources)
    run = base_run(shape, profile, texts)
    rows = [
        Comparison("base_adapter", "tokens, at most", run.tokens, report["tokens"]),
        Comparison("base_adapter", "steps, at most", run.steps, report["steps"]),
    ]
    if profile.compute.device == "cpu":
        machine = this_machine()
        rate = report.get("machine_flops_per_second") or machine.flops  # as it was just after the run, or as it is
        memory = on_device(shape, profile.training, run, texts, machine)
        needed = memory.bytes_checkpointed if memory.checkpointing else memory.bytes_plain
        rows.append(Comparison("base_adapter", "peak memory, bytes", needed, report.get("peak_memory_bytes", 0)))
        seconds = run.flops / (CPU_UTILIZATION * rate)
        rows.append(Comparison("base_adapter", "seconds, at most about", seconds, report["seconds"]))
    return [row for row in rows if row.actual]


def _of_asset(asset: str, ref: ArtifactRef, shape: ModelShape, profile: Profile) -> list[Comparison]:
    if asset in CHECKPOINTS:
        return _weights(ref, checkpoint_bytes(shape))
    if asset == "w4a16_checkpoint":
        awq = profile.compression.awq
        return _weights(ref, w4a16_bytes(shape, awq.group_size, symmetric=awq.symmetric))
    if asset == "compression_frontier":
        weighted = profile.compression.imatrix or profile.compression.budget_mb is not None
        return [
            Comparison(asset, f"bytes, {row['type']}", gguf_bytes(shape, row["type"], imatrix=weighted), row["bytes"])
            for row in _report(ref).get("rows", ())
            if row["type"] in TYPES
        ]
    if asset == "gguf_model":
        kind = _report(ref).get("export", {}).get("type")
        imatrix = bool(_report(ref).get("imatrix_tokens"))
        return _files(ref, "model.gguf", gguf_bytes(shape, kind, imatrix=imatrix)) if kind in TYPES else []
    training = _training(asset, ref.manifest.partition, profile)
    if training is None:
        return []
    if asset == "packaged_modifier" and _report(ref).get("pruning", {}).get("chosen"):
        return []  # what pruning leaves is no matter of shapes
    if asset == "packaged_modifier":
        return _files(ref, "modifier.gguf", gguf_adapter_bytes(shape, training.rank_attention))
    return _weights(ref, adapter_bytes(shape, training))


def _training(asset: str, partition: str | None, profile: Profile) -> LoraConfig | None:
    """The ranks with which an asset's adapter was trained; None where it is none."""
    if asset == "base_adapter":
        return profile.training
    if asset == "strategy_adapter":
        return profile.strategy.training
    rank = profile.modifiers.rank.get(partition) if partition else None  # type: ignore[call-overload]
    if asset not in ("modifier_adapter", "packaged_modifier") or rank is None:
        return None
    return profile.modifiers.training.of_rank(rank)


def _weights(ref: ArtifactRef, predicted: int) -> list[Comparison]:
    return _files(ref, ".safetensors", predicted)


def _files(ref: ArtifactRef, ending: str, predicted: int) -> list[Comparison]:
    """The artifact's files of a kind together; nothing where it has none."""
    manifest = ref.manifest
    actual = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(ending))
    label = f"{manifest.asset}[{manifest.partition}]" if manifest.partition else manifest.asset
    return [Comparison(label, "bytes", predicted, actual)] if actual else []


def _shape(ref: ArtifactRef | None) -> ModelShape | None:
    return read_folder(ref.path) if ref is not None and (ref.path / "config.json").is_file() else None


def _report(ref: ArtifactRef) -> Mapping[str, Any]:
    found: Mapping[str, Any] = ref.manifest.metrics.get("report", {})
    return found
