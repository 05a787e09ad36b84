from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi_dagster.lib.compression.gguf_layout import (
    ARCHITECTURES,
    gguf_name,
    heads_of,
    hf_name,
    llama_config,
    permute,
    tensor_shapes,
    unpermute,
)
from cogumi_dagster.lib.errors import CogumiError

NAMES = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight",
    "model.layers.7.self_attn.q_proj.bias", "model.layers.7.self_attn.k_norm.weight",
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
    "name",
    [
        "model.layers.0.self_attn.q_proj.scale",
        "transformer.h.0.attn",
        "model.layers.0.mlp.experts.weight",
        "x",
        "a.weight",
    ],
)
def test_a_tensor_that_none_has_is_refused(name: str) -> None:
    with pytest.raises(CogumiError, match="not part of a Llama, Qwen2 or Qwen3 checkpoint"):
        gguf_name(name)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "v.patch_embd.weight.x", "blk.0.ffn_gate_inp.weight"])
def test_a_gguf_tensor_that_none_has_is_refused(name: str) -> None:
    with pytest.raises(CogumiError, match="not one of a Llama, Qwen2 or Qwen3 model"):
        hf_name(name)


def test_only_queries_and_keys_of_a_llama_are_permuted() -> None:
    for name, wanted in (("q_proj", 8), ("k_proj", 2), ("v_proj", None), ("o_proj", None), ("q_norm", None)):
        for suffix in ("weight", "bias"):
            hugging_face = f"model.layers.0.self_attn.{name}.{suffix}"
            gguf = gguf_name(hugging_face)
            assert heads_of("llama", hugging_face, 8, 2) == heads_of("llama", gguf, 8, 2) == wanted
            assert heads_of("qwen2", hugging_face, 8, 2) is heads_of("qwen3", gguf, 8, 2) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_shapes_are_those_of_transformers(architecture: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        wanted = {
            name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    if architecture == "qwen2":
        config.head_dim = 8
    assert tensor_shapes(config) == wanted


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
