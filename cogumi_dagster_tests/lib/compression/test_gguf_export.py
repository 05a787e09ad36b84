import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cogumi_dagster.lib.compression import gguf_export
from cogumi_dagster.lib.compression.gguf_export import export_lora, quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint


def against_transformers(
    checkpoint: Path, gguf: Path, pairs: list[Pair], *, adapter: Path | None = None, lora: Path | None = None
) -> ParityReport:
    model, tokenizer = load_checkpoint(checkpoint, "float32")
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    reference = flatten(answer_logits(model, tokenizer, pairs, 512))
    return parity(reference, flatten(gguf_answer_logits(gguf, tokenizer, pairs, lora=lora)))


@pytest.fixture
def changed(student: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the student with its tensors or its configuration changed."""

    def change(tensors: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(student, copy)
        if tensors:
            state = load_file(copy / "model.safetensors")
            tensors(state)
            save_file(state, copy / "model.safetensors", {"format": "pt"})
        path = copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return copy

    return change


def test_a_tied_export_computes_the_same_function(student: Path, f16_gguf: Path, pairs: list[Pair]) -> None:
    report = against_transformers(student, f16_gguf, pairs[:8])
    assert report.mean_kl <= 1e-4
    assert report.greedy_agreement > 0.98
    assert "output.weight" not in {name for name, _, _ in open_gguf(f16_gguf).tensors()}


def test_an_untied_export_computes_the_same_function(untied_student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    write_gguf(untied_student, tmp_path / "f16.gguf")
    assert "output.weight" in {name for name, _, _ in open_gguf(tmp_path / "f16.gguf").tensors()}
    assert against_transformers(untied_student, tmp_path / "f16.gguf", pairs[:8]).mean_kl <= 1e-4


def test_unpermuted_heads_are_found_by_the_parity(
    student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export, "permute", lambda weight, heads: weight)
    write_gguf(student, tmp_path / "wrong.gguf")
    assert against_transformers(student, tmp_path / "wrong.gguf", pairs[:8]).mean_kl > 1e-2


def test_metadata_template_and_provenance_are_written(student: Path, tmp_path: Path) -> None:
    write_gguf(student, tmp_path / "f32.gguf", type="F32", provenance={"parent_sha256": "abc"})
    file = open_gguf(tmp_path / "f32.gguf")
    _, tokenizer = load_checkpoint(student)
    assert file.metadata["cogumi.parent_sha256"] == "abc"
    assert file.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert file.metadata["tokenizer.ggml.pre"] == "smollm"
    assert file.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert {kind for _, kind, _ in file.tensors()} == {"F32"}


def test_a_missing_tensor_is_named(changed: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = changed(lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CogumiError, match=r"lacks 1 tensor\(s\), blk.1.ffn_up.weight first"):
        write_gguf(checkpoint, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_float16_cannot_hold_are_refused(
    changed: Callable[..., Path], tmp_path: Path, value: float
) -> None:
    def spoil(state: dict[str, Any]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    with pytest.raises(CogumiError, match=r"model.layers.0.mlp.up_proj.weight holds"):
        write_gguf(changed(spoil), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "qwen2"}, "'qwen2' checkpoint"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'linear'"),
        ({"tie_word_embeddings": False}, "output.weight first"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    changed: Callable[..., Path], tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CogumiError, match=problem):
        write_gguf(changed(**config), tmp_path / "out.gguf")


def test_a_folder_that_is_no_checkpoint_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match=r"no config.json"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
    shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CogumiError, match="no safetensors file"):
        write_gguf(tmp_path / "bare", tmp_path / "out.gguf")


def test_quantizing_reports_what_was_stored(f16_gguf: Path, tmp_path: Path) -> None:
    report = quantize_gguf(f16_gguf, tmp_path / "q.gguf", "Q8_0")
    assert report.bytes == (tmp_path / "q.gguf").stat().st_size
    assert set(report.tensor_types) == {"F32", "Q8_0"}
    assert report.parameters == sum(report.tensor_types.values())
    assert report.bits_per_weight == pytest.approx(8 * report.bytes / report.parameters)


def test_an_unknown_type_or_a_refused_file_is_an_error(f16_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="unknown quantization 'Q5_KM'") as caught:
        quantize_gguf(f16_gguf, tmp_path / "q.gguf", "Q5_KM")
    assert caught.value.mend == "did you mean 'Q5_K_M'?"
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(CogumiError, match=r"llama\.cpp could not quantize"):
        quantize_gguf(tmp_path / "bad.gguf", tmp_path / "q.gguf", "Q8_0")


def test_an_exported_adapter_is_the_trained_one(
    student: Path, f16_gguf: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    lora = tmp_path / "lora.gguf"
    size = export_lora(adapter, lora, base=student, contract={"base_sha256": "abc"})
    assert size == lora.stat().st_size
    assert open_gguf(lora).metadata["cogumi.base_sha256"] == "abc"
    assert against_transformers(student, f16_gguf, pairs[:8], adapter=adapter, lora=lora).mean_kl <= 1e-4
    assert against_transformers(student, f16_gguf, pairs[:8], adapter=adapter).mean_kl > 1e-2, "it changes the answers"


def with_config(adapter: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return out


def test_a_module_with_its_own_alpha_is_scaled_by_it(
    student: Path, f16_gguf: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    other = with_config(adapter, tmp_path / "adapter", alpha_pattern={"q_proj": 2, "down_proj": 16})
    export_lora(other, tmp_path / "lora.gguf", base=student, contract={})
    report = against_transformers(student, f16_gguf, pairs[:8], adapter=other, lora=tmp_path / "lora.gguf")
    assert report.mean_kl <= 1e-4


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_an_adapter_that_gguf_cannot_express_is_refused(
    student: Path, adapter: Path, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    with pytest.raises(CogumiError, match=what):
        export_lora(with_config(adapter, tmp_path / "a", **config), tmp_path / "lora.gguf", base=student, contract={})
    assert not (tmp_path / "lora.gguf").exists()


def test_a_tensor_that_is_no_lora_matrix_is_refused(student: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = next(iter(tensors.values())).clone()
    save_file(tensors, path)
    with pytest.raises(CogumiError, match="is not a LoRA matrix"):
        export_lora(tmp_path / "a", tmp_path / "lora.gguf", base=student, contract={})
