"""Reading a short answer out of a response: lenient about the form, never about being right."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation

from cogumi_dagster.lib.tasks.base import Verdict

_STATED = re.compile(r"\banswer\b[*_ \t]*[:=][*_ \t]*([^\n]*)", re.IGNORECASE)
_SAID = re.compile(r"^.*\banswer is\b:?", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|\w+n['\u2019]t|never|doubt|unsure)\b[^,.;:]*\banswer is\b", re.IGNORECASE)
"""Of a clause that denies or doubts what it says the answer is."""
_NUMBER = re.compile(
    r"(?<![\w^.])(?P<sign>[-+\u2212]?)(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})\b|\s*[x\u00d7*]\s*10\s*\^\s*\(?(?P<power>[-+\u2212]?\d{1,3})\)?)?"
)
_MARKUP = " \t\r*_`\"'$"
_LONGEST_NUMBER = 60
"""Characters. No task has a longer number; a text of a million digits is not parsed."""


def stated_answer(response: str) -> str | None:
    """The value of the last ``Answer: <x>``, without markup and closing full stop; None when there is none."""
    values = [value for value in (_bare(found) for found in _STATED.findall(response)) if value]
    return values[-1] if values else None


def final_text(response: str) -> str:
    """The stated answer, else the last line that is not empty, without a beginning such as "The answer is"; nothing
    where that line denies it ("I don't think the answer is 3")."""
    return next(_final_texts(response), "")


def closed_answer(response: str, classes: Sequence[str]) -> str:
    """Which of ``classes`` a response gives: the one that its stated answer, or the last line that names one, ends or
    begins with, or the only one in it. ``all within 3: YES`` is YES, ``YES. There is no conflict`` too. Else nothing,
    nor where the line denies one (``not YES``).
    """
    named = "|".join(map(re.escape, classes))
    for line in _final_texts(response):
        found = [word.lower() for word in re.findall(rf"\b(?:{named})\b", line, re.IGNORECASE)]
        if not found:
            continue
        begins, ends = (re.search(end, line, re.IGNORECASE) for end in (rf"^\W*(?:{named})\b", rf"\b(?:{named})\W*$"))
        if re.search(rf"\b(?:not|never|anything but)\s+(?:{named})\b", line, re.IGNORECASE):
            return ""
        said = found[-1] if ends else found[0] if begins or len(set(found)) == 1 else ""
        return next((label for label in classes if label.lower() == said), "")
    return ""


def _final_texts(response: str) -> Iterator[str]:
    """The stated answer alone, where there is one; else the lines from the last to the first."""
    stated = stated_answer(response)
    if stated is not None:
        yield stated
        return
    for line in reversed(response.splitlines()):
        if bare := _bare(line):
            yield "" if _DENIED.search(bare) else _bare(_SAID.sub("", bare))


def final_number(response: str) -> Decimal | None:
    """The number of the stated answer, else the last number of the response.

    A stated answer may show its sum (``3 + 4 = 7``: what follows the last sign counts) but must name
    one number: ``41 or 42`` is no answer.
    """
    stated = stated_answer(response)
    if stated is None:
        numbers = numbers_in(response)
        return numbers[-1] if numbers else None
    numbers = numbers_in(re.split(r"[=\u2248]", stated)[-1])
    return numbers[0] if len(set(numbers)) == 1 else None


def numbers_in(text: str) -> list[Decimal]:
    """Numbers in reading order: ``1,234``, ``-2.5``, ``6e3``, ``6 x 10^3``. Exponents of units do not count."""
    found = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _LONGEST_NUMBER:
            continue
        sign = "-" if match["sign"] in ("-", "\u2212") else ""
        power = (match["exponent"] or match["power"] or "0").replace("\u2212", "-")
        try:
            found.append(Decimal(f"{sign}{match['digits'].replace(',', '')}{match['fraction'] or ''}e{power}"))
        except InvalidOperation:
            continue
    return found


def judge_number(response: str, expected: str, tolerance: float = 0.0) -> Verdict:
    """Pass when the final number is ``expected``, or within the relative ``tolerance`` of it."""
    given, right = final_number(response), Decimal(expected)
    if given is None:
        return Verdict(False, "no single number was given as the answer")
    if abs(given - right) <= abs(right) * Decimal(str(tolerance)):
        return Verdict(True, "right", 1.0)
    return Verdict(False, f"the answer is {expected}, not {given}")


def _bare(text: str) -> str:
    text = text.strip(_MARKUP)
    return text[:-1].strip(_MARKUP) if text.endswith(".") else text
