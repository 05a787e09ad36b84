"""Logic and planning: a circuit evaluated gate by gate, courses taken one by one until none is left or none is free."""

import re
from functools import partial

from cogumi_dagster.lib.tasks.answers import closed_answer, final_text
from cogumi_dagster.lib.tasks.base import Difficulty
from cogumi_dagster.lib.tasks.gym import Entry, GymFamily, Worked

_GATES = {"&": "and", "\u2191": "nand", "\u2295": "xor", "+": "or", "\u2193": "nor"}


def _gate(term: str) -> tuple[str, list[str]]:
    """``A&B'`` as ("and", ["A", "not B"]). A single input is its own conjunction."""
    symbol = next((symbol for symbol in _GATES if symbol in term), "&")
    return _GATES[symbol], [f"not {name[0]}" if name.endswith("'") else name for name in term.split(symbol)]


def _value(gate: str, bits: list[int]) -> int:
    truth = {"and": all(bits), "nand": not all(bits), "or": any(bits), "nor": not any(bits), "xor": sum(bits) % 2}
    return int(truth[gate])


def _worked_gate(gate: str, bits: list[int]) -> str:
    """``and(1, 0) = 0``. An exclusive or of more bits goes two by two, ``xor(1, 1, 1) = xor(0, 1) = 1``: a parity is
    what a small model cannot see at a glance."""
    steps = [bits]
    while gate == "xor" and len(steps[-1]) > 2:
        first, second, *rest = steps[-1]
        steps.append([first ^ second, *rest])
    written = [f"{gate}({', '.join(map(str, step))})" for step in steps]
    return " = ".join([*written, str(_value(gate, bits))])


def _ask_circuit(entry: Entry) -> str:
    facts = entry["metadata"]
    inputs = ", ".join(f"{name}={bit}" for name, bit in facts["assignments"].items())
    gates = "; ".join(f"{gate}({', '.join(names)})" for gate, names in map(_gate, facts["term_strings"]))
    return (
        f"Inputs: {inputs}. Gates: {gates}. The output is the {facts['final_gate'].lower()} of all gates.\n"
        'Work it out step by step, then end with a line "Answer: <0 or 1>".'
    )


def _work_circuit(entry: Entry, _: Difficulty) -> Worked:
    facts = entry["metadata"]
    lines, outputs = [], []
    for gate, names in map(_gate, facts["term_strings"]):
        bits = [facts["assignments"][name[-1]] ^ name.startswith("not ") for name in names]
        outputs.append(_value(gate, bits))
        lines.append(f"{gate}({', '.join(names)}) = {_worked_gate(gate, bits)}")
    final = facts["final_gate"].lower()
    answer = _value(final, outputs)
    lines.append(_worked_gate(final, outputs))
    return "\n".join(lines), str(answer)


def _read_bit(response: str) -> str:
    """The one number of the answer, where it is a bit."""
    text = final_text(response)
    numbers = set(re.findall(r"(?<![\w.-])\d+(?!\w|\.\d)", text))
    return closed_answer(text, ("0", "1")) if len(numbers) == 1 else ""


def _ask_courses(entry: Entry) -> str:
    facts = entry["metadata"]
    pairs = ", ".join(f"{first}>{then}" for then, first in facts["prerequisites"])
    return (
        f"Courses 0 to {len(facts['courses']) - 1}, where a>b means a before b: {pairs}. Can all be taken?\n"
        'Work it out step by step, then end with a line "Answer: <True or False>".'
    )


def _work_courses(entry: Entry, _: Difficulty) -> Worked:
    left = [(first, then) for then, first in entry["metadata"]["prerequisites"]]
    todo = sorted(entry["metadata"]["courses"])
    lines = []
    while todo:
        lines.append(f"todo {' '.join(map(str, todo))}; left {' '.join(f'{a}>{b}' for a, b in left) or 'none'}")
        free = [course for course in todo if all(then != course for _, then in left)]
        if not free:
            return "\n".join([*lines, "stuck"]), "False"
        lines.append(f"take {free[0]}")
        todo.remove(free[0])
        left = [(first, then) for first, then in left if first != free[0]]
    return "\n".join([*lines, "all taken"]), "True"


CIRCUIT = GymFamily(
    "circuit_logic", "reasoning", "circuit_logic",
    {
        "easy": {"min_terms": 2, "max_terms": 2, "min_inputs": 2, "max_inputs": 2},
        "medium": {"min_terms": 3, "max_terms": 3, "min_inputs": 2, "max_inputs": 3},
        "hard": {"min_terms": 4, "max_terms": 5, "min_inputs": 2, "max_inputs": 4},
    },
    _ask_circuit, _work_circuit, _read_bit, facts=(), max_tokens=256, version="4",
)  # fmt: skip
COURSES = GymFamily(
    "course_schedule", "reasoning", "course_schedule",
    {
        "easy": {"min_num_courses": 4, "max_num_courses": 4, "max_cycle_length": 3, "max_num_prerequisites": 1},
        "medium": {"min_num_courses": 5, "max_num_courses": 5, "max_cycle_length": 4, "max_num_prerequisites": 1},
        "hard": {"min_num_courses": 6, "max_num_courses": 6, "max_num_prerequisites": 1},
    },
    _ask_courses, _work_courses, partial(closed_answer, classes=("True", "False")), max_tokens=192, version="3",
)  # fmt: skip
