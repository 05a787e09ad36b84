"""How Llama, Qwen2 and Qwen3 checkpoints are laid out in Hugging Face form and in GGUF, both ways.

The two formats name tensors differently, and of a Llama GGUF stores the rows of the query and key projections
permuted (rotary pairs side by side instead of in two halves). Qwen's are stored as they are.
"""

from typing import Any, cast

import numpy as np

from cogumi_dagster.lib.errors import CogumiError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Called the same as ``model_type`` in transformers and as ``general.architecture`` in GGUF."""

PERMUTED = ("llama",)
"""llama.cpp rotates neighbouring rows in these, halves of a head in the others (``llama_model_rope_type``)."""

ROPE_FACTORS = "rope_freqs.weight"

Shape = tuple[int, ...]

_GLOBAL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GLOBAL_BACK = {gguf: hf for hf, gguf in _GLOBAL.items()}
_LAYER_BACK = {gguf: hf for hf, gguf in _LAYER.items()}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``.

    Raises:
        CogumiError: a tensor that none of the architectures has.
    """
    module, _, suffix = name.rpartition(".")
    if suffix in ("weight", "bias"):
        if module in _GLOBAL:
            return f"{_GLOBAL[module]}.{suffix}"
        layer, _, part = module.removeprefix("model.layers.").partition(".")
        if module.startswith("model.layers.") and layer.isdigit() and part in _LAYER:
            return f"blk.{layer}.{_LAYER[part]}.{suffix}"
    raise CogumiError(
        f"tensor {name!r} is not part of a Llama, Qwen2 or Qwen3 checkpoint", "export a plain language model of these"
    )


def hf_name(name: str) -> str:
    """The inverse of ``gguf_name``."""
    module, _, suffix = name.rpartition(".")
    if module in _GLOBAL_BACK:
        return f"{_GLOBAL_BACK[module]}.{suffix}"
    block, _, rest = module.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and part in _LAYER_BACK:
        return f"model.layers.{layer}.{_LAYER_BACK[part]}.{suffix}"
    raise CogumiError(
        f"GGUF tensor {name!r} is not one of a Llama, Qwen2 or Qwen3 model", "only GGUF files of these are read"
    )


def tensor_shapes(config: Any) -> dict[str, Shape]:
    """Hugging Face name -> shape of every tensor that a checkpoint of this transformers configuration holds."""
    width, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear: dict[str, Shape] = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }
    norms: dict[str, Shape] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    if config.model_type == "qwen3":
        norms |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        for module, shape in (linear | norms).items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
        for module in _biased(config):
            shapes[f"model.layers.{layer}.{module}.bias"] = linear[module][:1]
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _biased(config: Any) -> list[str]:
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    match config.model_type:
        case "qwen2":
            return attention
        case "qwen3":
            return []
    output, feed_forward = ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return (attention + output) * config.attention_bias + feed_forward * config.mlp_bias


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query/key matrix or bias (or of a LoRA B) from Hugging Face order to GGUF order."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The inverse of ``permute``."""
    rows, *rest = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def heads_of(architecture: str, name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads a tensor's rows are permuted in, by its name in either format; None where they are not."""
    if architecture not in PERMUTED:
        return None
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
