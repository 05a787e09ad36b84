import logging
from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.compressor import calibration_set, quiet_compressor
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.student import load_checkpoint


def test_samples_are_the_examples_end_to_end(student: Path, pairs: list[Pair]) -> None:
    _, tokenizer = load_checkpoint(student)
    data = calibration_set(tokenizer, pairs, 5, 48)
    stream = [token for item in encode_pairs(tokenizer, pairs, 1 << 30)[0] for token in item.ids]
    assert [token for row in data["input_ids"] for token in row] == stream[: 5 * 48]
    assert all(row == [1] * 48 for row in data["attention_mask"])


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


def test_the_patch_of_the_cache_is_taken_back() -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    original = IntermediatesCache.pin_memory
    with pytest.raises(RuntimeError), quiet_compressor():
        raise RuntimeError
    assert IntermediatesCache.pin_memory is original
