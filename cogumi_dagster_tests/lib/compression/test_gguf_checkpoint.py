"""A checkpoint that is not sound is refused before a byte is written, and the error says what is wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogumi_dagster.lib.compression.gguf_checkpoint import INDEX_FILE, WEIGHTS_FILE, checkpoint_sha256, open_checkpoint
from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError

State = dict[str, Any]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def changed(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model with its tensors or its configuration changed."""

    def change(
        tensors: Callable[[State], None] | None = None,
        *,
        architecture: str = "llama",
        shard: str = "5GB",
        **config: Any,
    ) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(tiny_model(architecture, shard=shard), copy)
        if tensors:
            state = load_file(copy / WEIGHTS_FILE)
            tensors(state)
            save_file(state, copy / WEIGHTS_FILE, {"format": "pt"})
        path = copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return copy

    return change


def refused(checkpoint: Path, problem: str) -> CogumiError:
    """The error; neither the file nor a part of it is left."""
    out = checkpoint.parent / "out" / "model.gguf"
    out.parent.mkdir()
    with pytest.raises(CogumiError, match=problem) as caught:
        write_gguf(checkpoint, out)
    assert not list(out.parent.iterdir())
    assert caught.value.mend
    return caught.value


def spoil(value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[UP][3, 5] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(changed: Callable[..., Path], value: float) -> None:
    refused(changed(spoil(value)), f"{UP} holds NaN or infinite values")


def test_what_float16_cannot_hold_is_refused_and_bfloat16_can(changed: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = changed(spoil(-1e5))
    assert "BF16" in refused(checkpoint, f"{UP} holds values too large for F16").mend
    write_gguf(checkpoint, tmp_path / "bf16.gguf", type="BF16")
    assert (tmp_path / "bf16.gguf").is_file()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (lambda state: state.pop(UP), rf"lacks 1 tensor\(s\), {UP} first"),
        (lambda state: state.update({"model.layers.0.mlp.gate.weight": torch.ones(2, 2)}), "mlp.gate.weight first"),
        (
            lambda state: state.update({UP: torch.ones(96, 32)}),
            rf"{UP} is \(96, 32\), but config.json makes it \(96, 64",
        ),
        (lambda state: state.update({UP: torch.ones(96, 64, dtype=torch.int8)}), f"{UP} is stored as I8"),
        (lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)}), f"{UP} is stored as F8_E4M3"),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(
    changed: Callable[..., Path], tensors: Callable[[State], None], problem: str
) -> None:
    refused(changed(tensors), problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "mistral"}, "'mistral' checkpoint"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' checkpoint"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"tie_word_embeddings": False}, "lm_head.weight first"),
        ({"num_hidden_layers": 3}, "lacks 9 tensor"),
        ({"num_hidden_layers": 1}, "has no place for"),
        ({"vocab_size": 700}, r"embed_tokens.weight is \(672, 64\), but config.json makes it \(700, 64\)"),
        ({"hidden_size": "many"}, "not a sound configuration"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changed: Callable[..., Path], config: dict[str, Any], problem: str
) -> None:
    refused(changed(**config), problem)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **YARN, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("architecture", "config", "problem"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = True"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"rope_parameters": LLAMA3}, "no rope factors for qwen2"),
        ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "YaRN with attention_factor = 1.5"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "YaRN with beta_fast = 16"),
    ],
)
def test_what_an_architecture_lacks_in_llama_cpp_is_refused(
    changed: Callable[..., Path], architecture: str, config: dict[str, Any], problem: str
) -> None:
    refused(changed(architecture=architecture, **config), problem)


def test_an_older_configuration_is_read(changed: Callable[..., Path]) -> None:
    """As on the hub: ``rope_theta`` and ``rope_scaling`` side by side."""
    scaling = {**LLAMA3, "factor": 8.0}
    theta = scaling.pop("rope_theta")
    config = open_checkpoint(changed(rope_parameters=None, rope_theta=theta, rope_scaling=scaling)).config
    assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == ("llama3", theta)


def test_files_that_are_missing_or_cut_off_are_named(changed: Callable[..., Path], tmp_path: Path) -> None:
    whole = changed(shard="60KB")
    index = json.loads((whole / INDEX_FILE).read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())

    def damaged(number: int, change: Callable[[Path], Any]) -> Path:
        folder = tmp_path / str(number) / "checkpoint"
        shutil.copytree(whole, folder)
        change(folder)
        return folder

    refused(damaged(1, lambda folder: (folder / last).unlink()), f"lacks the shard {last}")
    cut = damaged(2, lambda folder: (folder / first).write_bytes((folder / first).read_bytes()[:-7]))
    refused(cut, f"{first} is cut off or damaged")
    refused(damaged(3, lambda folder: (folder / first).write_bytes(b"")), f"{first} is cut off or damaged")
    refused(damaged(4, lambda folder: (folder / INDEX_FILE).write_text('{"weight_map": 3}')), "is not an index")
    refused(damaged(5, lambda folder: (folder / INDEX_FILE).unlink()), "no safetensors file")
    refused(damaged(6, lambda folder: (folder / "config.json").write_text("{")), "is not a configuration")
    refused(damaged(7, lambda folder: (folder / "config.json").unlink()), "no config.json")
    refused(damaged(8, lambda folder: (folder / "tokenizer.json").unlink()), "no tokenizer that can be loaded")
    outside = json.dumps({"weight_map": {"x": "../../model.safetensors"}})
    refused(damaged(9, lambda folder: (folder / INDEX_FILE).write_text(outside)), r"lacks the shard \.\./")


def test_a_head_beside_tied_embeddings_is_left_out(changed: Callable[..., Path], tmp_path: Path) -> None:
    def add(state: State) -> None:
        state["lm_head.weight"] = torch.zeros(672, 64)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    write_gguf(changed(add), tmp_path / "out.gguf")
    assert "output.weight" not in {name for name, _, _ in open_gguf(tmp_path / "out.gguf").tensors()}


def test_the_hash_covers_every_shard(tiny_model: Callable[..., Path]) -> None:
    whole, sharded = tiny_model("qwen3"), tiny_model("qwen3", shard="60KB")
    assert checkpoint_sha256(whole) == hashlib.sha256((whole / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert checkpoint_sha256(sharded) != checkpoint_sha256(whole)


@pytest.mark.parametrize(
    ("card", "config", "wanted"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", {}, {"general.license": "apache-2.0", "general.name": "cogumi"}),
        (
            "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n---\n",
            {"_name_or_path": "meta-llama/Llama-3.1-8B"},
            {
                "general.license": "other", "general.license.name": "llama3.1", "general.license.link": "LICENSE",
                "general.name": "meta-llama/Llama-3.1-8B",
            },
        ),
        ("# no header", {"license": "mit", "_name_or_path": "/home/me/x"}, {"general.license": "mit"}),
        ("---\nlicense: [\n---\n", {}, {"general.name": "cogumi"}),
    ],
)  # fmt: skip
def test_name_and_licence_are_taken_from_the_card(
    changed: Callable[..., Path], tmp_path: Path, card: str, config: dict[str, Any], wanted: dict[str, str]
) -> None:
    checkpoint = changed(**config)
    (checkpoint / "README.md").write_text(card)
    write_gguf(checkpoint, tmp_path / "out.gguf")
    metadata = open_gguf(tmp_path / "out.gguf").metadata
    assert {"general.name": "cogumi", **wanted} == {
        key: value for key, value in metadata.items() if key.startswith(("general.license", "general.name"))
    }
    assert len(metadata["cogumi.tokenizer_sha256"]) == 64
