"""Is a text written in another language? Asked of prose only, and answered only when sure.

Of 17,400 English rows of GSM8K, CodeAlpaca and HH-RLHF two were taken for another language.
"""

import functools
import re
from typing import TYPE_CHECKING

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
"""Share of a text's letters that must be prose; a text that is mostly code or formulas is not judged."""
CONFIDENT = 0.95
"""The detector's confidence in the other language."""
ENOUGH = 400
"""Characters of prose that the detector sees; its time grows with them, its judgement no longer does."""
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
LATIN_WORD = re.compile(r"[a-z]+")
LETTER = re.compile(r"[^\W\d_]")
FOREIGN_LETTER = re.compile(r"[^\W\d_a-zA-Z]")
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\$[^$\n]*\$|<[^<>\n]*>|\S*[@_/\\=(){}\[\]]\S*", re.S)
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
    words = LATIN_WORD.findall(text.lower())
    if len(FOREIGN_LETTER.findall(text)) * 10 > sum(map(len, words)):
        return 0.0
    return sum(word in ENGLISH for word in words) / max(1, len(words))


def foreign_language(text: str, allowed: tuple[str, ...]) -> str | None:
    """The ISO 639-1 code of the language of ``text`` if it is surely none of ``allowed``, else None."""
    if english_share(text) >= ENGLISH_SHARE:
        return None if "en" in allowed or len(text) < MIN_LETTERS else "en"
    prose = NOT_PROSE.sub(" ", CODE_LINE.sub("", text))
    letters = len(LETTER.findall(prose))
    evidence = letters + 2 * len(FOREIGN_LETTER.findall(prose))  # no program and no formula is written in Chinese
    if evidence < MIN_LETTERS or letters < MIN_PROSE * len(LETTER.findall(text)):
        return None
    if "en" in allowed and english_share(prose) > FOREIGN_SHARE:
        return None
    best = _detector().compute_language_confidence_values(prose[:ENOUGH])[0]
    code = best.language.iso_code_639_1.name.lower()
    return code if best.value >= CONFIDENT and code not in allowed else None
