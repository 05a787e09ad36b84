"""Offensive words and threats, as whole words. The lists are hashes, so that nobody has to read them.

Word lists see no context: an insult in clean words passes. The judge is asked for the rest.
"""

import functools
import hashlib
import re
from pathlib import Path

from cogumi_dagster.lib.curation.words import words_of

LISTS = {"offensive:slur": "offensive.sha256", "offensive:obscene": "obscene.sha256"}
"""Reason -> the first 16 hex digits of SHA-256 of lower-case words that have no other meaning, one a line."""
THREAT = re.compile(r"\b(?:kill|hang|shoot) yourself\b|\bi(?:'ll| will| am going to) (?:kill|murder|rape) you\b", re.I)
KEPT_WORDS = 1 << 18

_clean: set[str] = set()
"""Words that were looked up and are on no list: most words of a text are known by then."""


@functools.cache
def _reasons() -> dict[str, str]:
    folder = Path(__file__).parent
    return {digest: reason for reason, name in LISTS.items() for digest in (folder / name).read_text("ascii").split()}


def offensive(text: str) -> str | None:
    """A slur, a strong obscenity or a threat."""
    if found := {reason for word in set(words_of(text)) - _clean if (reason := _look_up(word))}:
        return max(found)
    return "offensive:threat" if "you" in text and THREAT.search(text) else None


def _look_up(word: str) -> str | None:
    reason = _reasons().get(hashlib.sha256(word.encode()).hexdigest()[:16])
    if reason is None and len(_clean) < KEPT_WORDS:
        _clean.add(word)
    return reason
