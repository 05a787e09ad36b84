"""Training on a GPU: what it computes is what the CPU computes. Run with ``-m gpu``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogumi_dagster.lib.compression.awq import export_w4a16, fold_awq_scales
from cogumi_dagster.lib.compression.compressor import load_sound
from cogumi_dagster.lib.compression.gradual import prune
from cogumi_dagster.lib.compression.recover import recover, train_masked
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import AwqConfig, LoraConfig, PruningConfig, RecoveryConfig
from cogumi_dagster.lib.training.batches import Encoded, Pair, encode_pairs
from cogumi_dagster.lib.training.launch import train_lora_on
from cogumi_dagster.lib.training.lora import TrainingReport, load_base, train_lora
from cogumi_dagster.lib.training.packing import answer_losses, pack, packed_attention, packed_rows, segments_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

STEPS = LoraConfig(
    rank_attention=4, rank_feed_forward=2, alpha=8, dropout=0.0, learning_rate=3e-3, max_steps=12, save_every=4,
    batch_tokens=512, max_length=128, epochs=20, load_in_4bit=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu(student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    folder = tmp_path_factory.mktemp("cpu")
    return train_lora(student, pairs, folder / "out", STEPS, validation=pairs[:6], scratch=folder / "s")


@pytest.fixture
def train(student: Path, pairs: list[Pair], tmp_path: Path) -> Callable[..., TrainingReport]:
    def run(name: str = "out", **changes: Any) -> TrainingReport:
        return train_lora(
            student, pairs, tmp_path / name, STEPS.model_copy(update=changes), validation=pairs[:6],
            scratch=tmp_path / f"scratch-{name}", device="cuda",
        )  # fmt: skip

    return run


@pytest.mark.parametrize("shared", [0, 17])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_kernel_s_attention_is_each_example_s_own(shared: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    bounds = (shared, shared + 5, shared + 70, shared + 71, shared + 400)
    sides = [torch.randn(1, heads, bounds[-1], 64, device="cuda", dtype=precision) for heads in (9, 3, 3)]
    given = torch.randn(1, bounds[-1], 9, 64, device="cuda")
    segments = segments_of(bounds, shared, "cuda")
    found = []
    for exact in (False, True):
        leaves = [(side.double() if exact else side).detach().clone().requires_grad_() for side in sides]
        q, k, v = leaves
        out, _ = packed_attention(None, q, k, v, None, bounds=bounds, shared=shared, segments=segments)
        assert out.shape == (1, bounds[-1], 9, 64)
        out.backward(given.to(out.dtype))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, true in zip(*found, strict=True):
        assert (one.double() - true).norm() < (0.01 if precision is torch.bfloat16 else 1e-5) * true.norm()


def test_losses_and_gradients_are_the_cpu_s(student: Path, pairs: list[Pair]) -> None:
    encoded: list[Encoded] = []
    found = []
    for device in ("cpu", "cuda"):
        model, tokenizer = load_base(student, four_bit=False, device=device)
        model = model.float() if device == "cpu" else model
        encoded = encoded or encode_pairs(tokenizer, pairs[:12], 512)[0]
        weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
        loss = answer_losses(model, pack(encoded))
        loss.backward()
        with torch.no_grad():
            alone = sum(float(answer_losses(model, pack([item]))) for item in encoded)
        assert float(loss.detach()) == pytest.approx(alone, rel=1e-4 if device == "cpu" else 5e-3)
        found.append((float(loss.detach()), weight.grad.float().cpu()))
    (exact, exact_grad), (loss, grad) = found
    assert loss == pytest.approx(exact, rel=0.01)
    assert (grad - exact_grad).norm() < 0.05 * exact_grad.norm()


def test_training_takes_the_cpu_s_steps(train: Callable[..., TrainingReport], on_cpu: TrainingReport) -> None:
    report = train()
    assert report.precision == "bfloat16" and report.peak_memory_bytes > 0
    assert [loss for _, loss in report.curve] == pytest.approx([loss for _, loss in on_cpu.curve], rel=0.03)
    assert report.validation_loss_after == pytest.approx(on_cpu.validation_loss_after, rel=0.03)
    assert report.loss_last < report.loss_first


def test_a_killed_run_goes_on(train: Callable[..., TrainingReport], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    whole = train("whole")
    save = torch.save

    def then_killed(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        monkeypatch.undo()
        monkeypatch.setattr(torch, "save", dead)

    def dead(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setattr(torch, "save", then_killed)
    with pytest.raises(Killed):
        train("killed")
    monkeypatch.undo()
    report = train("killed")
    assert report.resumed_from == 4 and report.steps == 12
    assert [loss for _, loss in report.curve] == pytest.approx([loss for _, loss in whole.curve], rel=0.02)


def test_four_bit_checkpointing_and_dropout(train: Callable[..., TrainingReport], on_cpu: TrainingReport) -> None:
    pytest.importorskip("bitsandbytes")
    report = train(load_in_4bit=True, gradient_checkpointing=True, dropout=0.1)
    assert report.precision == "NF4 + bfloat16"
    assert report.validation_loss_after < report.validation_loss_before
    assert report.loss_last == pytest.approx(on_cpu.loss_last, rel=0.2)


def test_more_processes_than_gpus_are_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(CogumiError, match=f"there are {count} GPUs"):
        train_lora_on(count + 1, student, pairs, tmp_path / "out", STEPS, scratch=tmp_path / "s", device="cuda")


def test_recovery_on_a_gpu_keeps_the_zeros(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    half = PruningConfig(method="magnitude", sparsity_attention=0.5, sparsity_feed_forward=0.5)
    steps = RecoveryConfig(steps=8, learning_rate=2e-3, batch_tokens=512, hardest_share=0.5)
    prune(student, [], pairs[:2], tmp_path / "pruned", half, scratch=tmp_path / "s", device="cuda")
    reports = [
        recover(
            tmp_path / "pruned", student, pairs, pairs[:8], tmp_path / device, steps,
            scratch=tmp_path / f"s-{device}", device=device,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    cpu, gpu = reports
    assert gpu.mask_intact and gpu.zeros == cpu.zeros > 0
    assert gpu.perplexity_parent == pytest.approx(cpu.perplexity_parent, rel=1e-3)
    assert gpu.perplexity_recovered == pytest.approx(cpu.perplexity_recovered, rel=0.05)
    assert gpu.perplexity_recovered < gpu.perplexity_pruned


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_gradual_pruning_trains_on_a_gpu(student: Path, pairs: list[Pair], tmp_path: Path, method: Any) -> None:
    between = RecoveryConfig(steps=4, learning_rate=1e-3, batch_tokens=512)
    config = PruningConfig(
        method=method, sparsity_attention=0.3, sparsity_feed_forward=0.3, schedule=[0.1, 0.22], between=between,
        calibration_samples=8, calibration_tokens=64,
    )  # fmt: skip
    report = prune(student, pairs, pairs[:4], tmp_path / "pruned", config, scratch=tmp_path / "s", device="cuda")
    assert report.masks_intact and report.sparsity == pytest.approx(0.22, abs=0.03)
    first = report.pruning[1]
    assert first.perplexity_recovered < first.perplexity


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_awq_and_the_four_bit_export_where_there_is_a_gpu(
    student: Path, pairs: list[Pair], tmp_path: Path, rounding: Any
) -> None:
    """llm-compressor takes the accelerator by itself, and leaves the model there."""
    config = AwqConfig(group_size=32, calibration_samples=2, calibration_tokens=32, grid=4, rounding=rounding)
    folded = fold_awq_scales(student, pairs, pairs[:6], tmp_path / "folded", config)
    assert folded.scaled_layers > 0 and folded.parity.mean_kl < 2e-2
    report = export_w4a16(tmp_path / "folded", pairs, pairs[:6], tmp_path / "w4a16", config)
    assert report.perplexity == pytest.approx(report.perplexity_parent, rel=0.5)


def test_embeddings_train_under_autocast_on_a_gpu(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    model, tokenizer = load_sound(student)
    teacher, _ = load_sound(student)
    model, teacher = model.to("cuda"), teacher.to("cuda")
    config = RecoveryConfig(steps=3, learning_rate=1e-3, batch_tokens=512)
    before = model.get_input_embeddings().weight.detach().clone()
    training = train_masked(model, teacher, tokenizer, pairs, config, scratch=tmp_path / "s", embeddings=True)
    assert training.mask_intact and not torch.equal(before, model.get_input_embeddings().weight)
    with packed_rows(model):
        assert model.config._attn_implementation == "packed"
    assert model.config._attn_implementation != "packed"
