"""Reasoning: letters, lists, retrieval, space and the calendar, each with a trace that ends in the answer."""

import ast
import re
from datetime import date, timedelta

from cogumi_dagster.lib.tasks.answers import final_text, stated_answer
from cogumi_dagster.lib.tasks.base import Difficulty
from cogumi_dagster.lib.tasks.gym import Entry, GymFamily, Worked, read_number

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _ask_backward(entry: Entry) -> str:
    word = entry["metadata"]["word"]
    return (
        f"Spell this word backward (example: sun -> nus): {word}\n"
        'List its letters, then the letters in reverse, then end with a line "Answer: <word>".'
    )


def _work_backward(entry: Entry, _: Difficulty) -> Worked:
    word = entry["metadata"]["word"]
    return f"Letters: {' '.join(word)}\nReversed: {' '.join(reversed(word))}", word[::-1]


def _read_word(response: str) -> str:
    text = final_text(response)
    return text if " " not in text else text.split()[-1].strip("\"'.`*")


def _ask_letters(entry: Entry) -> str:
    return (
        f'{entry["question"]}\nCapitals count too. Work it out step by step, then end with a line "Answer: <number>".'
    )


def _work_letters(entry: Entry, _: Difficulty) -> Worked | None:
    letter, span = entry["metadata"]["target_letter"], entry["metadata"]["span"]
    if not letter.isalpha():
        return None  # a sign that is numbered must not look like its number
    found, words = 0, []
    for word in span:
        spelled = []
        for sign in word.lower():
            found += sign == letter
            spelled.append(f"{sign}{found}" if sign == letter else sign)
        words.append(" ".join(spelled))
    return ", ".join(words), str(found)


def _ask_filter(entry: Entry) -> str:
    request = entry["question"].split("\n")[0]
    return (
        f"{request}\n"
        "Go through the numbers, say keep or drop for each, and end with a line "
        "\"Answer: <list>\" in the same format, such as ['1.5', '-2']."
    )


def _work_filter(entry: Entry, _: Difficulty) -> Worked:
    facts = entry["metadata"]
    limit, operation = float(facts["filter_value"]), facts["operation"]
    larger = operation.endswith("larger")
    kept, notes = [], []
    for text in facts["original_numbers"]:
        hit = float(text) > limit if larger else float(text) < limit
        keep = hit if operation.startswith("keep") else not hit
        notes.append(f"{text} {'keep' if keep else 'drop'}")
        if keep:
            kept.append(text)
    return "; ".join(notes), str(kept)


def _read_list(response: str) -> str:
    """The last bracketed list, as Python writes a list of strings."""
    found = re.findall(r"\[[^\[\]]*\]", stated_answer(response) or response)
    if not found:
        return ""
    try:
        items = ast.literal_eval(found[-1])
        if all(isinstance(item, str) for item in items):
            return str(items)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    return str([item.strip(" '\"") for item in found[-1][1:-1].split(",") if item.strip()])


def _ask_sort(entry: Entry) -> str:
    facts = entry["metadata"]
    order = "alphabetical" if facts["direction"] == "ascending" else "reverse alphabetical"
    return (
        f"Sort these words in {order} order: {', '.join(facts['transformed_words'])}\n"
        'Take the words one by one, then end with a line "Answer: <word>, <word>, ...".'
    )


def _work_sort(entry: Entry, _: Difficulty) -> Worked | None:
    words = entry["metadata"]["transformed_words"]
    if not all(word.isalpha() and word.islower() for word in words):
        return None  # capitals sort before small letters: a rule of ASCII, not of the alphabet
    ordered = sorted(words, reverse=entry["metadata"]["direction"] == "descending")
    return "\n".join(f"{place}. {word}" for place, word in enumerate(ordered, 1)), ", ".join(ordered)


def _ask_needle(entry: Entry) -> str:
    statements, question = entry["question"].rsplit("\n", 1)
    question = question.replace("Reply only with a name.", "").strip()
    return f'{statements.strip()}\n{question} Quote the sentence, then end with a line "Answer: <name>".'


def _work_needle(entry: Entry, _: Difficulty) -> Worked | None:
    statements, question = entry["question"].rsplit("\n", 1)
    what = question.removeprefix("Who ").split("?")[0]
    sentences = [sentence for sentence in statements.strip().rstrip(".").split(". ") if sentence.endswith(f" {what}")]
    if len(sentences) != 1:
        return None  # two people may share a liking
    return f"The text says: {sentences[0]}.", sentences[0].split()[0]


_TURNS = {
    "front": {"top": "front", "front": "bottom", "bottom": "back", "back": "top"},
    "back": {"top": "back", "back": "bottom", "bottom": "front", "front": "top"},
    "right": {"top": "right", "right": "bottom", "bottom": "left", "left": "top"},
    "left": {"top": "left", "left": "bottom", "bottom": "right", "right": "top"},
    "bottom": {"top": "bottom", "bottom": "top", "front": "back", "back": "front"},
}
"""Which side each side takes its colour from when that side is brought to the top."""


