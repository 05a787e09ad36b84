"""Counting tokens without tokenizing every text: a byte-level BPE never joins two words, so each is encoded once.

Exact, and a quarter of the time. Only for ASCII texts and a pre-tokenizer that is known here; all others are encoded
whole, on all cores.
"""

import json
import re
from collections.abc import Callable
from typing import Any

WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+", re.A)
"""GPT-2's pattern on ASCII, which ``ByteLevel`` applies."""
WORDS_AND_DIGITS = re.compile(r"'(?:[sdmt]|ll|ve|re)|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+(?=\d)|\s+(?!\S)|\s+", re.A)
"""The same after ``Digits(individual_digits=True)``: each digit is apart, and the rest ends before it."""
KNOWN_WORDS = 1_000_000
"""Sizes that are remembered, about 100 MB; then it starts anew."""
TOKENIZED_AT_ONCE = 4096
"""Texts in one batch: all cores have work, and the ids of a large dataset are never all in memory."""


def counter(fast: Any) -> Callable[[list[str]], list[int]]:
    """texts -> numbers of tokens by a ``tokenizers.Tokenizer``, without special tokens around them."""
    fast.no_truncation()
    fast.no_padding()
    pattern, special = _pattern(fast), _added(fast)
    sizes: dict[str, int] = {}

    def encoded(texts: list[str]) -> list[int]:
        return [len(ids) for ids in fast.encode_batch_fast(texts, add_special_tokens=False)]

    def by_words(texts: list[str], words_in: re.Pattern[str]) -> list[int]:
        words = [words_in.findall(text) for text in texts]
        new = list({word for some in words for word in some} - sizes.keys())
        if len(sizes) + len(new) > KNOWN_WORDS:
            sizes.clear()
            new = list({word for some in words for word in some})
        sizes.update(zip(new, encoded(new), strict=True))
        return [sum(map(sizes.__getitem__, some)) for some in words]

    def count(texts: list[str]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            part = texts[start : start + TOKENIZED_AT_ONCE]
            plain = [pattern is not None and text.isascii() and not special.search(text) for text in part]
            short = iter(by_words([text for text, ok in zip(part, plain, strict=True) if ok], pattern or WORDS))
            whole = iter(encoded([text for text, ok in zip(part, plain, strict=True) if not ok]))
            counts += [next(short if ok else whole) for ok in plain]
        return counts

    return count


def _pattern(fast: Any) -> re.Pattern[str] | None:
    """What the tokenizer's pre-tokenizer does to ASCII; None where it is not known here."""
    made = json.loads(fast.to_str())
    before = made.get("pre_tokenizer") or {}
    steps = [(step["type"], step) for step in before.get("pretokenizers", [before]) if step]
    kinds = [kind for kind, _ in steps]
    if (
        made.get("normalizer")
        or made["model"].get("type") != "BPE"
        or kinds not in (["ByteLevel"], ["Digits", "ByteLevel"])
    ):
        return None
    level = steps[-1][1]
    if level["add_prefix_space"] or not level["use_regex"]:
        return None
    if len(steps) == 1:
        return WORDS
    return WORDS_AND_DIGITS if steps[0][1]["individual_digits"] else None


def _added(fast: Any) -> re.Pattern[str]:
    """The tokenizer's added tokens, which it cuts out of a text before all else."""
    tokens = [re.escape(token.content) for token in fast.get_added_tokens_decoder().values()]
    return re.compile("|".join(tokens) or r"(?!)")
