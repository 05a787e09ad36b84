"""llama.cpp computes from our export what transformers computes from the checkpoint, for every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogumi_dagster.lib.compression import gguf_export
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint, hf_state_dict, open_gguf

PARITY, BROKEN = 1e-4, 1e-2

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, no grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALED = [("llama", LINEAR), ("llama", YARN), ("llama", LLAMA3), ("qwen2", LINEAR), ("qwen2", YARN)]
SCALED += [("qwen3", LINEAR), ("qwen3", YARN)]

Logits, Divergence, Model = Callable[..., Any], Callable[[Any, Any], float], Callable[..., Path]


@pytest.mark.parametrize("name", MODELS)
def test_an_export_computes_the_same_function(
    name: str, tiny_model: Model, logits_of: Logits, mean_kl: Divergence, tmp_path: Path
) -> None:
    architecture, changes = MODELS[name]
    checkpoint = tiny_model(architecture, **changes)
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    wanted, found = logits_of(checkpoint), logits_of(tmp_path / "f16.gguf")
    assert mean_kl(wanted, found) <= PARITY
    assert (wanted.argmax(-1) == found.argmax(-1)).float().mean() >= 0.98
    metadata = open_gguf(tmp_path / "f16.gguf").metadata
    assert metadata["general.architecture"] == architecture
    head = 32 if "wide" in name or architecture == "qwen3" else 16
    assert metadata[f"{architecture}.attention.key_length"] == metadata[f"{architecture}.rope.dimension_count"] == head


@pytest.mark.parametrize(("architecture", "rope"), SCALED, ids=[f"{a}, {r['rope_type']}" for a, r in SCALED])
def test_a_scaled_rope_turns_alike(
    architecture: str, rope: dict[str, Any], tiny_model: Model, logits_of: Logits, mean_kl: Divergence, tmp_path: Path
) -> None:
    checkpoint = tiny_model(architecture, rope_parameters=rope)
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    wanted = logits_of(checkpoint)
    assert mean_kl(wanted, logits_of(tmp_path / "f16.gguf")) <= PARITY
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    assert mean_kl(wanted, logits_of(tiny_model(architecture, rope_parameters=plain))) > BROKEN, "it would be noticed"


def without(part: str, value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.fill_(value)

    return change


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [("llama, biases", ".bias", 0.0), ("qwen2", ".bias", 0.0), ("qwen3", "q_norm", 1.0), ("qwen3", "k_norm", 1.0)],
)
def test_lost_biases_or_norms_would_be_noticed(
    name: str, part: str, value: float, tiny_model: Model, logits_of: Logits, mean_kl: Divergence
) -> None:
    architecture, changes = MODELS[name]
    checkpoint = tiny_model(architecture, **changes)
    assert mean_kl(logits_of(checkpoint), logits_of(checkpoint, change=without(part, value))) > BROKEN


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_heads_in_the_wrong_order_would_be_noticed(
    architecture: str,
    tiny_model: Model,
    logits_of: Logits,
    mean_kl: Divergence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, other = gguf_export.heads_of, "qwen2" if architecture == "llama" else "llama"
    monkeypatch.setattr(gguf_export, "heads_of", lambda _, name, heads, kv_heads: right(other, name, heads, kv_heads))
    write_gguf(tiny_model(architecture), tmp_path / "wrong.gguf")
    assert mean_kl(logits_of(tiny_model(architecture)), logits_of(tmp_path / "wrong.gguf")) > BROKEN


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("type", ["BF16", "F32"])
def test_bfloat16_weights_are_kept_to_the_bit(architecture: str, type: str, tiny_model: Model, tmp_path: Path) -> None:
    checkpoint = tiny_model(architecture)
    write_gguf(checkpoint, tmp_path / "out.gguf", type=type)
    file = open_gguf(tmp_path / "out.gguf")
    state = hf_state_dict(file)
    wanted = load_file(checkpoint / "model.safetensors")
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(torch.from_numpy(state[name]), tensor.float()), name
    assert {kind for _, kind, values in file.tensors() if values.ndim == 2} == {type}
    assert {kind for _, kind, values in file.tensors() if values.ndim == 1} == {"F32"}


def test_shards_give_the_same_file(tiny_model: Model, tmp_path: Path) -> None:
    sharded = tiny_model("qwen3", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    write_gguf(sharded, tmp_path / "sharded.gguf")
    write_gguf(tiny_model("qwen3"), tmp_path / "whole.gguf")
    assert (tmp_path / "sharded.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(("architecture", "rope"), [("qwen2", None), ("qwen3", None), ("llama", LLAMA3)])
def test_a_quantized_export_is_read_back_as_it_is_served(
    architecture: str, rope: Any, tiny_model: Model, logits_of: Logits, mean_kl: Divergence, tmp_path: Path
) -> None:
    checkpoint = tiny_model(architecture, **({"rope_parameters": rope} if rope else {}))
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q.gguf", "Q8_0")
    dequantize_checkpoint(tmp_path / "q.gguf", checkpoint, tmp_path / "served")
    assert mean_kl(logits_of(tmp_path / "served"), logits_of(tmp_path / "q.gguf")) < 5e-3, "activations in 8 bit"
