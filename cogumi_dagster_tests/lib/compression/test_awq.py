import copy
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.compression.autoawq import search_autoawq
from cogumi_dagster.lib.compression.awq import AwqReport, export_w4a16, fold_awq_scales
from cogumi_dagster.lib.compression.compressor import calibration_set, load_sound
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import AwqConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint

CONFIG = AwqConfig(group_size=32, calibration_samples=2, calibration_tokens=32, grid=4)


@pytest.fixture(scope="module")
def folded(student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AwqReport]:
    folder = tmp_path_factory.mktemp("folded") / "checkpoint"
    return folder, fold_awq_scales(student, pairs, pairs[:6], folder, CONFIG)


def test_folding_moves_weights_and_not_logits(student: Path, folded: tuple[Path, AwqReport]) -> None:
    folder, report = folded
    assert report.parity.mean_kl < 2e-2, "only the rounding of scaled weights"
    assert report.parity.greedy_agreement > 0.85
    assert report.scaled_layers > 0
    assert report.calibration_samples == 2
    before, after = (load_checkpoint(path)[0].state_dict() for path in (student, folder))
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)
    assert (folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_autoawq_folds_scales_too(
    student: Path, folded: tuple[Path, AwqReport], pairs: list[Pair], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"engine": "autoawq"})
    report = fold_awq_scales(student, pairs, pairs[:6], tmp_path / "out", config)
    assert (report.engine, report.grid, report.calibration_samples) == ("autoawq", 20, 2)
    assert report.parity.mean_kl < 2e-2, "only the rounding of scaled weights"
    assert report.scaled_layers > 0
    before, after = (load_checkpoint(path)[0].state_dict() for path in (student, tmp_path / "out"))
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)


def test_autoawq_in_float32_keeps_the_logits_and_helps_where_activations_stand_out(
    student: Path, pairs: list[Pair]
) -> None:
    """Four channels of the feed-forward are made thirty times as active as the rest: what AWQ is for."""
    import torch

    plain, tokenizer = load_sound(student)
    data = calibration_set(tokenizer, pairs, 2, 32)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.up_proj.weight[:4] *= 30
    model = copy.deepcopy(plain)
    search_autoawq(model, tokenizer, data, CONFIG)
    assert parity(*(answer_logits(m, tokenizer, pairs[:6], 1024) for m in (plain, model))).mean_kl < 1e-6

    def error(chosen: Any) -> float:
        """Mean square of what rounding the first down projection to 4 bits changes in its output."""
        seen: dict[str, Any] = {}
        layer = chosen.model.layers[0].mlp.down_proj
        hook = layer.register_forward_hook(lambda _, given, out: seen.update(x=given[0], y=out))
        with torch.no_grad():
            chosen(torch.tensor(data.data["input_ids"]))
            hook.remove()
            groups = layer.weight.reshape(-1, CONFIG.group_size)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = (high - low).clamp(min=1e-5) / 15
            zero = (-torch.round(low / step)).clamp(0, 15)
            rounded = ((torch.round(groups / step) + zero).clamp(0, 15) - zero) * step
            return float((seen["x"] @ rounded.view_as(layer.weight).T - seen["y"]).pow(2).mean())

    assert error(model) < 0.7 * error(plain)


@pytest.mark.parametrize(
    "changes",
    [{}, {"symmetric": True}, {"observer": "mse"}, {"rounding": "gptq"}],
    ids=lambda c: ",".join(c) or "plain",
)
def test_the_four_bit_export_loads_in_transformers(
    folded: tuple[Path, AwqReport], pairs: list[Pair], tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=changes)
    report = export_w4a16(folded[0], pairs, pairs[:6], tmp_path / "w4", config)
    assert report.group_size == 32
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "w4").glob("*.safetensors"))
    assert report.bytes < sum(path.stat().st_size for path in folded[0].glob("*.safetensors"))
    assert report.perplexity != report.perplexity_parent
    assert report.perplexity == pytest.approx(report.perplexity_parent, rel=1.0)
    assert report.calibration_samples == (2 if changes.get("rounding") else 0)


def test_a_group_size_that_does_not_divide_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    for step in (
        lambda config: fold_awq_scales(student, pairs, pairs[:2], tmp_path / "out", config),
        lambda config: export_w4a16(student, pairs, pairs[:2], tmp_path / "out", config),
    ):
        with pytest.raises(CogumiError, match="group size 128 does not divide the 64 columns"):
            step(CONFIG.model_copy(update={"group_size": 128}))
    assert not (tmp_path / "out").exists()


def test_too_little_calibration_text_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="the calibration set is too small"):
        fold_awq_scales(
            student, pairs[:1], pairs[:2], tmp_path / "out", CONFIG.model_copy(update={"calibration_tokens": 500})
        )
