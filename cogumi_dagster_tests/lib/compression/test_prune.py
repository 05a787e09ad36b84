from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.prune import prune, sparsity_of
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD
from cogumi_dagster.lib.training.student import load_checkpoint


def config(**changes: object) -> PruningConfig:
    given = {
        "calibration_samples": 4,
        "calibration_tokens": 32,
        "sparsity_attention": 0.3,
        "sparsity_feed_forward": 0.6,
    }
    return PruningConfig.model_validate({**given, **changes})


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_each_class_is_as_sparse_as_asked(student: Path, pairs: list[Pair], tmp_path: Path, method: str) -> None:
    report = prune(student, pairs, pairs[:4], tmp_path / "out", config(method=method))
    pruned, _ = load_checkpoint(tmp_path / "out")
    assert sparsity_of(pruned, ATTENTION) == pytest.approx(0.3, abs=0.02)
    assert sparsity_of(pruned, FEED_FORWARD) == pytest.approx(0.6, abs=0.02)
    assert (report.sparsity_attention, report.sparsity_feed_forward) == (
        sparsity_of(pruned, ATTENTION),
        sparsity_of(pruned, FEED_FORWARD),
    )
    assert report.sparsity_missing < 0.02
    assert report.zeros == sum(int((p == 0).sum()) for p in pruned.parameters())
    assert report.calibration_samples == (0 if method == "magnitude" else 4)
    assert report.perplexity_after != report.perplexity_before


def test_magnitude_takes_the_smallest_and_keeps_the_rest(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    prune(student, [], pairs[:2], tmp_path / "out", config(method="magnitude"))
    before, after = (load_checkpoint(f)[0].model.layers[0].mlp.up_proj.weight for f in (student, tmp_path / "out"))
    gone = after == 0
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert (before[~gone] == after[~gone]).all()


def test_two_of_four_holds_in_every_group(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    wanted = config(sparsity_attention=0.5, sparsity_feed_forward=0.5, mask_structure="2:4")
    report = prune(student, pairs, pairs[:2], tmp_path / "out", wanted)
    assert report.mask_structure == "2:4"
    pruned, _ = load_checkpoint(tmp_path / "out")
    for name, module in pruned.named_modules():
        if name.endswith((*ATTENTION, *FEED_FORWARD)):
            assert ((module.weight.reshape(-1, 4) == 0).sum(-1) >= 2).all(), name


def test_a_pattern_by_magnitude_is_refused_rather_than_forgotten(
    student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    with pytest.raises(CogumiError, match="'2:4'"):
        prune(student, pairs, pairs[:2], tmp_path / "out", config(method="magnitude", mask_structure="2:4"))


def test_nothing_asked_is_nothing_pruned(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    report = prune(student, pairs, pairs[:2], tmp_path / "out", config(sparsity_attention=0, sparsity_feed_forward=0))
    assert report.perplexity_after == report.perplexity_before
    assert report.sparsity_missing == 0


def test_too_little_calibration_text_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="the calibration set is too small"):
        prune(student, pairs[:1], pairs[:2], tmp_path / "out", config(calibration_tokens=500))
    assert not (tmp_path / "out").exists()
