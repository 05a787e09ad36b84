"""LoRA and QLoRA training: what the base, the modifiers and the strategies have in common."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.flops import matmul_rate
from cogumi_dagster.lib.training.fused_lora import fuse_lora
from cogumi_dagster.lib.training.loop import Loop, evaluation_loss
from cogumi_dagster.lib.training.memory import PeakMemory, fits_unpacked, memory_limit
from cogumi_dagster.lib.training.packing import MOST_SKIPS, attention_for_packed_rows
from cogumi_dagster.lib.training.precision import compute_dtype
from cogumi_dagster.lib.training.workers import Workers

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a kernel that is fetched from a hub

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

Curve = tuple[tuple[int, float], ...]
"""(step, value)."""


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did. Losses are means over supervised tokens; speed excludes loading and evaluation."""

    examples: int
    too_long: int
    steps: int
    resumed_from: int
    stopped_early: bool
    tokens: int
    supervised_tokens: int
    trainable_parameters: int
    loss_first: float
    loss_last: float
    """Mean of the first and of the last fifth of the steps."""
    validation_loss_before: float
    validation_loss_after: float
    validation_examples: int
    tokens_per_second: float
    seconds: float
    flops_per_second: float
    machine_flops_per_second: float
    """Of a matrix product in the run's precision and the model's shapes, measured just after the run."""
    utilization: float
    """The run's share of the machine's rate."""
    peak_memory_bytes: int
    """Of this process from loading to the last step; on a GPU of what is there."""
    precision: str
    row_tokens: int
    notes: tuple[str, ...]
    curve: Curve
    curves: dict[str, Curve]


def load_base(checkpoint: Path, *, four_bit: bool, device: str) -> tuple[Any, Any]:
    """(model, tokenizer), frozen, with attention for packed rows; ``four_bit``: NF4, quantized doubly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = compute_dtype(device)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        if four_bit
        else None
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation=attention_for_packed_rows(),
        local_files_only=True,
    )
    model.config.use_cache = False
    for module in model.modules():
        # with AVX512-BF16, bitsandbytes packs a layer anew when it is first evaluated, for a kernel without gradients
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.set_grad_enabled(True)
    return model, AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def unpack_four_bit(model: Any, memory_bytes: int) -> int:
    """Replace a frozen model's NF4 layers by plain ones with the same values, where they fit ``memory_bytes``.

    Returns how many. Where they do not fit, every pass unpacks them anew.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    layers = (model.get_submodule(name) for name in names)
    if not fits_unpacked(sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers), memory_bytes):
        return 0
    for name in names:  # one at a time: a packed layer is freed as its plain one takes its place
        module = model.get_submodule(name)
        values = dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[attr-defined]
        values = values.to(module.compute_dtype)
        with torch.device("meta"):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight, plain.bias = torch.nn.Parameter(values, requires_grad=False), module.bias
        model.set_submodule(name, plain)
    return len(names)


def train_lora(
    checkpoint: Path,
    pairs: Sequence[Pair],
    out: Path,
    config: LoraConfig,
    *,
    validation: Sequence[Pair] = (),
    scratch: Path,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    workers: Workers | None = None,
    section: str = "training",
) -> TrainingReport:
    """Train an adapter on ``pairs`` and save it to ``out`` in PEFT's form.

    ``scratch`` keeps the checkpoints: a killed run resumes from the newest valid one and takes the same steps.
    ``workers`` is this process's place among several that all call this; the first one writes. ``section`` of the
    profile, which ``config`` is, is named in errors.

    Raises:
        CogumiError: nothing to train on, positions beyond the student's context, a step without
            supervised tokens, a loss that is not finite or explodes.
    """
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    if not pairs:
        raise CogumiError("there is no example to train on", "look at the drops of what this trains on")
    workers = workers or Workers()
    peak = PeakMemory(device)
    model, tokenizer = load_base(checkpoint, four_bit=config.load_in_4bit, device=device)
    unpacked = config.load_in_4bit and device == "cpu" and unpack_four_bit(model, memory_limit()) > 0
    encoded, too_long = encode_pairs(tokenizer, pairs, config.max_length, section)
    held_out = encode_pairs(tokenizer, validation, config.max_length, section)[0] if validation else []
    furthest, context = max(len(item.ids) for item in encoded), model.config.max_position_embeddings
    furthest += MOST_SKIPS * config.position_skips
    if furthest > context:
        raise CogumiError(
            f"positions of up to {furthest} do not fit in the student's context of {context}",
            f"lower {section}.max_length or {section}.position_skips",
        )
    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        PeftLora(
            r=config.rank_attention,
            rank_pattern={name: config.rank_feed_forward for name in FEED_FORWARD},
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[*ATTENTION, *FEED_FORWARD],
            task_type="CAUSAL_LM",
        ),
    )
    fuse_lora(model)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = str(compute_dtype(device)).removeprefix("torch.")
    if config.load_in_4bit:
        precision = f"NF4{' (unpacked once)' if unpacked else ''} + {precision}"
    loop = Loop(model, encoded, held_out, config, scratch, seed, progress, workers, section=section)
    before = evaluation_loss(model, held_out, loop.row_tokens, workers)
    loop.train()
    taken = peak.bytes()
    after = evaluation_loss(model, held_out, loop.row_tokens, workers)
    if workers.rank == 0:
        model.save_pretrained(out)
    shape = model.get_base_model().config
    machine = matmul_rate(
        device,
        compute_dtype(device),
        rows=min(loop.row_tokens, 4096),
        inner=shape.hidden_size,
        columns=shape.intermediate_size,
    )
    return _report(loop, too_long, before, after, len(held_out), machine, taken, precision)


def _report(
    loop: Loop, too_long: int, before: float, after: float, held_out: int, machine: float, taken: int, precision: str
) -> TrainingReport:
    rows = loop.log
    losses = [row["loss"] for row in rows]
    fifth = max(1, len(losses) // 5)
    seconds = sum(row["seconds"] for row in rows) or math.inf
    rate = sum(row["flops"] for row in rows) / seconds

    def curve(name: str) -> Curve:
        return tuple((int(row["step"]), row[name]) for row in rows)

    return TrainingReport(
        examples=loop.examples,
        too_long=too_long,
        steps=len(losses),
        resumed_from=loop.resumed_from,
        stopped_early=loop.stopped_early,
        tokens=int(sum(row["tokens"] for row in rows)),
        supervised_tokens=int(sum(row["supervised"] for row in rows)),
        trainable_parameters=loop.trained,
        loss_first=sum(losses[:fifth]) / fifth,
        loss_last=sum(losses[-fifth:]) / fifth,
        validation_loss_before=before,
        validation_loss_after=after,
        validation_examples=held_out,
        tokens_per_second=sum(row["tokens"] for row in rows) / seconds,
        seconds=seconds,
        flops_per_second=rate,
        machine_flops_per_second=machine,
        utilization=rate / machine / loop.workers.count,
        peak_memory_bytes=taken,
        precision=precision,
        row_tokens=loop.row_tokens,
        notes=tuple(loop.notes),
        curve=curve("loss"),
        curves={
            "learning rate": curve("rate"),
            "gradient norm": curve("gradient_norm"),
            "tokens per second": tuple((int(row["step"]), row["tokens"] / row["seconds"]) for row in rows),
            "validation loss": tuple(loop.evaluations),
        },
    )
