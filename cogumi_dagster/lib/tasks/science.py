"""Science: formulas, units and constants, with numbers that are checked to 1 %.

Formulas are school physics and chemistry. Constants: CODATA 2018 rounded to the figures that the prompt names;
atomic masses from IUPAC's abridged table (2021), rounded to one decimal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from cogumi_dagster.lib.tasks.answers import judge_number
from cogumi_dagster.lib.tasks.base import Difficulty, Task, Verdict
from cogumi_dagster.lib.tasks.drawing import distinct, seeded

TOLERANCE = 0.01
"""Relative. Room for rounding in between, none for a wrong formula."""

Problem = tuple[str, str, float, str]
"""Question, worked steps, answer, unit."""
Draw = Callable[[Random, Difficulty], Problem]


@dataclass(eq=False)
class ScienceFamily:
    """Problems of one field, drawn by ``draw``."""

    name: str
    draw: Draw
    domain: str = "science"
    max_tokens: int = 128
    version: str = "1"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        rng = seeded(self.name, difficulty, seed)
        return distinct(lambda: self._task(*self.draw(rng, difficulty), difficulty), count)

    def verify(self, task: Task, response: str) -> Verdict:
        return judge_number(response, str(task.payload["value"]), TOLERANCE)

    def _task(self, question: str, steps: str, value: float, unit: str, difficulty: Difficulty) -> Task:
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=f"{question}\nWrite the formula, put in the numbers, "
            f'then end with a line "Answer: <number> {unit}".',
            payload={"value": show(value), "unit": unit},
            answer=f"{show(value)} {unit}",
            solution=f"{steps}\nAnswer: {show(value)} {unit}",
        )


def show(value: float) -> str:
    """A number to six significant figures, never in exponent form."""
    text = f"{float(f'{value:.6g}'):.10f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _number(rng: Random, difficulty: Difficulty) -> float:
    """An operand: one digit for easy, two for medium, one decimal for hard."""
    if difficulty == "easy":
        return rng.randint(2, 12)
    return rng.randint(11, 60) if difficulty == "medium" else rng.randint(21, 600) / 10


_THINGS = ("A cart", "A cyclist", "A ball", "A train", "A drone", "A boat", "A sled", "A robot")


def _mechanics(rng: Random, difficulty: Difficulty) -> Problem:
    a, b = _number(rng, difficulty), _number(rng, difficulty)
    thing = rng.choice(_THINGS)
    low = thing[0].lower() + thing[1:]
    x, y = show(a), show(b)
    problems: list[Problem] = [
        (f"{thing} moves {show(a * b)} m in {y} s at constant speed. What is its speed?",
         f"v = s / t = {show(a * b)} / {y} = {x}", a, "m/s"),
        (f"{thing} moves at {x} m/s for {y} s. How far does it go?",
         f"s = v * t = {x} * {y} = {show(a * b)}", a * b, "m"),
        (f"A net force of {show(a * b)} N acts on {low} of {y} kg. What is its acceleration?",
         f"a = F / m = {show(a * b)} / {y} = {x}", a, "m/s^2"),
        (f"What net force gives {low} of {x} kg an acceleration of {y} m/s^2?",
         f"F = m * a = {x} * {y} = {show(a * b)}", a * b, "N"),
        (f"{thing} of {x} kg moves at {y} m/s. What is its momentum?",
         f"p = m * v = {x} * {y} = {show(a * b)}", a * b, "kg m/s"),
    ]  # fmt: skip
    if difficulty != "easy":
        kinetic, fall = a * b * b / 2, a * 9.8 * b
        problems += [
            (f"{thing} of {x} kg moves at {y} m/s. What is its kinetic energy?",
             f"v^2 = {y} * {y} = {show(b * b)}\nE = m * v^2 / 2 = {x} * {show(b * b)} / 2 = {show(kinetic)}",
             kinetic, "J"),
            (f"{thing} of {x} kg is lifted by {y} m. How much potential energy does it gain (g = 9.8 m/s^2)?",
             f"E = m * g * h\n{x} * 9.8 = {show(a * 9.8)}; {show(a * 9.8)} * {y} = {show(fall)}", fall, "J"),
        ]  # fmt: skip
    return rng.choice(problems)


def _electricity(rng: Random, difficulty: Difficulty) -> Problem:
    a, b = _number(rng, difficulty), _number(rng, difficulty)
    x, y, xy = show(a), show(b), show(a * b)
    device = rng.choice(("a lamp", "a heater", "a motor", "a resistor", "a toaster", "a fan"))
    problems: list[Problem] = [
        (f"A current of {x} A flows through {device} of {y} ohm. What is the voltage across it?",
         f"U = R * I = {y} * {x} = {xy}", a * b, "V"),
        (f"A voltage of {xy} V is put across {device} of {y} ohm. What current flows?",
         f"I = U / R = {xy} / {y} = {x}", a, "A"),
        (f"At {x} V a current of {y} A flows through {device}. What power does it draw?",
         f"P = U * I = {x} * {y} = {xy}", a * b, "W"),
        (f"Two resistors of {x} ohm and {y} ohm are in series. What is their total resistance?",
         f"R = R1 + R2 = {x} + {y} = {show(a + b)}", a + b, "ohm"),
    ]  # fmt: skip
    if difficulty != "easy":
        parallel, power = a * b / (a + b), a * a * b
        problems += [
            (f"Two resistors of {x} ohm and {y} ohm are in parallel. What is their total resistance?",
             f"R = R1 * R2 / (R1 + R2) = {xy} / {show(a + b)} = {show(parallel)}", parallel, "ohm"),
            (f"A current of {x} A flows through {device} of {y} ohm. What power does it turn into heat?",
             f"I^2 = {x} * {x} = {show(a * a)}\nP = R * I^2 = {y} * {show(a * a)} = {show(power)}", power, "W"),
        ]  # fmt: skip
    return rng.choice(problems)


_UNITS: Mapping[Difficulty, tuple[tuple[str, str, float], ...]] = {
    "easy": (
        ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("hours", "minutes", 60),
        ("minutes", "seconds", 60), ("L", "mL", 1000), ("days", "hours", 24),
    ),
    "medium": (
        ("m", "km", 0.001), ("g", "kg", 0.001), ("cm", "m", 0.01), ("mL", "L", 0.001), ("hours", "seconds", 3600),
        ("km/h", "m/s", 1 / 3.6), ("m/s", "km/h", 3.6), ("kJ", "J", 1000), ("minutes", "hours", 1 / 60),
    ),
    "hard": (
        ("m^2", "cm^2", 10_000), ("m^3", "L", 1000), ("cm^3", "m^3", 1e-6), ("kWh", "J", 3.6e6), ("mm^2", "cm^2", 0.01),
        ("g/cm^3", "kg/m^3", 1000), ("days", "seconds", 86_400), ("km/h", "m/s", 1 / 3.6), ("kPa", "bar", 0.01),
    ),
}  # fmt: skip


def _conversion(rng: Random, difficulty: Difficulty) -> Problem:
    if difficulty == "hard" and rng.random() < 0.25:
        celsius = rng.randint(-40, 120)
        value = celsius * 9 / 5 + 32
        return (f"Convert {celsius} degrees Celsius to degrees Fahrenheit.",
                f"F = C * 9 / 5 + 32 = {show(celsius * 9 / 5)} + 32 = {show(value)}", value, "F")  # fmt: skip
    source, target, factor = rng.choice(_UNITS[difficulty])
    amount = _number(rng, difficulty)
    ask = rng.choice(("Convert {} {} to {}.", "How much is {} {} in {}?", "Express {} {} in {}."))
    value = amount * factor
    if factor >= 1:
        steps = f"1 {source} = {show(factor)} {target}\n{show(amount)} * {show(factor)} = {show(value)}"
    else:
        steps = f"1 {target} = {show(1 / factor)} {source}\n{show(amount)} / {show(1 / factor)} = {show(value)}"
    return ask.format(show(amount), source, target), steps, value, target


_MASSES = {
    "H": 1.0, "C": 12.0, "N": 14.0, "O": 16.0, "Na": 23.0, "Mg": 24.3, "S": 32.1, "Cl": 35.5, "K": 39.1, "Ca": 40.1,
}  # fmt: skip
_FORMULAS: Mapping[str, Mapping[str, int]] = {
    "H2O": {"H": 2, "O": 1}, "CO2": {"C": 1, "O": 2}, "CH4": {"C": 1, "H": 4}, "NH3": {"N": 1, "H": 3},
    "NaCl": {"Na": 1, "Cl": 1}, "O2": {"O": 2}, "N2": {"N": 2}, "HCl": {"H": 1, "Cl": 1}, "MgO": {"Mg": 1, "O": 1},
    "CaCO3": {"Ca": 1, "C": 1, "O": 3}, "H2SO4": {"H": 2, "S": 1, "O": 4}, "KCl": {"K": 1, "Cl": 1},
    "C2H6O": {"C": 2, "H": 6, "O": 1}, "C6H12O6": {"C": 6, "H": 12, "O": 6}, "SO2": {"S": 1, "O": 2},
    "NaOH": {"Na": 1, "O": 1, "H": 1}, "C3H8": {"C": 3, "H": 8}, "HNO3": {"H": 1, "N": 1, "O": 3},
}  # fmt: skip


def _chemistry(rng: Random, difficulty: Difficulty) -> Problem:
    formula = rng.choice(list(_FORMULAS))
    atoms = _FORMULAS[formula]
    mass = sum(_MASSES[symbol] * count for symbol, count in atoms.items())
    masses = ", ".join(f"{symbol} {show(_MASSES[symbol])}" for symbol in atoms)
    total = " + ".join(f"{count} * {show(_MASSES[symbol])}" for symbol, count in atoms.items())
    molar = f"M = {total} = {show(mass)} g/mol"
    amount = rng.randint(2, 40) / (1 if difficulty == "easy" else 4)
    if difficulty == "easy" and rng.random() < 0.3:
        return f"What is the molar mass of {formula} ({masses} g/mol)?", molar, mass, "g/mol"
    if difficulty != "hard":
        return (f"What is the mass of {show(amount)} mol of {formula} ({masses} g/mol)?",
                f"{molar}\nm = n * M = {show(amount)} * {show(mass)} = {show(amount * mass)}",
                amount * mass, "g")  # fmt: skip
    if rng.random() < 0.5:
        volume = rng.randint(2, 30) / 2
        return (f"{show(amount)} mol of {formula} is dissolved to {show(volume)} L. What is the concentration?",
                f"c = n / V = {show(amount)} / {show(volume)} = {show(amount / volume)}",
                amount / volume, "mol/L")  # fmt: skip
    grams = rng.randint(10, 400)
    return (f"How many moles are {grams} g of {formula} ({masses} g/mol)?",
            f"{molar}\nn = m / M = {grams} / {show(mass)} = {show(grams / mass)}", grams / mass, "mol")  # fmt: skip


def _matter(rng: Random, difficulty: Difficulty) -> Problem:
    a, b = _number(rng, difficulty), _number(rng, difficulty)
    x, y, xy = show(a), show(b), show(a * b)
    body = rng.choice(("A block", "A stone", "A liquid", "A metal bar", "A piece of plastic"))
    problems: list[Problem] = [
        (f"{body} of {xy} g fills {y} cm^3. What is its density?", f"d = m / V = {xy} / {y} = {x}", a, "g/cm^3"),
        (f"{body} has a density of {x} g/cm^3 and fills {y} cm^3. What is its mass?",
         f"m = d * V = {x} * {y} = {xy}", a * b, "g"),
        (f"A force of {xy} N presses on {y} m^2. What is the pressure?", f"p = F / A = {xy} / {y} = {x}", a, "Pa"),
        (f"A wave has a frequency of {x} Hz and a wavelength of {y} m. How fast does it travel?",
         f"v = f * l = {x} * {y} = {xy}", a * b, "m/s"),
    ]  # fmt: skip
    if difficulty != "easy":
        heat = a * 4.18 * b
        problems.append(
            (f"How much heat warms {x} g of water by {y} K (c = 4.18 J/(g K))?",
             f"Q = m * c * dT\n{x} * 4.18 = {show(a * 4.18)}; {show(a * 4.18)} * {y} = {show(heat)}", heat, "J")
        )  # fmt: skip
    if difficulty == "hard":
        half_lives, start = rng.randint(2, 5), rng.randint(1, 20) * 32
        left = start / 2**half_lives
        life = rng.randint(2, 30)
        problems.append(
            (f"A sample of {start} mg has a half-life of {life} days. How much is left after {life * half_lives} days?",
             f"{life * half_lives} / {life} = {half_lives} half-lives\n{start} / 2^{half_lives} = {show(left)}",
             left, "mg")
        )  # fmt: skip
    return rng.choice(problems)


MECHANICS = ScienceFamily("science_mechanics", _mechanics)
ELECTRICITY = ScienceFamily("science_electricity", _electricity)
CONVERSION = ScienceFamily("science_units", _conversion)
CHEMISTRY = ScienceFamily("science_chemistry", _chemistry)
MATTER = ScienceFamily("science_matter", _matter)
