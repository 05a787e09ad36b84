"""llama.cpp with our adapter computes what PEFT computes, or the export is refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogumi_dagster.lib.compression import gguf_lora
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE, export_lora, export_own_lora
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError

PARITY, BROKEN = 1e-4, 1e-2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"

Logits, Divergence, Model = Callable[..., Any], Callable[[Any, Any], float], Callable[..., Path]


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint, LoraConfig's arguments -> a PEFT adapter of random A and B that moves the logits."""

    def make(checkpoint: Path, **arguments: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | arguments
        torch.manual_seed(2)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), LoraConfig(**config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def plain(tiny_model: Model, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(tiny_model("llama"))


def altered(adapter: Path, out: Path, change: Callable[[dict[str, Any]], Any] | None = None, **config: Any) -> Path:
    shutil.copytree(adapter, out)
    path = out / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change:
        tensors = load_file(out / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, out / WEIGHTS_FILE)
    return out


PATTERNS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "rank_pattern": {"gate_proj": 2, r"layers\.1\..*\.q_proj": 3, "down_proj": 6},
    "alpha_pattern": {"k_proj": 4, "^model.layers.0.mlp.up_proj": 40, r"layers\.1\..*": 6},
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "ranks and alphas by pattern": ("llama", {}, PATTERNS),
    "one layer": ("qwen3", {}, {"layers_to_transform": [1]}),
    "head": ("qwen2", {"tie_word_embeddings": False}, {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": ("llama", {"tie_word_embeddings": False}, {"target_modules": ["k_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_exported_adapter_is_the_trained_one(
    name: str,
    tiny_model: Model,
    make_adapter: Callable[..., Path],
    logits_of: Logits,
    mean_kl: Divergence,
    tmp_path: Path,
) -> None:
    architecture, model, config = CASES[name]
    checkpoint = tiny_model(architecture, **model)
    adapter = make_adapter(checkpoint, **config)
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    size = export_lora(adapter, tmp_path / "lora.gguf", base=checkpoint, contract={"base_sha256": "abc"})
    assert size == (tmp_path / "lora.gguf").stat().st_size
    assert open_gguf(tmp_path / "lora.gguf").metadata["cogumi.base_sha256"] == "abc"
    wanted = logits_of(checkpoint, adapter)
    assert mean_kl(wanted, logits_of(tmp_path / "f16.gguf", tmp_path / "lora.gguf")) <= PARITY
    assert mean_kl(wanted, logits_of(tmp_path / "f16.gguf")) > BROKEN, "it changes the answers"
    half = export_lora(adapter, tmp_path / "half.gguf", base=checkpoint, contract={}, type="F16")
    stored = open_gguf(tmp_path / "half.gguf").reader.tensors
    assert {tensor.tensor_type.name for tensor in stored} == {"F16"} and half < size
    assert mean_kl(wanted, logits_of(tmp_path / "f16.gguf", tmp_path / "half.gguf")) <= PARITY


def test_an_unscaled_adapter_would_be_noticed(
    tiny_model: Model, make_adapter: Callable[..., Path], logits_of: Logits, mean_kl: Divergence, tmp_path: Path
) -> None:
    checkpoint = tiny_model("llama")
    adapter = make_adapter(checkpoint, **PATTERNS)
    unscaled = altered(adapter, tmp_path / "unscaled", alpha_pattern={})
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    export_lora(unscaled, tmp_path / "lora.gguf", base=checkpoint, contract={})
    assert mean_kl(logits_of(checkpoint, adapter), logits_of(tmp_path / "f16.gguf", tmp_path / "lora.gguf")) > BROKEN


def test_heads_in_the_wrong_order_would_be_noticed(
    tiny_model: Model,
    plain: Path,
    logits_of: Logits,
    mean_kl: Divergence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tiny_model("llama")
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    monkeypatch.setattr(gguf_lora, "permute", lambda weight, heads: weight)
    export_lora(plain, tmp_path / "wrong.gguf", base=checkpoint, contract={})
    assert mean_kl(logits_of(checkpoint, plain), logits_of(tmp_path / "f16.gguf", tmp_path / "wrong.gguf")) > BROKEN


def test_an_adapter_works_on_a_quantized_base(
    tiny_model: Model, plain: Path, logits_of: Logits, mean_kl: Divergence, tmp_path: Path
) -> None:
    checkpoint = tiny_model("llama")
    write_gguf(checkpoint, tmp_path / "f16.gguf")
    quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q.gguf", "Q8_0")
    export_lora(plain, tmp_path / "lora.gguf", base=checkpoint, contract={})
    wanted = logits_of(checkpoint, plain)
    assert mean_kl(wanted, logits_of(tmp_path / "q.gguf", tmp_path / "lora.gguf")) < BROKEN
    assert mean_kl(wanted, logits_of(tmp_path / "q.gguf")) > BROKEN


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"use_rslora": True}, "uses rsLoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trains biases"),
        ({"lora_bias": True}, "biases of its own"),
        ({"trainable_token_indices": [1]}, "single embeddings"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "started with pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "started with loftq"),
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"lora_alpha": 0}, "has alpha 0"),
    ],
)
def test_what_a_gguf_adapter_cannot_express_is_refused(
    tiny_model: Model, plain: Path, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    with pytest.raises(CogumiError, match=f"{what}.*: a GGUF adapter cannot express that") as caught:
        export_lora(
            altered(plain, tmp_path / "a", **config), tmp_path / "lora.gguf", base=tiny_model("llama"), contract={}
        )
    assert "merge the adapter" in caught.value.mend
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:.*tied")
def test_tied_embeddings_and_head_are_refused(
    target: str, tiny_model: Model, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_model("llama"), target_modules=["q_proj", target])
    with pytest.raises(CogumiError, match=f"adapts .*{target}, but here it is one tensor with the other"):
        export_lora(adapter, tmp_path / "lora.gguf", base=tiny_model("llama"), contract={})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.clear(), "holds no LoRA matrix"),
        (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "has only one of A and B"),
        (lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), "is not a LoRA matrix"),
        (lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(float("nan")), "holds NaN"),
        (lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(5, 64)}), r"is \(5, 64\), rank and base"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3, 3)}), "of its own"),
    ],
)
def test_damaged_adapters_are_refused(
    tiny_model: Model, plain: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    with pytest.raises(CogumiError, match=problem):
        export_lora(
            altered(plain, tmp_path / "a", change), tmp_path / "lora.gguf", base=tiny_model("llama"), contract={}
        )
    assert not (tmp_path / "lora.gguf").exists()


def test_files_that_are_missing_or_cut_off_are_named(tiny_model: Model, plain: Path, tmp_path: Path) -> None:
    def refused(name: str, problem: str, content: bytes | None) -> None:
        folder = altered(plain, tmp_path / problem[:9])
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(CogumiError, match=problem):
            export_lora(folder, tmp_path / "lora.gguf", base=tiny_model("llama"), contract={})

    refused(CONFIG_FILE, "is not a PEFT adapter", None)
    refused(CONFIG_FILE, "not an adapter's configuration", b"{")
    refused(WEIGHTS_FILE, "holds no adapter_model", None)
    refused(WEIGHTS_FILE, "cut off or damaged", (plain / WEIGHTS_FILE).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("llama", {"hidden_size": 128}, r"its B of .* is \(64, 4\), rank and base make it \(128, 4\)"),
        ("llama", {"num_hidden_layers": 1}, "a llama of 1 layers has no model.layers.1"),
        ("qwen3", {}, r"is for another base: its B of .*k_proj"),
    ],
)
def test_an_adapter_for_another_base_is_refused(
    architecture: str, changes: dict[str, Any], problem: str, tiny_model: Model, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(CogumiError, match=problem):
        export_lora(plain, tmp_path / "lora.gguf", base=tiny_model(architecture, **changes), contract={})


def test_a_base_of_the_same_shape_is_known_by_its_weights(tiny_model: Model, plain: Path, tmp_path: Path) -> None:
    trained_on, other = tiny_model("llama"), tiny_model("llama", initializer_range=0.13)
    with pytest.raises(CogumiError, match="whose weights are not those of") as caught:
        export_own_lora(plain, tmp_path / "lora.gguf", other)
    assert caught.value.mend == f"give --base {trained_on}"
    shutil.copytree(trained_on, tmp_path / "copy")
    export_own_lora(plain, tmp_path / "lora.gguf", tmp_path / "copy")
    metadata = open_gguf(tmp_path / "lora.gguf").metadata
    assert len(metadata["cogumi.parent_sha256"]) == len(metadata["cogumi.tokenizer_sha256"]) == 64
