"""Counts by words are the tokenizer's own, for any text and for each pre-tokenizer that is taken apart."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cogumi_dagster.lib.curation import token_counts
from cogumi_dagster.lib.curation.token_counts import counter

TEXT = "It's 12 o'clock:  the cat's    tail, 3.14!\n\n\tdef f(x):\n        return x_1 ** 2  # we'll see 100 "
STEPS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "white space": pre_tokenizers.Whitespace(),
}


def tokenizer(kind: str) -> Any:
    """A small BPE with merges over white space, digits and contractions, and one added token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = STEPS[kind]  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    made.add_special_tokens(["<|im_end|>"])
    return made


TOKENIZERS = {kind: tokenizer(kind) for kind in STEPS}
COUNTERS = {kind: counter(made) for kind, made in TOKENIZERS.items()}


def by_the_tokenizer(kind: str, texts: list[str]) -> list[int]:
    return [len(TOKENIZERS[kind].encode(text, add_special_tokens=False)) for text in texts]


@pytest.mark.parametrize("kind", STEPS)
@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(
        st.text(st.characters(max_codepoint=127)) | st.text("a1 '\n\ts.<|im_end|>é", max_size=40), max_size=6
    )
)
def test_any_text(kind: str, texts: list[str]) -> None:
    assert COUNTERS[kind](texts) == by_the_tokenizer(kind, texts)


@pytest.mark.parametrize("kind", STEPS)
def test_ordinary_and_odd_texts(kind: str) -> None:
    texts = [
        TEXT,
        "",
        " ",
        f"{TEXT}<|im_end|>{TEXT}",
        "naïve café 12",
        "  x",
        "x  ",
        "\r\n\r\n 1",
        "a" * 500,
        "12 " * 9,
    ]
    assert COUNTERS[kind](texts * 2) == by_the_tokenizer(kind, texts) * 2


def test_only_known_pre_tokenizers_are_taken_apart() -> None:
    assert [token_counts._pattern(made) is not None for made in TOKENIZERS.values()] == [True, True, False, False]


def test_memory_starts_anew_when_it_is_full_and_batches_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "KNOWN_WORDS", 10)
    monkeypatch.setattr(token_counts, "TOKENIZED_AT_ONCE", 2)
    texts = [f"{TEXT} number {n} é"[: 30 + n] for n in range(30)] + ["naïve"]
    assert counter(TOKENIZERS["digits"])(texts) == by_the_tokenizer("digits", texts)
