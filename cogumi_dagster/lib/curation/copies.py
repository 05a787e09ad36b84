"""Long verbatim copies in a response: of the instruction, of a licence's text, of a page that it quotes."""

import re
from collections.abc import Iterator

from cogumi_dagster.lib.curation.words import words_of

SHINGLE = 13
"""Words in a row that count as copied: GPT-3's measure of overlap (arXiv 2005.14165, appendix C)."""
COPIED_WORDS, COPIED_SHARE = 50, 0.9
"""A response that is so much its instruction teaches to parrot. Corrected code and rewritten text stay below."""
QUOTED_WORDS = 100
"""A quotation of this length is a passage of somebody's text."""
CODE = re.compile(r"```.*?(?:```|\Z)", re.S)
BLOCK_QUOTE = re.compile(r"(?:^>.*\n?)+", re.M)
CURLY = re.compile(r"“([^“”]{400,})”")
LICENCE_TEXTS = {
    "mit": ("permission is hereby granted free of charge to any person", "authors or copyright holders be liable"),
    "bsd": ("redistributions of source code must retain", "redistributions in binary form must reproduce"),
    "apache": ("terms and conditions for use reproduction and distribution", "grant of copyright license"),
    "gpl": ("everyone is permitted to copy and distribute verbatim copies", "the precise terms and conditions for"),
    "mpl": ("each contributor hereby grants you a world wide royalty free", "exhibit a source code form license"),
    "cc": ("by exercising the licensed rights", "the licensor waives any right to collect royalties"),
}
"""Two sentences of each, from places far apart: a text that has both has what is between them."""


def copies(prompt: str, response: str) -> str | None:
    """``copy:instruction``, ``copy:licence-mit`` and others, ``copy:quotation``, or None."""
    if copied_share(prompt, response) > COPIED_SHARE:
        return "copy:instruction"
    if name := licence_text(response):
        return f"copy:licence-{name}"
    return "copy:quotation" if longest_quotation(response) >= QUOTED_WORDS else None


def copied_share(prompt: str, response: str) -> float:
    """The share of a response's words that stand in runs of 13 copied from the prompt; 0 below 50 such words."""
    if len(prompt) < COPIED_WORDS * 3 or len(response) < COPIED_WORDS * 3:
        return 0.0
    asked, words = prompt.split(), response.split()
    vocabulary = set(asked)
    if sum(word in vocabulary for word in words) < COPIED_WORDS:
        return 0.0
    known = set(_shingles(asked))
    copied = place = 0
    for start, shingle in enumerate(_shingles(words)):
        if shingle in known:
            copied += start + SHINGLE - max(start, place)
            place = start + SHINGLE
    return copied / len(words) if copied >= COPIED_WORDS else 0.0


def _shingles(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(SHINGLE)), strict=False)


def licence_text(text: str) -> str | None:
    """The licence of which a text holds the larger part."""
    low = text.lower()
    if "licen" not in low and "copyright" not in low:
        return None
    plain = " ".join(words_of(low))  # comment marks and line breaks are gone
    return next((name for name, marks in LICENCE_TEXTS.items() if all(mark in plain for mark in marks)), None)


def longest_quotation(text: str) -> int:
    """Words of the longest passage in quotation marks or in a block quote that is not the whole text."""
    if len(text) < 4 * QUOTED_WORDS:
        return 0
    prose = CODE.sub("\n", text).strip()
    straight = prose.split('"')
    passages = [match.group() for match in BLOCK_QUOTE.finditer(prose)] if ">" in prose else []
    passages += CURLY.findall(prose) if "“" in prose else []
    passages += straight[1::2] if len(straight) % 2 else []
    lengths = [len(one.split()) for one in passages if len(one) < 0.9 * len(prose)]
    return max(lengths, default=0)
