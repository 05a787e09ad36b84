from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.awq import AwqReport, export_w4a16, fold_awq_scales
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import AwqConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import load_checkpoint

CONFIG = AwqConfig(group_size=32, calibration_samples=2, calibration_tokens=32, grid=4)


@pytest.fixture(scope="module")
def folded(student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AwqReport]:
    folder = tmp_path_factory.mktemp("folded") / "checkpoint"
    return folder, fold_awq_scales(student, pairs, pairs[:6], folder, CONFIG)


def test_folding_moves_weights_and_not_logits(student: Path, folded: tuple[Path, AwqReport]) -> None:
    folder, report = folded
    assert report.parity.mean_kl < 2e-2, "only the rounding of scaled weights to bfloat16"
    assert report.parity.greedy_agreement > 0.85
    assert report.scaled_layers > 0
    assert report.calibration_samples == 2
    before, after = (load_checkpoint(path)[0].state_dict() for path in (student, folder))
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)
    assert (folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_the_four_bit_export_loads_in_transformers(
    folded: tuple[Path, AwqReport], pairs: list[Pair], tmp_path: Path
) -> None:
    report = export_w4a16(folded[0], pairs[:6], tmp_path / "w4", CONFIG)
    assert report.group_size == 32
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "w4").glob("*.safetensors"))
    assert report.bytes < sum(path.stat().st_size for path in folded[0].glob("*.safetensors"))
    assert report.perplexity != report.perplexity_parent
    assert report.perplexity == pytest.approx(report.perplexity_parent, rel=1.0)


def test_a_group_size_that_does_not_divide_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    for step in (
        lambda config: fold_awq_scales(student, pairs, pairs[:2], tmp_path / "out", config),
        lambda config: export_w4a16(student, pairs[:2], tmp_path / "out", config),
    ):
        with pytest.raises(CogumiError, match="group size 128 does not divide hidden_size 64") as caught:
            step(CONFIG.model_copy(update={"group_size": 128}))
        assert caught.value.mend == "set group_size to 64"
    assert not (tmp_path / "out").exists()


def test_too_little_calibration_text_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="the calibration set is too small"):
        fold_awq_scales(
            student, pairs[:1], pairs[:2], tmp_path / "out", CONFIG.model_copy(update={"calibration_tokens": 500})
        )
