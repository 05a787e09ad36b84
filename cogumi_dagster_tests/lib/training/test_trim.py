from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint
from cogumi_dagster.lib.training.trim import ROW_MULTIPLE, TrimReport, trim_vocabulary


@pytest.fixture(scope="module")
def trimmed(full_student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrimReport]:
    folder = tmp_path_factory.mktemp("trimmed") / "checkpoint"
    return folder, trim_vocabulary(full_student, pairs, pairs[:6], folder)


@pytest.fixture(scope="module")
def tokenizer(trimmed: tuple[Path, TrimReport]) -> Any:
    return load_checkpoint(trimmed[0])[1]


@pytest.fixture(scope="module")
def untrimmed(full_student: Path) -> Any:
    return load_checkpoint(full_student)[1]


def test_the_corpus_keeps_its_tokens_renumbered(trimmed: tuple[Path, TrimReport], pairs: list[Pair]) -> None:
    report = trimmed[1]
    assert report.texts == report.same_ids == report.round_trips == 2 * len(pairs)
    assert report.coverage == 1 and report.tokens_per_word_after == report.tokens_per_word_before
    assert report.vocabulary_before == 49152
    assert report.vocabulary_after < 2000 and report.vocabulary_after % ROW_MULTIPLE == 0
    assert report.bytes_saved == 2 * 64 * (report.vocabulary_before - report.vocabulary_after)


def test_common_tokens_keep_other_texts_short(full_student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    other = [Pair("Where do penguins live?", "Penguins live in the southern hemisphere, mostly in Antarctica.")]
    few, some, whole = (
        trim_vocabulary(full_student, pairs[:3], other, tmp_path / str(keep), keep=keep) for keep in (0, 4096, 60_000)
    )
    assert few.coverage < some.coverage < whole.coverage == 1
    assert few.tokens_per_word_after > some.tokens_per_word_after > whole.tokens_per_word_after
    assert whole.tokens_per_word_after == whole.tokens_per_word_before
    assert whole.perplexity_ratio == pytest.approx(1, abs=1e-4)
    assert some.vocabulary_after < 6000 < whole.vocabulary_after


@pytest.mark.parametrize("kind", ["full_student", "full_untied_student"])
def test_the_logits_of_kept_tokens_are_the_old_ones(
    kind: str, pairs: list[Pair], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import torch

    source = request.getfixturevalue(kind)
    trim_vocabulary(source, pairs, pairs[:2], tmp_path / "trimmed")
    old, old_tokenizer = load_checkpoint(source, "float32")
    new, new_tokenizer = load_checkpoint(tmp_path / "trimmed", "float32")
    text = pairs[3].response
    names = new_tokenizer.convert_ids_to_tokens(range(len(new_tokenizer)))
    kept = old_tokenizer.convert_tokens_to_ids(names)
    assert old_tokenizer.convert_ids_to_tokens(kept) == names
    with torch.no_grad():
        before = old(torch.tensor([old_tokenizer.encode(text, add_special_tokens=False)])).logits[..., kept]
        after = new(torch.tensor([new_tokenizer.encode(text, add_special_tokens=False)])).logits[..., : len(kept)]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_can_still_be_written(tokenizer: Any, untrimmed: Any, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= token < len(tokenizer) for token in ids)
    # SmolLM2 itself lacks 21 of the 256 bytes (some control characters, and those above U+3FFFF)
    written = untrimmed.decode(untrimmed.encode(text, add_special_tokens=False))
    assert tokenizer.decode(ids) == written
    if max(text, default="") < "\U00040000" and text.isprintable():
        assert written == text


def test_special_tokens_and_template_are_kept(student: Path, trimmed: tuple[Path, TrimReport], tokenizer: Any) -> None:
    model, _ = load_checkpoint(trimmed[0])
    _, old = load_checkpoint(student)
    assert tokenizer.chat_template == old.chat_template
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token") == getattr(old, f"{name}_token")
        assert getattr(model.config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")


def test_a_trimmed_checkpoint_exports_to_gguf(
    trimmed: tuple[Path, TrimReport], pairs: list[Pair], tmp_path: Path
) -> None:
    write_gguf(trimmed[0], tmp_path / "f16.gguf")
    model, tokenizer = load_checkpoint(trimmed[0], "float32")
    reference = flatten(answer_logits(model, tokenizer, pairs[:6], 512))
    report = parity(reference, flatten(gguf_answer_logits(tmp_path / "f16.gguf", tokenizer, pairs[:6])))
    assert report.mean_kl <= 1e-4
