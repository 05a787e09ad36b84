"""Write Llama, Qwen2 and Qwen3 checkpoints as GGUF, and quantize through llama.cpp."""

import ctypes
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_checkpoint import Checkpoint, card, checkpoint_sha256, open_checkpoint
from cogumi_dagster.lib.compression.gguf_layout import ROPE_FACTORS, gguf_name, heads_of, permute
from cogumi_dagster.lib.compression.gguf_rope import add_rope, rope_factors
from cogumi_dagster.lib.compression.gguf_tokenizer import add_tokenizer
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.gguf_file import read_gguf
from cogumi_dagster.lib.llama_log import quiet_llama

GENERAL_FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
    "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip
"""``llama_ftype`` of each quantization that this project writes (llama.cpp's include/llama.h)."""

UNQUANTIZED = {"F32": 0, "F16": 1, "BF16": 32}
"""``llama_ftype`` of what ``write_gguf`` writes."""

LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class ExportReport:
    """One GGUF written: bytes, bits a weight, and the tensor types that llama.cpp chose."""

    type: str
    bytes: int
    parameters: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    """tensor type -> number of weights stored in it; shows the K-quant fallbacks."""
    sha256: str


def write_gguf(checkpoint: Path, out: Path, *, type: str = "F16", provenance: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint as an unquantized GGUF (``F16``, ``BF16`` or ``F32``), tokenizer and template included.

    Weights pass through one tensor at a time. ``out`` appears when it is whole. ``provenance`` is stored under
    ``cogumi.*``, beside the SHA-256 of ``tokenizer.json``. Norms and biases stay in float32, as llama.cpp wants them.

    Raises:
        CogumiError: what ``open_checkpoint`` and ``add_tokenizer`` refuse; NaN, infinite or too large weights.
    """
    from gguf import GGUFWriter

    if type not in UNQUANTIZED:
        raise CogumiError(f"{type!r} is not an unquantized type", nearest(type, UNQUANTIZED))
    source = open_checkpoint(checkpoint)
    config = source.config
    factors = rope_factors(config)
    with written_aside(out) as path:
        writer = GGUFWriter(path, config.model_type)
        try:
            _add_metadata(writer, source, type, provenance or {})
            if factors is not None:
                writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
            for name, shape in source.shapes.items():
                _announce(writer, gguf_name(name), shape, type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for name, tensor in source.tensors():
                values = _stored(checkpoint, name, tensor, type)
                heads = heads_of(config.model_type, name, config.num_attention_heads, config.num_key_value_heads)
                writer.write_tensor_data(permute(values, heads) if heads else values)
        finally:
            writer.close()


def _add_metadata(writer: Any, source: Checkpoint, type: str, provenance: Mapping[str, str]) -> None:
    from transformers import AutoTokenizer

    config = source.config
    writer.add_type("model")
    for key, value in card(source.folder).items():
        writer.add_string(key, value)
    writer.add_file_type(UNQUANTIZED[type])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    add_rope(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        problem = f"{source.folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}"
        raise CogumiError(problem, "save the tokenizer beside the model") from error
    add_tokenizer(writer, tokenizer, config.vocab_size)
    if (source.folder / "tokenizer.json").is_file():
        provenance = {"tokenizer_sha256": file_sha256(source.folder / "tokenizer.json"), **provenance}
    for key, value in provenance.items():
        writer.add_string(f"cogumi.{key}", value)


def _announce(writer: Any, name: str, shape: tuple[int, ...], type: str) -> None:
    """Name, shape and type of a tensor whose values are written later."""
    from gguf import GGMLQuantizationType

    kind = "F32" if len(shape) == 1 else type
    size = math.prod(shape) * (4 if kind == "F32" else 2)
    writer.add_tensor_info(name, shape, np.dtype(np.uint16), size, raw_dtype=GGMLQuantizationType[kind])


def _stored(checkpoint: Path, name: str, tensor: Any, type: str) -> np.ndarray[Any, Any]:
    """The values of a tensor as the file holds them; those of BF16 as the uint16 that they are."""
    import torch

    least, greatest = (float(value) for value in torch.aminmax(tensor))  # NaN goes through to both
    if not math.isfinite(least + greatest):
        raise CogumiError(f"{checkpoint}: tensor {name} holds NaN or infinite values", "the training run is broken")
    if tensor.ndim == 1 or type == "F32":
        return tensor.float().numpy()
    if type == "BF16":
        return tensor.bfloat16().view(torch.uint16).numpy()
    if max(-least, greatest) > LARGEST_F16:
        raise CogumiError(
            f"{checkpoint}: tensor {name} holds values too large for F16", "export it as BF16 if they are meant"
        )
    return tensor.half().numpy()


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to. It becomes ``out`` when the block ends well; otherwise nothing is left."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def export_gguf(checkpoint: Path, out: Path, type: str) -> ExportReport:
    """Write a checkpoint as ``out``, quantized to ``type`` by llama.cpp's own mix, with the hash of its weights.

    The file that is quantized holds the weights as the checkpoint does (bfloat16 as BF16), so nothing is rounded
    twice; it is beside ``out`` while the export lasts.

    Raises:
        CogumiError: an unknown type, or what ``write_gguf`` and ``quantize_gguf`` refuse.
    """
    known = GENERAL_FILE_TYPES | UNQUANTIZED
    if type not in known:
        raise CogumiError(f"unknown quantization {type!r}", nearest(type, known))
    source = open_checkpoint(checkpoint)
    provenance = {"parent_sha256": checkpoint_sha256(checkpoint)}
    out.parent.mkdir(parents=True, exist_ok=True)
    if type in UNQUANTIZED:
        write_gguf(checkpoint, out, type=type, provenance=provenance)
        return describe_gguf(out, type)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder) / "whole.gguf"
        write_gguf(checkpoint, whole, type=source.dtype, provenance=provenance)
        return quantize_gguf(whole, out, type)


def quantize_gguf(source: Path, out: Path, type: str, *, threads: int | None = None) -> ExportReport:
    """Quantize an unquantized GGUF with llama.cpp's own mix for ``type``.

    Raises:
        CogumiError: an unknown type, or llama.cpp refused the file.
    """
    run_quantizer(source, out, type, quantizer(type, threads))
    return describe_gguf(out, type)


def quantizer(type: str, threads: int | None = None) -> Any:
    """llama.cpp's parameters for ``type``. Raises CogumiError for an unknown one."""
    import llama_cpp

    if type not in GENERAL_FILE_TYPES:
        raise CogumiError(f"unknown quantization {type!r}", nearest(type, GENERAL_FILE_TYPES))
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads or os.cpu_count() or 1
    params.ftype = GENERAL_FILE_TYPES[type]
    return params


def run_quantizer(source: Path, out: Path, type: str, params: Any) -> None:
    """Write ``out`` with llama.cpp. Raises CogumiError where it refuses."""
    import llama_cpp

    with written_aside(out) as path:
        with quiet_llama():
            status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
        if status != 0 or not path.is_file():
            raise CogumiError(f"llama.cpp could not quantize {source} to {type} (status {status})", "see the log above")


def describe_gguf(path: Path, type: str) -> ExportReport:
    """Bytes, bits a weight and tensor types of a GGUF."""
    kinds: dict[str, int] = {}
    for tensor in read_gguf(path).tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    parameters, size = sum(kinds.values()), path.stat().st_size
    return ExportReport(type, size, parameters, 8 * size / parameters, kinds, file_sha256(path))
