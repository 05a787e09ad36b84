"""Does a text repeat itself? Gopher's rules, on the prose of a response."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

TOP_NGRAM_LIMITS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAM_LIMITS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
"""Rae et al. 2021 (Gopher, arXiv 2112.11446), table A1."""
GOPHER_MIN_WORDS = 50
"""Gopher's own lower bound on a document; its shares mean little on fewer words."""
SHORT_WORDS, SHORT_FACTOR = 300, 2.0
"""Gopher's n-gram limits are for web documents. Of 5,024 answers of 50 to 300 words (GSM8K, CodeAlpaca, HH-RLHF) they
drop 11 %, good solutions that repeat their terms; doubled, 0.5 %. A loop is far above either."""
LINE_MIN_WORDS = 4
"""Shorter lines (``return false;``, ``}``) repeat in any program."""
FENCED = re.compile(r"```.*?```", re.S)


def repetition(response: str) -> str | None:
    """Gopher's repetition rules on the prose of a response. Fenced code repeats by nature and is left out."""
    prose = FENCED.sub("\n", response) if "```" in response else response
    words = prose.split()
    if len(words) < GOPHER_MIN_WORDS:
        return None
    if "\n" in prose and (reason := _repeated_parts(prose)):
        return reason
    total = sum(map(len, words)) * (SHORT_FACTOR if len(words) < SHORT_WORDS else 1.0)
    count, longest = len(words), max(map(len, words))
    for size, limit in TOP_NGRAM_LIMITS:
        if count * size * longest <= limit * total:
            continue  # no n-gram comes more often than the commonest shorter one: most texts end here
        gram, count = Counter(_ngrams(words, size)).most_common(1)[0]
        if count == 1:
            return None  # no pair of words comes twice, so no longer n-gram does
        if count * sum(map(len, gram)) > limit * total:
            return f"repetition:top-{size}-gram"
    for size, limit in DUPLICATE_NGRAM_LIMITS:
        if len(set(_ngrams(words, size))) == len(words) - size + 1:
            return None  # as above
        if repeated_characters(words, size) > limit * total:
            return f"repetition:duplicate-{size}-grams"
    return None


def _repeated_parts(prose: str) -> str | None:
    paragraphs = [part.strip() for part in re.split(r"\n{2,}", prose.strip())]
    share, characters = _duplicates(paragraphs)
    if share > DUPLICATE_PARAGRAPHS or characters > DUPLICATE_PARAGRAPH_CHARACTERS:
        return "repetition:paragraphs"
    share, characters = _duplicates(
        [line.strip() for line in prose.splitlines() if len(line.split()) >= LINE_MIN_WORDS]
    )
    if share > DUPLICATE_LINES or characters > DUPLICATE_LINE_CHARACTERS:
        return "repetition:lines"
    return None


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """The share of parts that came before, and their share of the characters."""
    if len(set(parts)) == len(parts):
        return 0.0, 0.0
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)


def repeated_characters(words: Sequence[str], size: int) -> int:
    """Characters of word n-grams that came before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    place = characters = 0
    while place + size <= len(words):
        gram = tuple(words[place : place + size])
        if gram in seen:
            characters += sum(map(len, gram))
            place += size
        else:
            seen.add(gram)
            place += 1
    return characters