def _ask_cube(entry: Entry) -> str:
    facts = entry["metadata"]
    sides = ", ".join(f"{side} {colour}" for side, colour in facts["initial_state"].items())
    turns = ", then ".join(f"the {side} side to the top" for side in facts["rotations"])
    return (
        f"A cube has these colours: {sides}. It is rotated to bring {turns}. (Bringing the bottom to the top is a "
        f"half turn that swaps front and back.) What colour is the {facts['target_side']} side now?\n"
        'List all sides after each turn, then end with a line "Answer: <colour>".'
    )


def _work_cube(entry: Entry, _: Difficulty) -> Worked:
    facts = entry["metadata"]
    state, lines = dict(facts["initial_state"]), []
    for side in facts["rotations"]:
        state = {place: state[_TURNS[side].get(place, place)] for place in state}
        lines.append(f"{side} to top: " + ", ".join(f"{place} {colour}" for place, colour in state.items()))
    return "\n".join(lines), state[facts["target_side"]]


def _ask_weekday(entry: Entry) -> str:
    question = re.split(r"(?<=\?) ", entry["question"])[0]
    return f'{question}\nWork it out step by step, then end with a line "Answer: <weekday>".'


def _work_weekday(entry: Entry, _: Difficulty) -> Worked:
    facts = entry["metadata"]
    start, offset = date.fromisoformat(facts["start_date"]), int(facts["offset_days"])
    rest, step = abs(offset) % 7, 1 if offset > 0 else -1
    days = [_WEEKDAYS[(start + timedelta(step * n)).weekday()] for n in range(rest + 1)]
    sign = "+" if step > 0 else "-"
    counted = ", ".join(f"{sign}{n} {day}" for n, day in enumerate(days) if n) or "no days left"
    weeks = abs(offset) // 7
    steps = f"{weeks} * 7 = {weeks * 7}, {abs(offset)} - {weeks * 7} = {rest}. Start: {days[0]}. {counted}."
    return steps, days[-1]


def _read_weekday(response: str) -> str:
    named = re.findall("|".join(_WEEKDAYS), stated_answer(response) or response, re.IGNORECASE)
    if stated_answer(response) and len({day.lower() for day in named}) != 1:
        return ""
    return named[-1].title() if named else ""


SPELL_BACKWARD = GymFamily(
    "spell_backward", "reasoning", "spell_backward",
    {
        "easy": {"min_word_len": 3, "max_word_len": 4},
        "medium": {"min_word_len": 5, "max_word_len": 6},
        "hard": {"min_word_len": 7, "max_word_len": 10},
    },
    _ask_backward, _work_backward, _read_word, max_tokens=96,
)  # fmt: skip
LETTER_COUNTING = GymFamily(
    "letter_counting", "reasoning", "letter_counting",
    {
        "easy": {"min_words": 2, "max_words": 3},
        "medium": {"min_words": 4, "max_words": 6},
        "hard": {"min_words": 7, "max_words": 10},
    },
    _ask_letters, _work_letters, read_number, max_tokens=256, version="3",
)  # fmt: skip
NUMBER_FILTERING = GymFamily(
    "number_filtering", "reasoning", "number_filtering",
    {
        "easy": {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
        "medium": {"min_numbers": 3, "max_numbers": 5, "max_decimals": 1},
        "hard": {"min_numbers": 5, "max_numbers": 7, "max_decimals": 2},
    },
    _ask_filter, _work_filter, _read_list, max_tokens=160,
)  # fmt: skip
WORD_SORTING = GymFamily(
    "word_sorting", "reasoning", "word_sorting",
    {
        "easy": {"min_words": 3, "max_words": 3, "max_word_length": 8},
        "medium": {"min_words": 4, "max_words": 5, "max_word_length": 8},
        "hard": {"min_words": 6, "max_words": 8, "max_word_length": 10},
    },
    _ask_sort, _work_sort, final_text, facts=("sorted_words",), max_tokens=128,
)  # fmt: skip
NEEDLE = GymFamily(
    "needle_haystack", "reasoning", "needle_haystack",
    {
        "easy": {"min_num_statements": 3, "max_num_statements": 4},
        "medium": {"min_num_statements": 5, "max_num_statements": 8},
        "hard": {"min_num_statements": 10, "max_num_statements": 14},
    },
    _ask_needle, _work_needle, final_text, max_tokens=64,
)  # fmt: skip
COLOR_CUBE = GymFamily(
    "color_cube", "reasoning", "color_cube_rotation",
    {
        "easy": {"min_rotations": 1, "max_rotations": 1},
        "medium": {"min_rotations": 2, "max_rotations": 2},
        "hard": {"min_rotations": 3, "max_rotations": 3},
    },
    _ask_cube, _work_cube, final_text, max_tokens=160,
)  # fmt: skip
WEEKDAY_OFFSET = GymFamily(
    "weekday_offset", "reasoning", "calendar_arithmetic",
    {
        "easy": {"tasks": ["weekday_offset"], "offset_upper_bound": 9},
        "medium": {"tasks": ["weekday_offset"], "offset_upper_bound": 40},
        "hard": {"tasks": ["weekday_offset"], "offset_upper_bound": 365},
    },
    _ask_weekday, _work_weekday, _read_weekday, facts=("task",), max_tokens=128, version="3",
)  # fmt: skip
