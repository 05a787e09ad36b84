"""The plan of a student: bytes of all it becomes, training, speed, and what fits a budget. Nothing is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cogumi_dagster.lib.compression.predict import stored_bytes, tensor_types
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.planning.hardware import Device
from cogumi_dagster.lib.planning.losses import pretraining_loss, type_penalty
from cogumi_dagster.lib.planning.shapes import ModelShape
from cogumi_dagster.lib.planning.sizes import (
    TYPES,
    adapter_bytes,
    checkpoint_bytes,
    gguf_adapter_bytes,
    gguf_bytes,
    nf4_bytes,
    w4a16_bytes,
)
from cogumi_dagster.lib.planning.training import (
    DeviceEstimate,
    TrainingRun,
    base_run,
    on_device,
    other_runs,
    sample_texts,
)
from cogumi_dagster.lib.profile import Profile

DECODE_EFFICIENCY = 0.6
"""Assumed share of the memory bandwidth, and of the matrix-product rate, that decoding one stream reaches."""
SMALLEST_BLOCK_BITS = 1.56
"""IQ1_S, llama.cpp's smallest type with published perplexities (x 9 on Llama-3-8B, which it takes to 2.0 in all)."""

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


@dataclass(frozen=True)
class ArtifactSize:
    """One kind of artifact and the bytes of its main file."""

    what: str
    assets: str
    bytes: int


@dataclass(frozen=True)
class TypeSize:
    """The served file in one quantization."""

    type: str
    bytes: int
    bits_per_weight: float
    stored: dict[str, float]
    """Tensor type -> share of the weights: shows where rows do not fit a K-quant's blocks of 256."""
    penalty: float
    """Nats a token lost to 16 bits, by the rule of thumb of ``losses``."""
    loss: float | None
    """With the student's own loss; None where its pretraining tokens are not published."""
    decode: dict[str, float]
    """Device -> tokens a second of one stream, about."""


@dataclass(frozen=True)
class Verdict:
    """A student held against a budget for the served file."""

    student: str
    budget: int
    bits_per_weight: float
    """What the budget leaves for each weight."""
    fitting: tuple[str, ...]
    """Types that fit, best first."""
    smallest_type: str
    smallest_bytes: int
    reason: str


@dataclass(frozen=True)
class Proposal:
    student: str
    parameters: int
    type: str
    bytes: int
    bits_per_weight: float
    loss: float


@dataclass(frozen=True)
class ModelPlan:
    student: str
    profile: str
    parameters: int
    linear_parameters: int
    cache_bytes_per_token: int
    artifacts: tuple[ArtifactSize, ...]
    types: tuple[TypeSize, ...]
    examples: int
    example_tokens: float
    runs: tuple[TrainingRun, ...]
    devices: tuple[DeviceEstimate, ...]
    """Of the first run, the base's."""


