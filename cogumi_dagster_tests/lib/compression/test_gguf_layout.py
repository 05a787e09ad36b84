from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi_dagster.lib.compression.gguf_layout import gguf_name, heads_of, hf_name, llama_config, permute, unpermute
from cogumi_dagster.lib.errors import CogumiError

NAMES = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight",
]  # fmt: skip


@given(heads=st.integers(1, 6), half=st.integers(1, 5), columns=st.integers(1, 4))
def test_unpermute_undoes_permute(heads: int, half: int, columns: int) -> None:
    rows = heads * half * 2
    weight = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    assert (unpermute(permute(weight, heads), heads) == weight).all()
    assert (permute(unpermute(weight, heads), heads) == weight).all()
    assert (permute(weight[:, 0], heads) == permute(weight, heads)[:, 0]).all()


def test_permute_puts_rotary_pairs_side_by_side() -> None:
    # one head of width 6: Hugging Face rotates rows (0,3), (1,4), (2,5); GGUF wants them adjacent
    assert permute(np.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert permute(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", NAMES)
def test_names_go_both_ways(name: str) -> None:
    assert hf_name(gguf_name(name)) == name
    assert gguf_name(name) != name


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "transformer.h.0.attn", "model.layers.0.mlp.experts.weight", "x"]
)
def test_a_tensor_that_no_llama_has_is_refused(name: str) -> None:
    with pytest.raises(CogumiError, match="not part of a Llama checkpoint"):
        gguf_name(name)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "v.patch_embd.weight.x", "blk.0.ffn_gate_inp.weight"])
def test_a_gguf_tensor_that_no_llama_has_is_refused(name: str) -> None:
    with pytest.raises(CogumiError, match="not one of a Llama model"):
        hf_name(name)


def test_only_queries_and_keys_are_permuted() -> None:
    for name, wanted in (("q_proj", 8), ("k_proj", 2), ("v_proj", None), ("o_proj", None)):
        hugging_face = f"model.layers.0.self_attn.{name}.weight"
        assert heads_of(hugging_face, 8, 2) == heads_of(gguf_name(hugging_face), 8, 2) == wanted


def test_the_configuration_is_read_from_the_metadata() -> None:
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.block_count": 2, "llama.attention.head_count": 4, "llama.context_length": 99,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.tokens": ["a", "b"],
    }  # fmt: skip
    config = llama_config(metadata)
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["vocab_size"] == 2
    with pytest.raises(CogumiError, match="architecture 'qwen2'"):
        llama_config({**metadata, "general.architecture": "qwen2"})
