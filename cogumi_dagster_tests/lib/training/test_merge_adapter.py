from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, merge_adapter, parity, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint


def test_merged_says_what_base_and_adapter_say(student: Path, adapter: Path, pairs: list[Pair], tmp_path: Path) -> None:
    report = merge_adapter(student, adapter, tmp_path / "merged", pairs[:8], max_length=128)
    assert report.parity.mean_kl < 1e-3, "rounding to bfloat16 only"
    assert report.parity.greedy_agreement > 0.95
    assert report.perplexity_tokens == report.parity.tokens > 100
    base, tokenizer = load_checkpoint(student, "float32")
    merged, _ = load_checkpoint(tmp_path / "merged", "float32")
    before, after = (answer_logits(model, tokenizer, pairs[:8], 128) for model in (base, merged))
    assert parity(before, after).mean_kl > 100 * report.parity.mean_kl, "the adapter says something"
    assert perplexity_of(after)[0] == pytest.approx(report.perplexity)


def test_an_adapter_of_another_shape_is_refused(
    student: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    tensors = {
        name: tensor[:, :-1].contiguous() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(CogumiError, match="does not fit"):
        merge_adapter(student, other, tmp_path / "merged", pairs[:2], max_length=128)
    with pytest.raises(CogumiError, match="does not fit"):
        merge_adapter(student, tmp_path / "none", tmp_path / "merged", pairs[:2], max_length=128)


def test_parity_and_perplexity_by_hand() -> None:
    import torch

    half = torch.tensor([[0.5, 0.5]]).log()
    skewed = torch.tensor([[0.75, 0.25]]).log()
    target = torch.tensor([0])
    report = parity([(skewed, target)], [(half, target)])
    wanted = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert report.mean_kl == report.max_kl == pytest.approx(float(wanted))
    assert parity([(half, target)], [(half, target)]).mean_kl == 0
    assert perplexity_of([(half, target), (half, target)]) == (pytest.approx(2.0), 2)
