import math
from pathlib import Path

import pytest
import torch

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.training import loop
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.launch import train_lora_on
from cogumi_dagster.lib.training.loop import cosine, evaluation_loss
from cogumi_dagster.lib.training.lora import TrainingReport, load_base, train_lora, unpack_four_bit
from cogumi_dagster.lib.training.packing import Packed
from cogumi_dagster.lib.training.precision import compute_dtype

SIX_STEPS = LoraConfig(
    rank_attention=4, rank_feed_forward=2, alpha=8, dropout=0.1, learning_rate=3e-3, max_steps=6, save_every=2,
    batch_tokens=256, max_length=128, epochs=3, load_in_4bit=False,
)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library may catch it."""


def kill_after(step: int) -> object:
    def progress(done: int, total: int, note: str) -> None:
        if done == step:
            raise Killed

    return progress


def weights(adapter: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: values.tobytes() for name, values in load_file(adapter / "adapter_model.safetensors").items()}


@pytest.fixture(scope="module")
def whole(student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("whole")
    report = train_lora(student, pairs, folder / "out", SIX_STEPS, validation=pairs[:4], scratch=folder / "s")
    return folder / "out", report


def test_training_lowers_the_loss_and_reports_it(whole: tuple[Path, object], pairs: list[Pair]) -> None:
    report = whole[1]
    assert report.steps == 6 and report.resumed_from == 0
    assert report.examples == len(pairs) and report.too_long == 0
    assert report.validation_loss_after < report.validation_loss_before
    assert report.loss_last < report.loss_first
    assert [step for step, _ in report.curve] == [1, 2, 3, 4, 5, 6]
    assert report.row_tokens == SIX_STEPS.batch_tokens and report.notes == ()
    assert set(report.curves) == {"learning rate", "gradient norm", "tokens per second", "validation loss"}
    assert report.utilization > 0 and report.flops_per_second > 0
    assert 0 < report.supervised_tokens < report.tokens
    # 2 layers: q, o (64x64) and k, v (64x32) of rank 4, gate, up, down (64x128) of rank 2
    assert report.trainable_parameters == 2 * (4 * 2 * (64 + 64) + 4 * 2 * (64 + 32) + 2 * 3 * (64 + 128))


@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_killed_and_resumed_run_gives_the_same_bits(
    student: Path, pairs: list[Pair], whole: tuple[Path, object], tmp_path: Path, killed_at: int
) -> None:
    with pytest.raises(Killed):
        train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s", progress=kill_after(killed_at))
    assert not (tmp_path / "out").exists()
    report = train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")
    assert report.resumed_from == 2  # the callback of step 4 comes before its checkpoint is written
    assert report.steps == 6
    assert report.curve == whole[1].curve
    assert weights(tmp_path / "out") == weights(whole[0])


def test_a_corrupted_newest_checkpoint_falls_back_to_the_one_before(
    student: Path, pairs: list[Pair], whole: tuple[Path, object], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s", progress=kill_after(5))
    state = tmp_path / "s" / "step-000004" / "state.pt"
    middle = state.stat().st_size // 2
    data = state.read_bytes()
    state.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    report = train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")
    assert report.resumed_from == 2
    assert weights(tmp_path / "out") == weights(whole[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    wild = SIX_STEPS.model_copy(update={"learning_rate": 1e30, "save_every": 1, "warmup_share": 0.0})
    with pytest.raises(CogumiError, match=r"(the loss is (nan|inf)|gradient is not finite) at step 2") as caught:
        train_lora(student, pairs, tmp_path / "out", wild, scratch=tmp_path / "s")
    assert "lower training.learning_rate" in caught.value.mend
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "s" / "step-000001").is_dir()


def test_nothing_to_train_on_is_an_error(student: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="no example to train on"):
        train_lora(student, [], tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")


def test_four_bit_training_works_on_a_cpu(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    config = SIX_STEPS.model_copy(update={"load_in_4bit": True, "max_steps": 2})
    report = train_lora(student, pairs, tmp_path / "out", config, scratch=tmp_path / "s", validation=pairs[:2])
    assert report.precision == f"NF4 (unpacked once) + {compute_dtype('cpu')}".replace("torch.", "")
    assert math.isfinite(report.validation_loss_after)
    assert any(any(values) for name, values in weights(tmp_path / "out").items() if "lora_B" in name)


def test_a_four_bit_base_is_frozen_and_packed(student: Path) -> None:
    model, _ = load_base(student, four_bit=True, device="cpu")
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "Params4bit"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_unpacked_once_computes_what_the_packed_base_computes(student: Path) -> None:
    model, tokenizer = load_base(student, four_bit=True, device="cpu")
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        packed = model(ids).logits
        assert unpack_four_bit(model, 100_000) == 0, "no room: left as it is"
        assert unpack_four_bit(model, 10**9) == 14
        unpacked = model(ids).logits
    plain, _ = load_base(student, four_bit=False, device="cpu")
    with torch.no_grad():
        rounded = (plain(ids).logits - packed).abs().max()
    assert (unpacked - packed).abs().max() < 1e-4 < rounded
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_evaluating_a_packed_base_leaves_its_gradients(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # what sets a layer's flag
    model, tokenizer = load_base(student, four_bit=True, device="cpu")
    assert not model.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        model.eval()(ids)
    first = model.model.layers[0].self_attn.q_proj
    seen = torch.randn(3, first.in_features, dtype=model.dtype, requires_grad=True)
    first(seen).sum().backward()
    assert seen.grad is not None and seen.grad.abs().sum() > 0


def test_without_validation_there_is_no_figure(student: Path) -> None:
    assert math.isnan(evaluation_loss(None, [], 10))


def test_positions_beyond_the_context_are_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    far = SIX_STEPS.model_copy(update={"position_skips": 100_000})
    with pytest.raises(
        CogumiError, match=r"positions of up to 400\d+ do not fit in the student's context of \d+"
    ) as caught:
        train_lora(student, pairs, tmp_path / "out", far, scratch=tmp_path / "s")
    assert "position_skips" in str(caught.value) and not (tmp_path / "out").exists()


def test_the_rate_warms_up_and_falls_to_nearly_nothing() -> None:
    rates = [cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.02


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory", "could not create a primitive"])
def test_memory_that_runs_out_halves_the_rows_and_changes_nothing_else(
    student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    calm = SIX_STEPS.model_copy(update={"dropout": 0.0, "position_skips": 9})
    plain = train_lora(student, pairs, tmp_path / "plain", calm, scratch=tmp_path / "s1")
    real = loop.answer_losses

    def small_machine(model: object, packed: Packed) -> object:
        if packed.tokens > 150:
            raise RuntimeError(words)
        return real(model, packed)

    monkeypatch.setattr(loop, "answer_losses", small_machine)
    report = train_lora(student, pairs, tmp_path / "out", calm, scratch=tmp_path / "s2")
    assert report.notes and "out of memory at step 1: rows of" in report.notes[0]
    assert report.row_tokens <= 150
    assert [loss for _, loss in report.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)


def test_an_example_that_does_not_fit_in_memory_alone_ends_the_run(
    student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_machine(model: object, packed: Packed) -> object:
        raise MemoryError

    monkeypatch.setattr(loop, "answer_losses", no_machine)
    with pytest.raises(MemoryError):
        train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")


def test_an_exploding_loss_stops_with_step_rate_and_examples(
    student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = loop.answer_losses, []

    def explodes(model: object, packed: Packed) -> object:
        seen.append(packed)
        return real(model, packed) * (50 if len(seen) > 11 else 1)

    monkeypatch.setattr(loop, "answer_losses", explodes)
    long = SIX_STEPS.model_copy(update={"max_steps": 14, "epochs": 10})
    with pytest.raises(CogumiError, match=r"the loss has exploded to .* at step 12 \(learning rate .*, examples \["):
        train_lora(student, pairs, tmp_path / "out", long, scratch=tmp_path / "s")


def test_training_stops_early_and_keeps_the_best_weights(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    wild = SIX_STEPS.model_copy(
        update={"learning_rate": 3e-2, "evaluate_every": 1, "patience": 2, "max_steps": 40, "epochs": 40}
    )
    report = train_lora(student, pairs[4:], tmp_path / "out", wild, validation=pairs[:4], scratch=tmp_path / "s")
    assert report.stopped_early and report.steps < 40
    losses = [loss for _, loss in report.curves["validation loss"]]
    assert report.validation_loss_after == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < min(losses[-2:]) if len(losses) > 2 else True


@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_run_with_evaluations_resumes_to_the_same_bits(
    student: Path, pairs: list[Pair], tmp_path: Path, killed_at: int
) -> None:
    config = SIX_STEPS.model_copy(update={"evaluate_every": 2, "patience": 3, "position_skips": 9})
    whole = train_lora(student, pairs, tmp_path / "whole", config, validation=pairs[:4], scratch=tmp_path / "w")
    with pytest.raises(Killed):
        train_lora(
            student, pairs, tmp_path / "out", config, validation=pairs[:4], scratch=tmp_path / "s",
            progress=kill_after(killed_at),
        )  # fmt: skip
    report = train_lora(student, pairs, tmp_path / "out", config, validation=pairs[:4], scratch=tmp_path / "s")
    assert report.resumed_from > 0
    assert report.curves["validation loss"] == whole.curves["validation loss"]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_killed_in_the_middle_of_a_save_it_resumes_from_the_one_before(
    student: Path, pairs: list[Pair], whole: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogumi_dagster.lib import resume

    real, saves = resume.os.replace, []

    def killed(source: Path, target: Path) -> None:
        saves.append(target)
        if len(saves) == 2:
            raise Killed
        real(source, target)

    monkeypatch.setattr(resume.os, "replace", killed)
    with pytest.raises(Killed):
        train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")
    monkeypatch.undo()
    assert any(path.name.startswith(".tmp-") for path in (tmp_path / "s").iterdir())
    report = train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s")
    assert report.resumed_from == 2
    assert weights(tmp_path / "out") == weights(whole[0])


def test_checkpoints_of_other_data_are_not_taken(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_lora(student, pairs, tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s", progress=kill_after(5))
    assert train_lora(student, pairs[1:], tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s").resumed_from == 0


def test_gradient_checkpointing_gives_the_same_losses(
    student: Path, pairs: list[Pair], whole: tuple[Path, TrainingReport], tmp_path: Path
) -> None:
    config = SIX_STEPS.model_copy(update={"gradient_checkpointing": True})
    report = train_lora(student, pairs, tmp_path / "out", config, scratch=tmp_path / "s")
    assert [loss for _, loss in report.curve] == pytest.approx([loss for _, loss in whole[1].curve], rel=1e-4)


def test_two_processes_learn_what_one_learns(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    calm = SIX_STEPS.model_copy(update={"dropout": 0.0, "max_steps": 3})
    one = train_lora(student, pairs, tmp_path / "one", calm, validation=pairs[:4], scratch=tmp_path / "s1")
    seen: list[int] = []
    two = train_lora_on(
        2, student, pairs, tmp_path / "two", calm, validation=pairs[:4], scratch=tmp_path / "s2",
        progress=lambda done, total, note: seen.append(done),
    )  # fmt: skip
    assert seen == [1, 2, 3]
    assert [loss for _, loss in two.curve] == pytest.approx([loss for _, loss in one.curve], rel=1e-3)
    assert two.validation_loss_after == pytest.approx(one.validation_loss_after, rel=1e-3)
    assert (tmp_path / "two" / "adapter_model.safetensors").is_file()


def test_an_error_in_one_of_several_processes_reaches_the_user(
    student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    with pytest.raises(CogumiError, match="none of 1 examples fits in"):
        train_lora_on(
            2, student, [Pair("Say much.", "much " * 200)], tmp_path / "out", SIX_STEPS, scratch=tmp_path / "s"
        )
