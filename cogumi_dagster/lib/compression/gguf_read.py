"""Read a GGUF file into float32 tensors and a transformers checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression.gguf_layout import ARCHITECTURES, ROPE_FACTORS, heads_of, hf_name, unpermute
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.gguf_file import read_gguf


@dataclass(frozen=True)
class GgufFile:
    """A GGUF's metadata and, on demand, its tensors."""

    path: Path
    metadata: dict[str, Any]
    reader: Any

    def tensors(self) -> Iterator[tuple[str, str, np.ndarray[Any, Any]]]:
        """(GGUF name, quantization type, float32 values) of each tensor, in file order."""
        from gguf.quants import dequantize

        for tensor in self.reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            values = values if values.flags.writeable else values.copy()  # not a view of the read-only file
            yield tensor.name, tensor.tensor_type.name, values.reshape(tuple(int(n) for n in reversed(tensor.shape)))


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its metadata.

    Raises:
        CogumiError: no such file, or not a sound GGUF.
    """
    if not path.is_file():
        raise CogumiError(f"there is no file {path}", "check the path")
    try:
        reader = read_gguf(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise CogumiError(f"{path} is not a sound GGUF file: {error}", "download or export it again") from error
    return GgufFile(path, metadata, reader)


def hf_state_dict(file: GgufFile) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors under their Hugging Face names, dequantized to float32, heads in Hugging Face order.

    Raises:
        CogumiError: another architecture than Llama, Qwen2 or Qwen3.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CogumiError(f"{file.path} is a {architecture!r} model", f"only {', '.join(ARCHITECTURES)} are read")
    heads = file.metadata[f"{architecture}.attention.head_count"]
    kv_heads = file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    state = {}
    for name, _, values in file.tensors():
        if name == ROPE_FACTORS:
            continue
        rotated = heads_of(architecture, name, heads, kv_heads)
        state[hf_name(name)] = unpermute(values, rotated) if rotated else values
    return state


def dequantize_checkpoint(gguf: Path, tokenizer_from: Path, out: Path) -> None:
    """Write the weights of ``gguf``, exactly as they are served, as a checkpoint (bfloat16 cannot hold them: float32).

    ``tokenizer_from`` is the checkpoint whose tokenizer and configuration the GGUF was exported with.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    state = hf_state_dict(open_gguf(gguf))
    config = AutoConfig.from_pretrained(tokenizer_from, local_files_only=True)
    config.dtype = torch.float32
    config.tie_word_embeddings = "lm_head.weight" not in state
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in state.items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(out)
