import math
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import _cosine, evaluation_loss, load_base, train_lora

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
    assert 0 <= report.padding_share < 0.5
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
    assert report.precision.startswith("NF4 + ")
    assert math.isfinite(report.validation_loss_after)
    assert any(any(values) for name, values in weights(tmp_path / "out").items() if "lora_B" in name)


def test_a_four_bit_base_is_frozen_and_packed(student: Path) -> None:
    model, _ = load_base(student, four_bit=True, device="cpu")
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "Params4bit"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_validation_there_is_no_figure(student: Path) -> None:
    assert math.isnan(evaluation_loss(None, [], 10, 0))


def test_the_rate_warms_up_and_falls_to_nearly_nothing() -> None:
    rates = [_cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.02
