"""Activation-aware scales (AWQ): found on calibration text, folded into 16-bit weights.

The folded checkpoint computes the same function as its parent; it only quantizes better. It is the
parent of both exports: GGUF and W4A16.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.autoawq import AUTOAWQ_GRID, search_autoawq
from cogumi_dagster.lib.compression.compressor import (
    Calibration,
    calibration_set,
    kept_in,
    load_sound,
    quiet_compressor,
    require_group_size,
    run_oneshot,
)  # fmt: skip
from cogumi_dagster.lib.profile import AwqConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity, perplexity_of
from cogumi_dagster.lib.training.student import copy_tokenizer, load_checkpoint


@dataclass(frozen=True)
class AwqReport:
    """How far folding moved the logits (rounding to 16 bits), and how many layers were scaled.

    ``calibration_tokens``: by group (domain) of the examples. ``search_seconds``: of the scale search alone.
    """

    engine: str
    calibration_samples: int
    calibration_tokens: dict[str, int]
    grid: int
    scaled_layers: int
    search_seconds: float
    parity: ParityReport


@dataclass(frozen=True)
class W4A16Report:
    """The 4-bit export, loaded back by transformers and measured on the held-out answers."""

    bytes: int
    group_size: int
    symmetric: bool
    observer: str
    rounding: str
    calibration_samples: int
    perplexity_parent: float
    perplexity: float
    perplexity_ratio: float
    perplexity_tokens: int


@quiet_compressor()
def fold_awq_scales(
    checkpoint: Path, calibration: Sequence[Pair], held_out: Sequence[Pair], out: Path, config: AwqConfig
) -> AwqReport:
    """Search the scales, fold them, save them (see ``kept_in``), and compare the saved file's logits with the parent's.

    Raises:
        CogumiError: an unsound checkpoint, a group size that does not divide the columns, or too little
            calibration text.
    """
    model, tokenizer = load_sound(checkpoint)
    require_group_size(model, config.group_size)
    data = calibration_set(tokenizer, calibration, config.calibration_samples, config.calibration_tokens)
    before = answer_logits(model, tokenizer, held_out, 1024)
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if "layernorm" in name}
    started = time.perf_counter()
    if config.engine == "autoawq":
        search_autoawq(model, tokenizer, data, config)
    else:
        _search_llmcompressor(model, data, config)
    seconds = time.perf_counter() - started
    kept = kept_in(model)
    # where there is an accelerator, llm-compressor leaves the model on it
    state = {name: value.to("cpu", kept) for name, value in model.state_dict().items() if _is_weight(name)}
    scaled = sum(1 for name, value in norms.items() if not value.equal(state[name].float()))
    parent, _ = load_checkpoint(checkpoint, str(kept).removeprefix("torch."))
    parent.load_state_dict(state, strict=False)
    parent.save_pretrained(out)
    copy_tokenizer(checkpoint, out)
    folded, _ = load_checkpoint(out, "float32")
    after = answer_logits(folded, tokenizer, held_out, 1024)
    return AwqReport(
        engine=config.engine,
        calibration_samples=len(data),
        calibration_tokens=dict(data.tokens_by_group),
        grid=AUTOAWQ_GRID if config.engine == "autoawq" else config.grid,
        scaled_layers=scaled,
        search_seconds=seconds,
        parity=parity(before, after),
    )


def _is_weight(name: str) -> bool:
    """Not a quantization parameter (``weight_scale``, ``weight_zero_point``, ...)."""
    return name.endswith(".weight")


def _scheme(config: AwqConfig, observer: str) -> dict[str, Any]:
    """4-bit groups for every linear layer but the head, as arguments of llm-compressor's modifiers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=config.bits,
        type="int",
        symmetric=config.symmetric,
        strategy="group",
        group_size=config.group_size,
        observer=f"memoryless_{observer}",
    )
    return {
        "config_groups": {"linear": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["re:.*lm_head"],
    }


def _search_llmcompressor(model: Any, data: Calibration, config: AwqConfig) -> None:
    """Scales that are best for min-max groups: an mse observer inside the search costs its own grid at each point."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    recipe = [AWQModifier(n_grid=config.grid), QuantizationModifier(**_scheme(config, "minmax"))]
    run_oneshot(model, recipe, data)


@quiet_compressor()
def export_w4a16(
    folded: Path, calibration: Sequence[Pair], held_out: Sequence[Pair], out: Path, config: AwqConfig
) -> W4A16Report:
    """Quantize the folded checkpoint to 4-bit groups in compressed-tensors form, and load it back.

    Raises:
        CogumiError: an unsound checkpoint, a group size that does not divide the columns, or too little
            calibration text for ``rounding: gptq``.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, tokenizer = load_sound(folded)
    require_group_size(model, config.group_size)
    reference, tokens = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    scheme, kept = _scheme(config, config.observer), kept_in(model)
    data = None
    if config.rounding == "gptq":
        data = calibration_set(tokenizer, calibration, config.calibration_samples, config.calibration_tokens)
        run_oneshot(model, [GPTQModifier(**scheme)], data)
        model = model.to(kept)
    else:
        model = model.to(kept)
        run_oneshot(model, [QuantizationModifier(**scheme)])
    model.save_pretrained(out, save_compressed=True)
    copy_tokenizer(folded, out)
    loaded = _load_decompressed(out)
    perplexity, _ = perplexity_of(answer_logits(loaded, tokenizer, held_out, 1024))
    return W4A16Report(
        bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        group_size=config.group_size,
        symmetric=config.symmetric,
        observer=config.observer,
        rounding=config.rounding,
        calibration_samples=len(data) if data else 0,
        perplexity_parent=reference,
        perplexity=perplexity,
        perplexity_ratio=perplexity / reference,
        perplexity_tokens=tokens,
    )


def _load_decompressed(folder: Path) -> Any:
    """Load a compressed-tensors checkpoint in transformers, weights unpacked (a CPU has no packed kernels)."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, local_files_only=True
    )
    return model.eval()
