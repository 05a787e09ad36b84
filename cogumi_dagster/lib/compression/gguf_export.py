"""Write Llama checkpoints and LoRA adapters as GGUF, and quantize through llama.cpp."""

import ctypes
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_layout import gguf_name, heads_of, permute
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.training.tokenizer import pre_tokenizer_id

log = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""``tokenizer.ggml.token_type`` values of llama.cpp."""

GENERAL_FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
    "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip
"""``llama_ftype`` of each quantization that this project writes (llama.cpp's include/llama.h)."""


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


def _config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CogumiError(f"{checkpoint} is not a checkpoint: it has no config.json", "give a Hugging Face folder")
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("model_type") != "llama":
        raise CogumiError(
            f"{checkpoint} is a {config.get('model_type')!r} checkpoint",
            "only Llama-family checkpoints are exported yet",
        )
    if config.get("quantization_config"):
        raise CogumiError(f"{checkpoint} is already quantized", "export its 16-bit parent instead")
    return config


def _tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    from safetensors import safe_open

    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise CogumiError(f"{checkpoint} holds no safetensors file", "save the checkpoint with save_pretrained")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name).float().numpy()


def write_gguf(checkpoint: Path, out: Path, *, type: str = "F16", provenance: Mapping[str, str] | None = None) -> None:
    """Write a Llama checkpoint as an unquantized GGUF (``F16`` or ``F32``), tokenizer and template included.

    Raises:
        CogumiError: another architecture, a quantized checkpoint, missing tensors, NaN or infinite weights.
    """
    import gguf
    from transformers import AutoTokenizer

    config = _config(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(config.get("_name_or_path") or "cogumi")
    writer.add_file_type(GENERAL_FILE_TYPES.get(type, 0))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    if rope.get("rope_type", "default") != "default":
        raise CogumiError(f"rope type {rope['rope_type']!r} is not exported yet", "use a checkpoint with default rope")
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, tokenizer, config["vocab_size"])
    for key, value in (provenance or {}).items():
        writer.add_string(f"cogumi.{key}", value)
    seen = set()
    for name, values in _tensors(checkpoint):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if not np.isfinite(values).all():
            raise CogumiError(f"{checkpoint}: tensor {name} holds NaN or infinite values", "the training run is broken")
        if type != "F32" and values.ndim > 1 and np.abs(values).max() > np.finfo(np.float16).max:
            raise CogumiError(
                f"{checkpoint}: tensor {name} holds values too large for F16", "the training run is broken"
            )
        heads_here = heads_of(name, heads, kv_heads)
        values = permute(values, heads_here) if heads_here else values
        seen.add(gguf_name(name))
        wide = values.ndim == 1 or type == "F32"
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values if wide else values.astype(np.float16)))
    _require_all(checkpoint, seen, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_all(checkpoint: Path, seen: set[str], config: dict[str, Any]) -> None:
    blocks = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
    wanted = {"token_embd.weight", "output_norm.weight"} | {
        f"blk.{layer}.{block}.weight" for layer in range(config["num_hidden_layers"]) for block in blocks
    }
    if not config.get("tie_word_embeddings"):
        wanted.add("output.weight")
    missing = sorted(wanted - seen)
    if missing:
        raise CogumiError(f"{checkpoint} lacks {len(missing)} tensor(s), {missing[0]} first", "save it again, whole")


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for token_id in range(vocab_size):
        token = by_id.get(token_id)
        if token is None:
            tokens.append(f"[PAD{token_id}]")
            types.append(UNUSED)
        else:
            tokens.append(token)
            entry = added.get(token_id)
            types.append(NORMAL if entry is None else CONTROL if entry["special"] else USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_id(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def quantize_gguf(source: Path, out: Path, type: str, *, threads: int | None = None) -> ExportReport:
    """Quantize an F16 GGUF with llama.cpp's own mix for ``type``.

    Raises:
        CogumiError: an unknown type, or llama.cpp refused the file.
    """
    import llama_cpp

    if type not in GENERAL_FILE_TYPES:
        raise CogumiError(f"unknown quantization {type!r}", nearest(type, GENERAL_FILE_TYPES))
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads or os.cpu_count() or 1
    params.ftype = GENERAL_FILE_TYPES[type]
    with quiet_llama():
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if status != 0 or not out.is_file():
        raise CogumiError(f"llama.cpp could not quantize {source} to {type} (status {status})", "see the log above")
    return describe_gguf(out, type)


def describe_gguf(path: Path, type: str) -> ExportReport:
    """Bytes, bits a weight and tensor types of a GGUF."""
    from gguf import GGUFReader

    kinds: dict[str, int] = {}
    for tensor in GGUFReader(path).tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    parameters, size = sum(kinds.values()), path.stat().st_size
    return ExportReport(type, size, parameters, 8 * size / parameters, kinds, file_sha256(path))


@contextmanager
def quiet_llama() -> Iterator[None]:
    """Keep llama.cpp's per-tensor chatter out of the terminal; errors go to our log (fallbacks are in the report)."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level >= 4:
            log.warning("llama.cpp: %s", text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        yield
    finally:
        _KEEP.append(listen)  # llama.cpp keeps the pointer: it must outlive this call


_KEEP: list[Any] = []


def export_lora(adapter: Path, out: Path, *, base: Path, contract: Mapping[str, str]) -> int:
    """Write a PEFT LoRA adapter as a GGUF adapter for the base checkpoint; return its bytes.

    ``contract`` (hashes of base, tokenizer, template) is stored under ``cogumi.*`` in the metadata.

    Raises:
        CogumiError: DoRA, rsLoRA, modules_to_save or biases, which GGUF adapters cannot express.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, what in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA"), ("modules_to_save", "modules_to_save")):
        if config.get(key):
            raise CogumiError(f"{adapter} uses {what}, which a GGUF adapter cannot express", "train a plain LoRA")
    if config.get("bias", "none") != "none":
        raise CogumiError(f"{adapter} trains biases, which a GGUF adapter cannot express", "train with bias='none'")
    base_config = _config(base)
    heads = base_config["num_attention_heads"]
    kv_heads = base_config.get("num_key_value_heads", heads)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, value in contract.items():
        writer.add_string(f"cogumi.{key}", value)
    for name, values in _scaled(load_file(adapter / "adapter_model.safetensors"), config):
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        heads_here = heads_of(f"{module}.weight", heads, kv_heads)
        if side == "b" and heads_here:
            values = permute(values, heads_here)
        writer.add_tensor(f"{gguf_name(f'{module}.weight')}.lora_{side}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out.stat().st_size


def _scaled(
    tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(module.lora_a|b, float32 values): llama.cpp scales by alpha / rank with one alpha for all
    modules; a module with an alpha of its own (``alpha_pattern``) has the ratio folded into its B."""
    patterns = config.get("alpha_pattern") or {}
    for name, values in sorted(tensors.items()):
        values = values.astype(np.float32)
        for ending, side in ((".lora_A.weight", "a"), (".lora_B.weight", "b")):
            if name.endswith(ending):
                module = name.removesuffix(ending)
                own = next((alpha for key, alpha in patterns.items() if module.endswith(key)), None)
                if side == "b" and own is not None:
                    values = values * (own / config["lora_alpha"])
                yield f"{module}.lora_{side}", values
                break
        else:
            raise CogumiError(f"adapter tensor {name!r} is not a LoRA matrix", "train a plain LoRA")
