"""Read a GGUF file into float32 tensors and a transformers checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression.gguf_layout import heads_of, hf_name, llama_config, unpermute
from cogumi_dagster.lib.errors import CogumiError


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
    from gguf import GGUFReader

    if not path.is_file():
        raise CogumiError(f"there is no file {path}", "check the path")
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise CogumiError(f"{path} is not a sound GGUF file: {error}", "download or export it again") from error
    return GgufFile(path, metadata, reader)


def hf_state_dict(file: GgufFile) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors under their Hugging Face names, dequantized to float32, heads in Hugging Face order."""
    config = llama_config(file.metadata)
    state = {}
    for name, _, values in file.tensors():
        if name == "rope_freqs.weight":
            continue
        heads = heads_of(f".{name}", config["num_attention_heads"], config["num_key_value_heads"])
        state[hf_name(name)] = unpermute(values, heads) if heads else values
    return state


def dequantize_checkpoint(gguf: Path, tokenizer_from: Path, out: Path) -> None:
    """Write the weights of ``gguf``, exactly as they are served, as a checkpoint (bfloat16 cannot hold them: float32).

    ``tokenizer_from`` is the checkpoint whose tokenizer and configuration the GGUF was exported with.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    state = hf_state_dict(open_gguf(gguf))
    config = LlamaConfig.from_pretrained(tokenizer_from)
    config.dtype = torch.float32
    config.tie_word_embeddings = "lm_head.weight" not in state
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in state.items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(out)
