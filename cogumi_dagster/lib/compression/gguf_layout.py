"""How a Llama-family checkpoint is laid out in Hugging Face form and in GGUF, both ways.

The two formats name tensors differently, and GGUF stores the rows of the query and key projections
permuted (rotary pairs side by side instead of in two halves).
"""

from typing import Any, cast

import numpy as np

from cogumi_dagster.lib.errors import CogumiError

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``.

    Raises:
        CogumiError: a tensor that a Llama checkpoint does not have.
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    parts = name.removeprefix("model.layers.").split(".")
    module, suffix = ".".join(parts[1:-1]), parts[-1]
    if not name.startswith("model.layers.") or module not in _LAYER or suffix != "weight":
        raise CogumiError(
            f"tensor {name!r} is not part of a Llama checkpoint", "only Llama-family checkpoints are exported"
        )
    return f"blk.{parts[0]}.{_LAYER[module]}.{suffix}"


def hf_name(name: str) -> str:
    """The inverse of ``gguf_name``."""
    for hf, gguf in _GLOBAL.items():
        if gguf == name:
            return hf
    block, layer, module, suffix = name.split(".")
    if block == "blk":
        for hf, gguf in _LAYER.items():
            if gguf == module:
                return f"model.layers.{layer}.{hf}.{suffix}"
    raise CogumiError(f"GGUF tensor {name!r} is not one of a Llama model", "only Llama-family GGUF files are read")


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query/key matrix (or of a LoRA B) from Hugging Face order to GGUF order."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The inverse of ``permute``."""
    rows, *rest = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def heads_of(name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads a tensor's rows are permuted in; None where they are not."""
    if ".q_proj." in name or ".attn_q." in name:
        return heads
    if ".k_proj." in name or ".attn_k." in name:
        return kv_heads
    return None


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' ``LlamaConfig`` that a GGUF's metadata state."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CogumiError(f"a GGUF of architecture {architecture!r} cannot be the student", "use a Llama-family model")
    get = lambda key, default=None: metadata.get(f"llama.{key}", default)  # noqa: E731
    heads = cast(int, get("attention.head_count"))
    return {
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": float(cast(float, get("attention.layer_norm_rms_epsilon"))),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(cast(float, get("rope.freq_base", 10000.0)))},
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
