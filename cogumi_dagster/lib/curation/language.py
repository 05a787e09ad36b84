"""Is a text written in another language? Asked of prose only, and answered only when sure.

Of 17,400 English rows of GSM8K, CodeAlpaca and HH-RLHF two were taken for another language.
"""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogumi_dagster.lib.curation.words import words_of

if TYPE_CHECKING:
    from lingua import LanguageDetector

LANGUAGES = (
    "ar bg bn ca cs da de el en es fa fi fr he hi hr hu id it ja ko lt lv nb nl pl pt ro ru sk sl sr sv sw ta te th tl"
    " tr uk ur vi zh"
)
"""What is told apart. With all 75 of the detector, terse technical English was taken for Latin, Maori or Tswana."""
MIN_LETTERS = 60
"""Fewer letters than this are not judged: names, formulas and short answers belong to no language."""
MIN_PROSE = 0.5
"""Share of the letters outside fenced code that must be prose; what is mostly bare code or formulas is not judged."""
CONFIDENT = 0.95
"""The detector's confidence in the other language."""
ENOUGH = 400
"""Characters of prose that the detector sees; its time grows with them, its judgement no longer does."""
BATCH = 1024
"""Texts given to the detector at once."""
ENGLISH = frozenset(
    (  # noqa: SIM905
        "the and of to that with this are you your it be from by have has which what how their they was were will would"
        " can should there these those because when where been its into than about we our"
    ).split()
)
"""Function words of English that few other languages share."""
ENGLISH_SHARE = 0.12
"""Running English is about a third such words; Dutch, Danish or French share two or three of them."""
FOREIGN_SHARE = 0.04
"""A Latin-script text with more of them than this is not dropped, and the detector not asked."""
FOREIGN_LETTER = re.compile(r"[^\W\d_a-zA-Z]")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)
NOT_PROSE = re.compile(
    r"`[^`\n]*`|https?://\S+|\$[^$\n]*\$|<[^<>\n]*>|(?<!\S)[^\s@_/\\=(){}\[\]]*[@_/\\=(){}\[\]]\S*",
    re.S,
)
"""Code, addresses, formulas, markup and identifiers."""
CODE_LINE = re.compile(
    r"^\s*(?:#|//|/?\*|import |from |def |class |return |public |private |SELECT |[{}]).*$|^.*[;{}]\s*$", re.M
)


@functools.cache
def known_languages() -> frozenset[str]:
    """ISO 639-1 codes that are told apart."""
    return frozenset(LANGUAGES.split())


@functools.cache
def _detector() -> "LanguageDetector":
    from lingua import Language, LanguageDetectorBuilder

    told_apart = [code for code in Language.all() if code.iso_code_639_1.name.lower() in known_languages()]
    # Low accuracy mode uses trigrams alone, as the full mode does on texts over 120 characters: 70 MB, under 1 ms.
    return LanguageDetectorBuilder.from_languages(*told_apart).with_low_accuracy_mode().build()


def english_share(text: str) -> float:
    """The share of a text's words that are English function words; 0 where Latin letters are the lesser part."""
    words = words_of(text)
    if not text.isascii():
        foreign = len(FOREIGN_LETTER.findall(text))
        if foreign * 10 > sum(map(len, words)) - foreign:
            return 0.0
    return len([word for word in words if word in ENGLISH]) / max(1, len(words))


def doubtful_prose(text: str, allowed: tuple[str, ...]) -> str:
    """The start of the prose that the detector must see; "" where a text is plainly allowed, or cannot be judged."""
    english = "en" in allowed
    if english and english_share(text) >= ENGLISH_SHARE:
        return ""
    if "```" in text:  # what is marked as code says nothing of the prose around it
        text = FENCED.sub(" ", text)
    prose = NOT_PROSE.sub(" ", CODE_LINE.sub("", text))
    letters = sum(map(len, words_of(prose)))
    foreign = 0 if prose.isascii() else len(FOREIGN_LETTER.findall(prose))
    # No program and no formula is written in Chinese, so its letters count threefold.
    if letters + 2 * foreign < MIN_LETTERS or letters < MIN_PROSE * sum(map(len, words_of(text))):
        return ""
    return "" if english and english_share(prose) > FOREIGN_SHARE else prose[:ENOUGH]


def detect(prose: Sequence[str], allowed: tuple[str, ...]) -> list[str | None]:
    """The ISO 639-1 code of each piece of prose that is surely in none of the allowed languages, on all cores."""
    found: list[str | None] = []
    for start in range(0, len(prose), BATCH):
        for ranked in _detector().compute_language_confidence_values_in_parallel(list(prose[start : start + BATCH])):
            code = ranked[0].language.iso_code_639_1.name.lower()
            found.append(code if ranked[0].value >= CONFIDENT and code not in allowed else None)
    return found


def foreign_languages(texts: Sequence[str], allowed: tuple[str, ...]) -> list[str | None]:
    """The code of the language of each text that is surely in none of ``allowed``, else None."""
    prose = [doubtful_prose(text, allowed) for text in texts]
    codes = iter(detect([one for one in prose if one], allowed))
    return [next(codes) if one else None for one in prose]


def foreign_language(text: str, allowed: tuple[str, ...]) -> str | None:
    """``foreign_languages`` of one text."""
    return foreign_languages([text], allowed)[0]
