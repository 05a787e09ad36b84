import logging
from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.compressor import calibration_set, load_sound, quiet_compressor, require_group_size
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.student import load_checkpoint


def test_samples_are_the_examples_end_to_end(student: Path, pairs: list[Pair]) -> None:
    _, tokenizer = load_checkpoint(student)
    calibration = calibration_set(tokenizer, pairs, 5, 48)
    data = calibration.data
    stream = [token for item in encode_pairs(tokenizer, pairs, 1 << 30)[0] for token in item.ids]
    assert [token for row in data["input_ids"] for token in row] == stream[: 5 * 48]
    assert all(row == [1] * 48 for row in data["attention_mask"])


def test_domains_give_equal_parts_of_the_tokens(student: Path, pairs: list[Pair]) -> None:
    _, tokenizer = load_checkpoint(student)
    long = [Pair(pair.instruction, pair.response * 4, "long") for pair in pairs[:12]]
    short = [Pair(pair.instruction, pair.response, "short") for pair in pairs[12:]]
    calibration = calibration_set(tokenizer, [*long, *short], 8, 48)
    given = calibration.tokens_by_group
    assert set(given) == {"long", "short"}
    longest = max(len(item.ids) for item in encode_pairs(tokenizer, long, 1 << 30)[0])
    assert abs(given["long"] - given["short"]) <= longest
    assert len(calibration) == 8
    only = calibration_set(tokenizer, long, 8, 48).tokens_by_group
    assert set(only) == {"long"}


def test_fewer_samples_than_asked_are_said_and_too_few_refused(
    student: Path, pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    _, tokenizer = load_checkpoint(student)
    with caplog.at_level(logging.WARNING):
        data = calibration_set(tokenizer, pairs[:4], 1000, 32)
    assert 2 <= len(data) < 1000
    assert f"only {len(data)} of 1000 calibration samples" in caplog.text
    with pytest.raises(CogumiError, match=r"give 1 sample\(s\) of 32"):
        calibration_set(tokenizer, pairs[:1], 4, 32)


def test_a_sound_checkpoint_is_loaded_in_float32(student: Path, untied_student: Path) -> None:
    import torch

    for folder in (student, untied_student):
        model, tokenizer = load_sound(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not model.training
        assert len(tokenizer) <= model.config.vocab_size


def test_a_group_size_must_divide_every_layers_columns(student: Path) -> None:
    model, _ = load_sound(student)
    require_group_size(model, 64)
    with pytest.raises(CogumiError, match="group size 128 does not divide the 64 columns of") as caught:
        require_group_size(model, 128)
    assert caught.value.mend == "set group_size to 64"


def test_the_patch_of_the_cache_is_taken_back() -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    original = IntermediatesCache.pin_memory
    with pytest.raises(RuntimeError), quiet_compressor():
        raise RuntimeError
    assert IntermediatesCache.pin_memory is original
