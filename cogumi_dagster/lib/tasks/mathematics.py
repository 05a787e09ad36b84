"""Mathematics: arithmetic, number theory, equations and word problems, with the steps written out."""

import math
import re
from itertools import accumulate, zip_longest

from cogumi_dagster.lib.tasks.answers import stated_answer
from cogumi_dagster.lib.tasks.base import Difficulty
from cogumi_dagster.lib.tasks.gym import Entry, GymFamily, Worked

_END = 'Work it out step by step, then end with a line "Answer: <number>".'


def _ask_sum(entry: Entry) -> str:
    return f"Calculate {entry['metadata']['expression']}.\n{_END}"


def _work_sum(entry: Entry, _: Difficulty) -> Worked:
    """What is added and what is taken away are summed up apart, and their difference is one more sum: no total is
    negative, nothing is compared or lent, and each digit follows from digits that stand before it."""
    terms = entry["metadata"]["expression"].split()
    signs = ["+", *terms[1::2]]
    lines, totals = [], []
    for name, sign in (("plus", "+"), ("minus", "-")):
        side = [int(term) for term, given in zip(terms[::2], signs, strict=True) if given == sign]
        if side:
            lines.append(f"{name} {' '.join(map(str, side))}")
        lines += [_columns(str(before), str(term)) for before, term in zip(accumulate(side), side[1:], strict=False)]
        totals.append(sum(side))
    if "-" in signs:
        lines += _difference(*totals)
    return "\n".join(lines), str(totals[0] - totals[1])


def _difference(left: int, right: int) -> list[str]:
    """By the complement to nines: where the sum has a digit more, that digit comes back as 1 at the end; where it has
    not, the difference is negative, or zero, and the complement of the sum."""
    width = len(str(max(left, right)))
    upper, lower = (str(number).zfill(width) for number in (left, right))
    lines = [f"{upper} - {lower}, nines {_nines(lower)}", _columns(upper, _nines(lower))]
    if left > right:
        over = str(int(upper) + int(_nines(lower)))[1:]
        return [*lines, f"over {over}", _columns(over, "1")]
    return [*lines, f"under {str(right - left).zfill(width)}"]


def _nines(digits: str) -> str:
    return "".join(str(9 - int(digit)) for digit in digits)


def _columns(left: str, right: str) -> str:
    """``57+68: 7+8=15 5, 5+6+1=12 125``: each column from the right with the 1 that is carried, and the digits so
    far."""
    columns = list(zip_longest(*(map(int, reversed(number)) for number in (left, right)), fillvalue=0))
    carried, digits, steps = 0, "", []
    for place, (upper, lower) in enumerate(columns, 1):
        value = upper + lower + carried
        digits = f"{value if place == len(columns) else value % 10}{digits}"
        steps.append(f"{upper}+{lower}{'+1' * carried}={value} {digits}")
        carried = value // 10
    return f"{left}+{right}: {', '.join(steps)}"


def _ask_product(entry: Entry) -> str:
    return f"Calculate {entry['metadata']['expression']}.\n{_END}"


def _work_product(entry: Entry, _: Difficulty) -> Worked:
    small, large = sorted(int(text) for text in entry["metadata"]["expression"].split(" * "))
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(small))):
        if digit == "0" and small:
            continue
        part = large * int(digit) * 10**place
        lines.append(_times(large, int(digit)) + (f", {part}" if place else ""))
        if total:
            lines.append(_columns(*sorted((str(total), str(part)), key=len, reverse=True)))
        total += part
    return "\n".join(lines), str(total)


def _times(number: int, digit: int) -> str:
    """``69*6: 9*6=54 4, 6*6+5=41 414``: each digit from the right with what is carried, and the digits so far."""
    places = str(number)[::-1]
    carried, digits, steps = 0, "", []
    for place, upper in enumerate(map(int, places), 1):
        value = upper * digit + carried
        digits = f"{value if place == len(places) else value % 10}{digits}"
        steps.append(f"{upper}*{digit}{f'+{carried}' if carried else ''}={value} {digits}")
        carried = value // 10
    return f"{number}*{digit}: {', '.join(steps)}"


def _ask_gcd(entry: Entry) -> str:
    left, right = entry["metadata"]["numbers"]
    return f"Find the greatest common divisor of {left} and {right}.\n{_END}"


def _work_gcd(entry: Entry, _: Difficulty) -> Worked:
    small, large = sorted(entry["metadata"]["numbers"])
    return "\n".join(_euclid(large, small)), str(math.gcd(large, small))


def _euclid(large: int, small: int) -> list[str]:
    """``72: 1 * 63 = 63, 72 - 63 = 9``, and so on until nothing is left."""
    steps = []
    while small:
        taken = large // small * small
        steps.append(f"{large}: {large // small} * {small} = {taken}, {large} - {taken} = {large - taken}")
        large, small = small, large - taken
    return steps