def parse_bytes(text: str) -> int:
    """``520MB``, ``1.2 GB`` or ``500MiB`` as bytes; raises CogumiError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)\s*", text, re.IGNORECASE)
    count = round(float(found[1]) * _UNITS[found[2].lower()]) if found and found[2].lower() in _UNITS else 0
    if count <= 0:
        raise CogumiError(f"the budget {text!r} is no size", "give a number and a unit, such as 520MB, 1.2GB or 500MiB")
    return count


def plan_model(shape: ModelShape, profile: Profile, sources: Path, devices: Sequence[Device]) -> ModelPlan:
    """All that a run of ``profile`` would make of a student, on each of ``devices``.

    Raises CogumiError for sources that a run would refuse too.
    """
    texts = sample_texts(profile, sources)
    base = base_run(shape, profile, texts)
    return ModelPlan(
        student=shape.name,
        profile=profile.name,
        parameters=shape.parameters,
        linear_parameters=shape.linear_parameters,
        cache_bytes_per_token=shape.cache_bytes_per_token,
        artifacts=artifact_sizes(shape, profile),
        types=type_sizes(shape, devices),
        examples=texts.examples,
        example_tokens=texts.tokens,
        runs=(base, *other_runs(shape, profile, texts)),
        devices=tuple(on_device(shape, profile.training, base, texts, device) for device in devices),
    )


def artifact_sizes(shape: ModelShape, profile: Profile) -> tuple[ArtifactSize, ...]:
    """Bytes of what is made on the way to the served file, and of the modifiers."""
    awq = profile.compression.awq
    checkpoints = "student_model, base, pruned, recovered and awq checkpoints"
    return (
        ArtifactSize("16-bit checkpoint", checkpoints, checkpoint_bytes(shape)),
        ArtifactSize("QLoRA adapter, float32", "base_adapter", adapter_bytes(shape, profile.training)),
        ArtifactSize("NF4 weights", "in memory while base_adapter trains", nf4_bytes(shape)),
        ArtifactSize(
            f"W4A16, groups of {awq.group_size}",
            "w4a16_checkpoint",
            w4a16_bytes(shape, awq.group_size, symmetric=awq.symmetric),
        ),
        *(
            ArtifactSize(
                f"modifier {name}, rank {rank}",
                "packaged_modifier, before pruning and packing",
                gguf_adapter_bytes(shape, rank),
            )
            for name, rank in profile.modifiers.rank.items()
        ),
    )


def type_sizes(shape: ModelShape, devices: Sequence[Device] = ()) -> tuple[TypeSize, ...]:
    """The served file in every type, largest first."""
    tensors, loss = shape.gguf_tensors, pretraining_loss(shape)
    weights = {name: prod(size) for name, size in tensors.items()}
    rows = []
    for type in TYPES:
        total = gguf_bytes(shape, type)
        kinds = tensor_types(tensors, type)
        stored: dict[str, float] = {}
        for name, kind in kinds.items():
            stored[kind] = stored.get(kind, 0.0) + weights[name] / sum(weights.values())
        penalty = type_penalty(tensors, kinds)
        untied = (
            0 if shape.tie_word_embeddings else stored_bytes(tensors["token_embd.weight"], kinds["token_embd.weight"])
        )
        read = sum(stored_bytes(tensors[name], kind) for name, kind in kinds.items()) - untied
        rows.append(
            TypeSize(
                type=type,
                bytes=total,
                bits_per_weight=8 * total / shape.parameters,
                stored=dict(sorted(stored.items(), key=lambda item: -item[1])),
                penalty=penalty,
                loss=None if loss is None else loss + penalty,
                decode={device.name: _decode(device, read, shape.parameters) for device in devices},
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _decode(device: Device, read: int, parameters: int) -> float:
    """One token reads every weight once and multiplies each once."""
    return DECODE_EFFICIENCY / max(read / device.bandwidth, 2 * parameters / device.flops)


def judge_budget(shape: ModelShape, budget: int) -> Verdict:
    """Which types of a student fit, and why none does where that is so."""
    types = type_sizes(shape)
    fitting = sorted((row for row in types if row.bytes <= budget), key=lambda row: (row.penalty, row.bytes))
    smallest, bits = types[-1], 8 * budget / shape.parameters
    reason = ""
    if not fitting:
        reason = (
            f"{shape.parameters / 1e9:.3g}B weights in {megabytes(budget)} leave {bits:.2g} bits for each; "
            f"the smallest file here, {smallest.type}, takes {megabytes(smallest.bytes)} "
            f"({smallest.bits_per_weight:.2f} bits)"
        )
        if bits < SMALLEST_BLOCK_BITS:
            reason += f", and llama.cpp's coarsest measured type, IQ1_S, {SMALLEST_BLOCK_BITS} bits before any overhead"
    return Verdict(
        student=shape.name,
        budget=budget,
        bits_per_weight=bits,
        fitting=tuple(row.type for row in fitting),
        smallest_type=smallest.type,
        smallest_bytes=smallest.bytes,
        reason=reason,
    )


def propose(shapes: Sequence[ModelShape], budget: int) -> list[Proposal]:
    """Every student and type that fit a budget, lowest predicted loss first."""
    found = [
        Proposal(shape.name, shape.parameters, row.type, row.bytes, row.bits_per_weight, row.loss)
        for shape in shapes
        for row in type_sizes(shape)
        if row.bytes <= budget and row.loss is not None
    ]
    return sorted(found, key=lambda proposal: (proposal.loss, proposal.bytes))


def megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
