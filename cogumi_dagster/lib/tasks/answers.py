"""Reading a short answer out of a response: lenient about the form, never about being right."""

import re
from decimal import Decimal, InvalidOperation

from cogumi_dagster.lib.tasks.base import Verdict

_STATED = re.compile(r"\banswer\b[*_ \t]*[:=][*_ \t]*([^\n]*)", re.IGNORECASE)
_SAID = re.compile(
    r"^(?!.*\b(?:not|\w+n['\u2019]t|never|whether|if|unless|think|doubt)\b.*\banswer is\b).*\banswer is\b:?",
    re.IGNORECASE,
)
"""A beginning that says what the answer is, and does not doubt or deny it."""
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
    """The stated answer, else the last line that is not empty, without a beginning such as "The answer is"."""
    stated = stated_answer(response)
    if stated is not None:
        return stated
    lines = [_bare(line) for line in response.splitlines() if _bare(line)]
    return _bare(_SAID.sub("", lines[-1])) if lines else ""


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