def _ask_equation(entry: Entry) -> str:
    variable, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
    return f"Solve for {variable}: {equation}\n{_END}"


def _work_equation(entry: Entry, _: Difficulty) -> Worked | None:
    variable = entry["metadata"]["variable"]
    left, right = entry["metadata"]["equation"].split(" = ")
    coefficient, constant = 0, 0
    for sign, term in re.findall(r"([+-]?)\s*([^\s+-]+)", left):
        factor = -1 if sign == "-" else 1
        if variable in term:
            coefficient += factor * int(term.split("*")[0] if "*" in term else 1)
        else:
            constant += factor * int(term)
    if coefficient == 0:
        return None
    value = int(right) - constant
    moved = f"- {constant}" if constant > 0 else f"+ {-constant}"
    lines = [f"{coefficient}*{variable} = {right} {moved} = {value}"] if constant else []
    lines.append(f"{variable} = {value} / {coefficient} = {value // coefficient}")
    return "\n".join(lines), str(value // coefficient)


def _ask_factors(entry: Entry) -> str:
    return (
        f"Find the prime factorization of {entry['metadata']['number']}.\n"
        'Work it out step by step, then end with a line "Answer: <factors>", such as 2 x 2 x 3 for 12.'
    )


def _work_factors(entry: Entry, _: Difficulty) -> Worked:
    rest, factors, steps = int(entry["metadata"]["number"]), [], []
    prime = 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        if rest % prime == 0:
            steps.append(f"{rest} / {prime} = {rest // prime}")
            factors.append(prime)
            rest //= prime
        else:
            prime += 1
    return "\n".join(steps), " x ".join(map(str, factors))


def _read_factors(response: str) -> str:
    """The factors in ascending order, as reasoning-gym writes them. Powers are written out (``2^3``, ``2**3``); of an
    equation the side with more than one factor counts, else the last."""
    stated = stated_answer(response)
    lines = [line for line in response.splitlines() if line.strip()]
    sides = [
        [int(base) for base, power in _POWERS.findall(side) for _ in range(int(power or 1))]
        for side in (stated or (lines[-1] if lines else "")).split("=")
    ]
    factors = next((side for side in reversed(sides) if len(side) > 1), sides[-1])
    return " \u00d7 ".join(map(str, sorted(factors)))


_POWERS = re.compile(r"(\d{1,9})(?:\s*(?:\^|\*\*)\s*\(?(\d{1,2})\)?)?")


def _ask_legs(entry: Entry) -> str:
    animals = entry["question"].split(" if you have ")[1].strip().rstrip("?")
    return f"How many legs do these animals have in total: {animals}?\n{_END}"


def _work_legs(entry: Entry, _: Difficulty) -> Worked:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals: dict[str, int] = entry["metadata"]["animals"]
    parts = [count * int(ANIMALS[name]) for name, count in animals.items()]
    lines = [
        f"{name}: {count} * {ANIMALS[name]} = {part}"
        for (name, count), part in zip(animals.items(), parts, strict=True)
    ]
    if len(parts) > 1:
        added = zip(accumulate(parts), parts[1:], strict=False)
        lines.append(", ".join(f"{so_far} + {part} = {so_far + part}" for so_far, part in added))
    return "\n".join(lines), str(sum(parts))


def _ask_fraction(entry: Entry) -> str:
    facts = entry["metadata"]
    return (
        f"Simplify the fraction {facts['numerator']}/{facts['denominator']} to its lowest terms.\n"
        'Work it out step by step, then end with a line "Answer: <a>/<b>".'
    )


def _work_fraction(entry: Entry, _: Difficulty) -> Worked:
    top, bottom = entry["metadata"]["numerator"], entry["metadata"]["denominator"]
    divisor = math.gcd(top, bottom)
    steps = _euclid(max(top, bottom), min(top, bottom))
    steps += [f"{number} / {divisor} = {number // divisor}" for number in (top, bottom)]
    return "\n".join(steps), f"{top // divisor}/{bottom // divisor}"


def _read_fraction(response: str) -> str:
    found = re.findall(r"\d{1,9}\s*/\s*\d{1,9}", stated_answer(response) or response)
    return "".join(found[-1].split()) if found else ""


_STEPS = {"easy": (2, 2), "medium": (3, 3), "hard": (4, 6)}
"""Sentences of reasoning-gym's own solution, which is the only sign of difficulty its word problems carry."""
_EQUATION = re.compile(r"(?<![\d.)%])(-?\d+(?:\.\d+)?) ?([-+*/x\u00d7]) ?(\d+(?:\.\d+)?) ?= ?\$?(-?\d+(?:\.\d+)?)\b")


def _ask_word_problem(entry: Entry) -> str:
    question = entry["question"].split(" Give the result as")[0].strip()
    return f"{question}\n{_END}"


def _work_word_problem(entry: Entry, difficulty: Difficulty) -> Worked | None:
    steps = [line.strip() for line in entry["metadata"]["answer_cot"].split("####")[0].splitlines() if line.strip()]
    least, most = _STEPS[difficulty]
    if not least <= len(steps) <= most or "step by step" in steps[0]:
        return None
    text, answer = "\n".join(steps), str(entry["answer"])
    if len(text) > 420 or not re.fullmatch(r"-?\d+", answer) or not re.search(rf"(?<![\d.]){answer}\b", steps[-1]):
        return None
    if re.search(r"(?<![\d.])(\d+) ?= ?\1(?![\d.])", text) or not all(map(_holds, _EQUATION.findall(text))):
        return None  # some of the templates write an equation that is empty or wrong
    return text, answer


def _holds(equation: tuple[str, str, str, str]) -> bool:
    left, right, result = float(equation[0]), float(equation[2]), float(equation[3])
    sign = equation[1]
    if sign == "/" and right == 0:
        return False
    value = left + right if sign == "+" else left - right if sign == "-" else left / right if sign == "/" else None
    return abs((left * right if value is None else value) - result) < 0.51


CHAIN_SUM = GymFamily(
    "chain_sum", "math", "chain_sum",
    {
        "easy": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "medium": {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2},
        "hard": {"min_terms": 4, "max_terms": 6, "min_digits": 2, "max_digits": 3},
    },
    _ask_sum, _work_sum, max_tokens=448, version="3",
)  # fmt: skip
PRODUCTS = GymFamily(
    "products", "math", "products",
    {
        "easy": {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2},
        "medium": {"min_digits": 1, "max_digits": 2, "min_terms": 2, "max_terms": 2},
        "hard": {"min_digits": 2, "max_digits": 3, "min_terms": 2, "max_terms": 2},
    },
    _ask_product, _work_product, max_tokens=384, version="3",
)  # fmt: skip
GCD = GymFamily(
    "gcd", "math", "gcd",
    {"easy": {"max_value": 30}, "medium": {"max_value": 120}, "hard": {"max_value": 1000}},
    _ask_gcd, _work_gcd, max_tokens=320, version="3",
)  # fmt: skip
SIMPLE_EQUATIONS = GymFamily(
    "simple_equations", "math", "simple_equations",
    {
        "easy": {"min_terms": 2, "max_terms": 2, "max_value": 10, "operators_weights": [0.5, 0.5, 0.0]},
        "medium": {"min_terms": 2, "max_terms": 2, "max_value": 20},
        "hard": {"min_terms": 3, "max_terms": 4, "max_value": 40},
    },
    _ask_equation, _work_equation, max_tokens=96, version="2",
)  # fmt: skip
PRIME_FACTORS = GymFamily(
    "prime_factorization", "math", "prime_factorization",
    {
        "easy": {"min_value": 4, "max_value": 60},
        "medium": {"min_value": 60, "max_value": 300},
        "hard": {"min_value": 300, "max_value": 2000},
    },
    _ask_factors, _work_factors, _read_factors, max_tokens=128, version="3",
)  # fmt: skip
LEG_COUNTING = GymFamily(
    "leg_counting", "math", "leg_counting",
    {
        "easy": {"min_animals": 1, "max_animals": 2, "max_instances": 5},
        "medium": {"min_animals": 3, "max_animals": 3, "max_instances": 9},
        "hard": {"min_animals": 4, "max_animals": 6, "max_instances": 15},
    },
    _ask_legs, _work_legs, max_tokens=224, version="3",
)  # fmt: skip
FRACTIONS = GymFamily(
    "fraction_simplification", "math", "fraction_simplification",
    {
        "easy": {"max_value": 12, "max_factor": 6, "styles": ("plain",)},
        "medium": {"max_value": 40, "max_factor": 12, "styles": ("plain",)},
        "hard": {"max_value": 200, "max_factor": 40, "styles": ("plain",)},
    },
    _ask_fraction, _work_fraction, _read_fraction, max_tokens=352, version="3",
    facts=("numerator", "denominator", "simplified_numerator", "simplified_denominator"),
)  # fmt: skip
WORD_PROBLEMS = GymFamily(
    "gsm_symbolic", "math", "gsm_symbolic",
    {"easy": {}, "medium": {}, "hard": {}},
    _ask_word_problem, _work_word_problem, max_tokens=192, version="2",
)  # fmt: skip
