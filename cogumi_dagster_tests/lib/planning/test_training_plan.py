from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.planning.hardware import THIS_MACHINE, Device
from cogumi_dagster.lib.planning.shapes import presets, read_folder
from cogumi_dagster.lib.planning.sizes import adapter_parameters
from cogumi_dagster.lib.planning.training import (
    Texts,
    base_run,
    fixed_bytes,
    flops_per_token,
    on_device,
    sample_texts,
    token_bytes,
    training_run,
)
from cogumi_dagster.lib.profile import LoraConfig, Profile, read_profile
from cogumi_dagster.lib.training.batches import Encoded
from cogumi_dagster.lib.training.flops import step_flops

SOURCES = Path(__file__).resolve().parents[3] / "resources" / "sources"
TEXTS = Texts(examples=1000, tokens=400.0, answer_tokens=300.0)
SPEC = LoraConfig(batch_tokens=65536, row_tokens=8192, max_length=2048, max_steps=100000, epochs=3)
H100 = Device("H100", 989e12, 80_000_000_000, 3.35e12, 2, 0.3, "data sheet")
CPU = Device(THIS_MACHINE, 1e11, 24_000_000_000, 2e10, 4, 0.5, "made up")


def adapted(checkpoint: Path, config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD, load_base

    model, _ = load_base(checkpoint, four_bit=False, device="cpu")
    ranks = {name: config.rank_feed_forward for name in FEED_FORWARD}
    return get_peft_model(
        model,
        PeftLora(
            r=config.rank_attention,
            rank_pattern=ranks,
            lora_dropout=config.dropout,
            target_modules=[*ATTENTION, *FEED_FORWARD],
            task_type="CAUSAL_LM",
        ),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_training_counts(student: Path, lora_config: LoraConfig, checkpointing: bool) -> None:
    items: Sequence[Encoded] = [Encoded(tuple(range(80)), 50, 0) for _ in range(3)]
    model = adapted(student, lora_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = step_flops(model, items, trained, checkpointing=checkpointing)
    texts = Texts(examples=3, tokens=80.0, answer_tokens=30.0)
    planned = 240 * flops_per_token(read_folder(student), lora_config, texts, checkpointing=checkpointing)
    assert planned == pytest.approx(counted)


def test_a_lora_costs_about_four_operations_a_weight() -> None:
    shape = presets()["Llama-3.1-8B"]
    per_token = flops_per_token(shape, SPEC, TEXTS, checkpointing=False)
    assert per_token / shape.linear_parameters == pytest.approx(4, rel=0.2)
    assert flops_per_token(shape, SPEC, TEXTS, checkpointing=True) / per_token == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_keeps(full_student: Path, dropout: float) -> None:
    """Bytes of all tensors saved for the backward pass of one row, weights left out."""
    import torch

    config = LoraConfig(rank_attention=16, rank_feed_forward=8, alpha=16, dropout=dropout, load_in_4bit=False)
    model = adapted(full_student, config).float().train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so its address stays its own
        return tensor

    ids = torch.arange(256)[None] + 100
    answers = 32
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().model(ids).last_hidden_state
        logits = model.get_base_model().lm_head(hidden[0, -answers:])
        torch.nn.functional.cross_entropy(logits.float(), ids[0, -answers:])
    actual = sum(size for size, _ in kept.values())
    texts = Texts(1, 256.0, float(answers))
    device = replace(CPU, item_bytes=4)
    planned = 256 * token_bytes(read_folder(full_student), config, texts, device, checkpointing=False)
    logits_not_saved = 8 * answers * logits.shape[-1]  # the copy and the gradient, which the hooks do not see
    assert planned - logits_not_saved == pytest.approx(actual, rel=0.25)


def test_memory_is_weights_adapter_and_activations() -> None:
    shape = presets()["Llama-3.1-8B"]
    four, sixteen = (fixed_bytes(shape, SPEC.model_copy(update={"load_in_4bit": b}), H100) for b in (True, False))
    assert sixteen - 2 * shape.parameters == pytest.approx(16 * adapter_parameters(shape, SPEC), abs=1e9)
    assert four < 0.5 * sixteen
    kept, recomputed = (token_bytes(shape, SPEC, TEXTS, H100, checkpointing=c) for c in (False, True))
    assert recomputed < 0.2 * kept


def test_a_device_that_is_too_small_says_so_and_one_that_is_not_trains() -> None:
    shape = presets()["Llama-3.1-8B"]
    run = training_run("base adapter", shape, SPEC, TEXTS, TEXTS.examples * TEXTS.tokens)
    large, medium, small = (
        on_device(shape, SPEC, run, TEXTS, replace(H100, memory_bytes=n * 10**9)) for n in (200, 40, 6)
    )
    assert large.fits and not large.checkpointing
    assert medium.fits and medium.checkpointing, "an 8B in 4 bits fits 40 GB where activations are recomputed"
    assert not small.fits and small.largest_row == 0
    assert medium.tokens_per_second < large.tokens_per_second
    assert medium.largest_row >= run.row_tokens
    edge = replace(run, row_tokens=medium.largest_row + 64)
    assert not on_device(shape, SPEC, edge, TEXTS, replace(H100, memory_bytes=40 * 10**9)).fits
    assert large.seconds == pytest.approx(run.tokens / large.tokens_per_second)
    assert 5_000 < large.tokens_per_second < 20_000


def test_steps_end_with_the_data_or_with_the_profile() -> None:
    shape = presets()["SmolLM2-135M"]
    config = LoraConfig(batch_tokens=1000, max_steps=50, epochs=2)
    short = training_run("x", shape, config, TEXTS, 4_100.0)
    assert (short.tokens, short.steps) == (8200, 9)
    long = training_run("x", shape, config, TEXTS, 1e9)
    assert (long.tokens, long.steps, long.row_tokens) == (50_000, 50, 1000)
    assert training_run("x", shape, config, TEXTS).tokens == 50_000


@pytest.mark.parametrize("name", ["tiny", "quick"])
def test_texts_are_sampled_from_the_sources(name: str) -> None:
    profile: Profile = read_profile(name)
    texts = sample_texts(profile, SOURCES)
    assert 0.8 * 8 / 9 * profile.dataset.examples < texts.examples <= profile.dataset.examples
    assert 0 < texts.answer_tokens < texts.tokens
    assert base_run(presets()["SmolLM2-135M"], profile, texts).tokens > 0
