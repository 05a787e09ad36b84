import json
from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.gguf_lora import export_lora
from cogumi_dagster.lib.compression.predict import predict_bytes
from cogumi_dagster.lib.planning.shapes import find_student, presets, read_folder
from cogumi_dagster.lib.planning.sizes import (
    adapter_bytes,
    adapter_parameters,
    checkpoint_bytes,
    gguf_adapter_bytes,
    gguf_bytes,
    nf4_bytes,
    w4a16_bytes,
)
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.training.lora import load_base


@pytest.mark.parametrize(
    ("student", "type", "published"),
    [
        ("Llama-3.1-8B", "Q4_K_M", 4_920_739_232),  # the Instruct models' files on the Hugging Face hub
        ("Llama-3.2-1B", "Q4_K_M", 807_694_464),
        ("Qwen2.5-0.5B", "Q4_K_M", 397_808_192),
        ("Qwen2.5-1.5B", "Q4_K_M", 986_048_768),
        ("Qwen3-0.6B", "Q8_0", 639_446_688),
        ("SmolLM2-135M", "Q5_K_M", 112_103_200),  # docs/results.md
    ],
)
def test_published_files_are_predicted_to_a_ten_thousandth(student: str, type: str, published: int) -> None:
    assert gguf_bytes(presets()[student], type) == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize(
    ("type", "bits"),
    [("Q2_K", 3.1593), ("IQ4_NL", 4.6818), ("Q4_K_M", 4.8944), ("Q5_K_M", 5.7036), ("Q6_K", 6.5633), ("Q8_0", 8.5008),
     ("F16", 16.0005)],
)  # fmt: skip
def test_bits_a_weight_of_llama_8b_are_those_that_llama_cpp_publishes(type: str, bits: float) -> None:
    """tools/quantize/README.md of llama.cpp, Llama-3.1-8B; without the header."""
    shape = presets()["Llama-3.1-8B"]
    assert 8 * predict_bytes(shape.gguf_tensors, type, 0) / shape.parameters == pytest.approx(bits, abs=1e-4)


def test_checkpoint_and_adapters_are_predicted(
    student: Path, adapter: Path, lora_config: LoraConfig, tmp_path: Path
) -> None:
    shape = read_folder(student)
    assert checkpoint_bytes(shape) == pytest.approx((student / "model.safetensors").stat().st_size, abs=16)
    assert adapter_bytes(shape, lora_config) == pytest.approx(
        (adapter / "adapter_model.safetensors").stat().st_size, abs=16
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"], "attention and feed-forward have ranks of their own"
    assert adapter_parameters(shape, lora_config) < adapter_bytes(shape, lora_config) / 4


def test_a_gguf_adapter_is_predicted(student: Path, adapter: Path, lora_config: LoraConfig, tmp_path: Path) -> None:
    shape = read_folder(student)
    size = export_lora(adapter, tmp_path / "adapter.gguf", base=student, contract={"base_sha256": "0" * 64}, type="F16")
    trained = 2 * adapter_parameters(shape, lora_config)
    equal = 2 * adapter_parameters(shape, LoraConfig(rank_attention=4, rank_feed_forward=4))
    assert gguf_adapter_bytes(shape, 4) - equal == pytest.approx(size - trained, abs=400)


def test_nf4_is_what_bitsandbytes_holds(full_student: Path) -> None:
    model, _ = load_base(full_student, four_bit=True, device="cpu")
    held = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    shape = read_folder(full_student)
    wide = next(model.parameters()).element_size() - 2  # this CPU's embeddings and norms are in float32
    rest = shape.parameters - shape.linear_parameters
    assert nf4_bytes(shape) + wide * rest == pytest.approx(held, rel=0.01)


def test_w4a16_is_what_compressed_tensors_writes() -> None:
    measured = 114_029_456  # docs/results.md, groups of 64, asymmetric
    shape = find_student("SmolLM2-135M")
    assert w4a16_bytes(shape, 64, symmetric=False) == pytest.approx(measured, rel=1e-4)
    assert w4a16_bytes(shape, 64, symmetric=True) < w4a16_bytes(shape, 64, symmetric=False)
    assert w4a16_bytes(shape, 32, symmetric=True) > w4a16_bytes(shape, 64, symmetric=True)
