"""Rotary position embeddings in a GGUF's metadata: plain, linear, YaRN and Llama 3 scaling."""

from typing import Any

import numpy as np

from cogumi_dagster.lib.errors import CogumiError

EXPORTED = ("default", "linear", "yarn", "llama3")
_KEEP = "keep the checkpoint in Hugging Face form, or export one with plain, linear, YaRN or Llama 3 rope"


def refuse_unknown_rope(config: Any) -> None:
    """Raise CogumiError where llama.cpp would rotate otherwise than transformers does."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in EXPORTED:
        raise CogumiError(f"rope type {kind!r} has no equal in GGUF", _KEEP)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CogumiError("the rope turns only a part of each head, which llama.cpp does not do here", _KEEP)
    if kind == "llama3" and config.model_type != "llama":
        raise CogumiError(f"llama.cpp reads no rope factors for {config.model_type} models", _KEEP)
    if kind == "yarn":
        own = sorted(rope.keys() - {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"})
        unusual = [key for key in own if rope[key] is not None and rope[key] != _YARN_DEFAULTS.get(key)]
        if unusual:
            raise CogumiError(f"YaRN with {unusual[0]} = {rope[unusual[0]]} is not exported", _KEEP)


_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}


def add_rope(writer: Any, config: Any) -> None:
    """Write the rotary dimensions, base and scaling under ``writer``'s architecture."""
    import gguf

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("linear", "yarn"):
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """(head_dim / 2,) divisors of the rotary frequencies, as Llama 3 scaling needs them; None for other ropes.

    Taken from transformers' own frequencies, so that both rotate alike.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0].double().numpy()
    plain = rope["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    factors: np.ndarray[Any, Any] = (plain / scaled).astype(np.float32)
    return factors
