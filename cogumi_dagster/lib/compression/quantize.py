"""Quantize a GGUF through llama.cpp: with an importance matrix, with a type for each tensor, or to a byte budget."""

import ctypes
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.ggml import type_id
from cogumi_dagster.lib.compression.gguf_checkpoint import checkpoint_sha256, open_checkpoint
from cogumi_dagster.lib.compression.gguf_export import (
    GENERAL_FILE_TYPES,
    ExportReport,
    describe_gguf,
    quantizer,
    run_quantizer,
    write_gguf,
)
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix, collect_imatrix, require_fit
from cogumi_dagster.lib.compression.mix import (
    Layout,
    candidates,
    choose_types,
    read_layout,
    smallest_types,
    types_by_class,
)
from cogumi_dagster.lib.compression.sensitivity import (
    KlMeter,
    fit_scales,
    measure_curvature,
    predict_losses,
    scaled,
)
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import load_model

KINDS = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K",
)  # fmt: skip
"""Types that a mix may use, where their blocks fit. Left out are those that llama.cpp refuses without an importance
matrix (IQ3_XXS and below), and IQ3_S, which takes Q3_K's bytes and fifty times its time."""

FILE_TYPES = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K": "Q5_K_M", "Q5_1": "Q5_0", "Q5_0": "Q5_0", "Q4_K": "Q4_K_M", "Q4_1": "Q4_0",
    "IQ4_NL": "IQ4_NL", "Q4_0": "Q4_0", "IQ4_XS": "IQ4_NL", "Q3_K": "Q3_K_M", "Q2_K": "Q2_K",
}  # fmt: skip
"""tensor type -> quantization that is mostly in it; llama.cpp takes types of single tensors only beside one."""


@dataclass(frozen=True)
class MixReport:
    """A file made to a budget. Losses are mean KL divergence from the unquantized model, nats a token."""

    budget_bytes: int
    predicted_bytes: int
    predicted_loss: float
    measured_loss: float
    """On the calibration answers, all tensors as stored."""
    measured_tokens: int
    types: dict[str, str]
    """class of tensors -> how many are in which type."""
    scales: dict[str, float]
    """class of tensors -> measured over predicted loss of the class alone."""
    seconds: dict[str, float]


def quantize_file(
    source: Path,
    out: Path,
    type: str,
    *,
    imatrix: Imatrix | None = None,
    types: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> ExportReport:
    """Quantize an unquantized GGUF with llama.cpp's mix for ``type``, or with ``types`` (tensor -> tensor type).

    Raises:
        CogumiError: an unknown type, an importance matrix of another model, or llama.cpp refused the file.
    """
    import llama_cpp

    params = quantizer(type, threads)
    kept: list[Any] = []  # what the structures point to must live until the call returns
    if imatrix:
        require_fit(imatrix, read_layout(source).shapes)
        params.imatrix = _imatrix_array(imatrix, kept)
        params.kv_overrides = _imatrix_keys(imatrix)
    if types:
        patterns = [(f"^{re.escape(name)}$".encode(), type_id(kind)) for name, kind in types.items()]
        overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))(*patterns)
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
        kept.append(overrides)
    run_quantizer(source, out, type, params)
    return describe_gguf(out, "mixed" if types else type)


def unquantize_file(source: Path, out: Path) -> None:
    """Write a quantized GGUF's weights, as llama.cpp unpacks them, in 16 bit.

    Raises:
        CogumiError: llama.cpp refused the file.
    """
    params = quantizer("F16")
    params.allow_requantize = True
    run_quantizer(source, out, "F16", params)


def _imatrix_array(imatrix: Imatrix, kept: list[Any]) -> Any:
    """A null-ended array of llama.cpp's ``llama_model_imatrix_data``."""
    import llama_cpp

    entries = []
    for name in imatrix.sums:
        values = imatrix.importance(name)
        if values is not None:
            kept.append(values)
            entries.append((name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size))
    return (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)


def _imatrix_keys(imatrix: Imatrix) -> Any:
    """The keys by which llama-quantize records its importance matrix, ended by an empty one."""
    import llama_cpp

    keys = (llama_cpp.llama_model_kv_override * 4)()
    whole, text = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
    keys[0].tag, keys[0].key, keys[0].value.val_i64 = whole, b"quantize.imatrix.entries_count", len(imatrix.sums)
    keys[1].tag, keys[1].key, keys[1].value.val_i64 = whole, b"quantize.imatrix.tokens_count", imatrix.tokens
    dataset = ", ".join(imatrix.datasets).encode()[:120].decode(errors="ignore").encode()
    keys[2].tag, keys[2].key, keys[2].value.val_str = text, b"quantize.imatrix.dataset", dataset
    return keys


