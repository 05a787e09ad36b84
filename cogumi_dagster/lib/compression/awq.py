"""Activation-aware scales (AWQ): found on calibration text, folded into 16-bit weights.

The folded checkpoint computes the same function as its parent; it only quantizes better. It is the
parent of both exports: GGUF and W4A16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.compressor import calibration_set, quiet_compressor, require_group_size, run_oneshot
from cogumi_dagster.lib.profile import AwqConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity, perplexity_of
from cogumi_dagster.lib.training.student import copy_tokenizer, load_checkpoint


@dataclass(frozen=True)
class AwqReport:
    """How far folding moved the logits (rounding to bfloat16), and how many layers were scaled."""

    engine: str
    calibration_samples: int
    grid: int
    scaled_layers: int
    parity: ParityReport


@dataclass(frozen=True)
class W4A16Report:
    bytes: int
    group_size: int
    perplexity_parent: float
    perplexity: float
    perplexity_tokens: int


@quiet_compressor()
def fold_awq_scales(
    checkpoint: Path, calibration: Sequence[Pair], held_out: Sequence[Pair], out: Path, config: AwqConfig
) -> AwqReport:
    """Search the scales, fold them, save in bfloat16, and compare the saved file's logits with the parent's.

    Raises:
        CogumiError: a group size that does not divide the columns, or too little calibration text.
    """
    require_group_size(checkpoint, config.group_size)
    model, tokenizer = load_checkpoint(checkpoint, "float32")
    before = answer_logits(model, tokenizer, held_out, 1024)
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if "layernorm" in name}
    data = calibration_set(tokenizer, calibration, config.calibration_samples, config.calibration_tokens)
    search = _search_autoawq if config.engine == "autoawq" else _search_llmcompressor
    model = search(model, tokenizer, data, config, checkpoint)
    state = {name: value.bfloat16() for name, value in model.state_dict().items() if _is_weight(name)}
    scaled = sum(1 for name, value in norms.items() if not value.equal(state[name].float()))
    parent, _ = load_checkpoint(checkpoint, "bfloat16")
    parent.load_state_dict(state, strict=False)
    parent.save_pretrained(out)
    copy_tokenizer(checkpoint, out)
    folded, _ = load_checkpoint(out, "float32")
    after = answer_logits(folded, tokenizer, held_out, 1024)
    return AwqReport(config.engine, len(data), config.grid, scaled, parity(before, after))


def _is_weight(name: str) -> bool:
    """Not a quantization parameter (``weight_scale``, ``weight_zero_point``, ...)."""
    return name.endswith(".weight")


def _w4a16(group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size)
    return QuantizationModifier(
        config_groups={"linear": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )


def _search_llmcompressor(model: Any, tokenizer: Any, data: Any, config: AwqConfig, checkpoint: Path) -> Any:
    from llmcompressor.modifiers.transform.awq import AWQModifier

    run_oneshot(model, [AWQModifier(n_grid=config.grid), _w4a16(config.group_size)], data, len(data))
    return model


def _search_autoawq(model: Any, tokenizer: Any, data: Any, config: AwqConfig, checkpoint: Path) -> Any:
    """AutoAWQ applies the scales and leaves the weights unquantized with ``export_compatible``."""
    from awq import AutoAWQForCausalLM

    quantizer = AutoAWQForCausalLM.from_pretrained(str(checkpoint), device_map="cpu", safetensors=True)
    quantizer.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": config.group_size, "w_bit": config.bits, "version": "GEMM"},
        calib_data=[tokenizer.decode(ids) for ids in data["input_ids"]],
        max_calib_samples=len(data),
        max_calib_seq_len=config.calibration_tokens,
        export_compatible=True,
    )
    return quantizer.model.float()


@quiet_compressor()
def export_w4a16(folded: Path, held_out: Sequence[Pair], out: Path, config: AwqConfig) -> W4A16Report:
    """Quantize the folded checkpoint to 4-bit groups in compressed-tensors form, and load it back."""
    require_group_size(folded, config.group_size)
    model, tokenizer = load_checkpoint(folded, "float32")
    reference, tokens = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    run_oneshot(model.bfloat16(), [_w4a16(config.group_size)])
    model.save_pretrained(out, save_compressed=True)
    copy_tokenizer(folded, out)
    loaded = _load_decompressed(out)
    perplexity, _ = perplexity_of(answer_logits(loaded, tokenizer, held_out, 1024))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return W4A16Report(size, config.group_size, reference, perplexity, tokens)


def _load_decompressed(folder: Path) -> Any:
    """Load a compressed-tensors checkpoint in transformers, weights unpacked (a CPU has no packed kernels)."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, local_files_only=True
    )
    return model.eval()