def quantize_to_budget(
    f16: Path,
    model: Any,
    tokenizer: Any,
    calibration: Sequence[Pair],
    out: Path,
    budget: int,
    *,
    imatrix: Imatrix | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[ExportReport, MixReport]:
    """Write ``out`` with the mix of types that keeps the model's answers best within ``budget`` bytes.

    ``model`` is the transformers model (float32) that ``f16`` was exported from; ``imatrix`` is used in quantizing.

    Raises:
        CogumiError: a budget below the smallest mix, too little calibration text, a source that is quantized.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        seconds[step], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

    layout = read_layout(f16)
    options = candidates(layout, KINDS)
    smallest_types(layout, options, budget)  # refused before the long work
    curvature = measure_curvature(model, tokenizer, calibration, seed=seed, progress=progress)
    lap("curvature")
    losses = predict_losses(f16, curvature, options, imatrix, progress=progress)
    lap("errors")
    meter = KlMeter(model, tokenizer, calibration)
    scales = fit_scales(meter, f16, losses, imatrix, progress=progress)
    losses = scaled(losses, scales)
    lap("scales")
    types = choose_types(layout, losses, budget)
    lap("choice")
    export = quantize_file(f16, out, file_type(layout, types), imatrix=imatrix, types=types)
    lap("writing")
    measured = meter.measure({name: values for name, _, values in open_gguf(out).tensors() if name in types})
    lap("check")
    mix = MixReport(
        budget_bytes=budget,
        predicted_bytes=layout.bytes_as(types),
        predicted_loss=sum(losses[name][kind] for name, kind in types.items()),
        measured_loss=measured,
        measured_tokens=meter.tokens,
        types=types_by_class(types),
        scales=scales,
        seconds=seconds,
    )
    return export, mix


def file_type(layout: Layout, types: Mapping[str, str]) -> str:
    """The name of ``general.file_type`` that comes nearest to a mix: that of the type which most weights are in."""
    weights: Counter[str] = Counter()
    for name, kind in types.items():
        weights[kind] += prod(layout.shapes[name])
    return FILE_TYPES.get(weights.most_common(1)[0][0], "Q8_0")


def quantize_source(
    source: Path,
    out: Path,
    budget: int,
    calibration: Sequence[Pair],
    *,
    dataset: str = "",
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[ExportReport, MixReport]:
    """The same from a checkpoint folder or an unquantized GGUF, with an importance matrix of the same text.

    Raises:
        CogumiError: what ``quantize_to_budget`` refuses, or a source that is neither.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        f16 = Path(folder) / "f16.gguf" if source.is_dir() else source
        if source.is_dir():
            write_gguf(source, f16)
        require_budget(f16, budget)
        model, tokenizer = load_model(source)
        imatrix = collect_imatrix(model, tokenizer, calibration, dataset=dataset, progress=progress)
        return quantize_to_budget(
            f16, model, tokenizer, calibration, out, budget, imatrix=imatrix, seed=seed, progress=progress
        )


def require_budget(f16: Path, budget: int) -> None:
    """Refuse an impossible budget, or a source that is quantized, before the long work."""
    layout = read_layout(f16)
    smallest_types(layout, candidates(layout, KINDS), budget)


def export_weighted(
    checkpoint: Path,
    out: Path,
    type: str,
    *,
    imatrix: Imatrix | None = None,
    calibration: Sequence[Pair] = (),
    dataset: str = "",
    progress: Progress = silent,
) -> tuple[ExportReport, Imatrix]:
    """Write a checkpoint as a GGUF quantized with an importance matrix, one of ``calibration`` where none is given."""
    if type not in GENERAL_FILE_TYPES:
        raise CogumiError(f"unknown quantization {type!r}", nearest(type, GENERAL_FILE_TYPES))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder) / "whole.gguf"
        source = open_checkpoint(checkpoint)
        write_gguf(checkpoint, whole, type=source.dtype, provenance={"parent_sha256": checkpoint_sha256(checkpoint)})
        if imatrix is None:
            model, tokenizer = load_model(checkpoint)
            imatrix = collect_imatrix(model, tokenizer, calibration, dataset=dataset, progress=progress)
        return quantize_file(whole, out, type, imatrix=imatrix), imatrix
