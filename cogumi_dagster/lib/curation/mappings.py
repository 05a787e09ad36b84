"""How rows of known instruction datasets become an instruction and a response: one table.

A mapping is named, or found by the fields of the rows. Fields that it does not read are ignored.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a row says. None is what it does not say."""

    instruction: str
    response: str | None
    domain: str | None = None
    difficulty: Difficulty | None = None
    licence: str | None = None


@dataclass(frozen=True)
class RowMapping:
    """``needs`` are the fields by which rows of this kind are known; ``read`` raises ValueError for a broken row."""

    needs: frozenset[str]
    read: Callable[[Row], Parts]
    domain: str | None = None
    """The domain of rows that state none."""


DOMAIN_WORDS: Mapping[str, str] = {
    "code": "code", "coding": "code", "programming": "code", "tool use": "code",
    "math": "math", "mathematics": "math",
    "reasoning": "reasoning", "logic": "reasoning", "common sense": "reasoning", "closed_qa": "reasoning",
    "classification": "reasoning", "information_extraction": "reasoning",
    "science": "science",
    "conversation": "conversation", "instruction": "conversation", "reading": "conversation",
    "summarization": "conversation", "open_qa": "conversation", "general_qa": "conversation",
    "creative": "creative", "creative_writing": "creative", "brainstorming": "creative",
    "automation": "automation",
}  # fmt: skip
"""Words of datasets (Dolly's categories among them) for our domains."""

TAG = re.compile(r"\A\s*<(response|answer)>(.*)</\1>\s*\Z", re.S)
CALCULATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator: ``16 - 3 = <<16-3=13>>13``."""
GSM8K_STEPS: Mapping[int, Difficulty] = {0: "easy", 1: "easy", 2: "easy", 3: "medium", 4: "medium"}
"""Difficulty by calculations in the solution: GSM8K's training rows are 36 % easy, 48 % medium and 17 % hard."""


def _text(row: Row, *names: str) -> str:
    """The first of these fields that is not empty, or ""."""
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} is no text")
        if value.strip():
            return value.strip()
    return ""


def _stated(row: Row) -> dict[str, Any]:
    """Domain, difficulty and licence where the row, or its ``metadata``, states them."""
    inner = row.get("metadata")
    row = {**row, **inner} if isinstance(inner, Mapping) else row
    difficulty = _text(row, "difficulty").lower() or None
    if difficulty not in (None, *DIFFICULTIES):
        raise ValueError(f"unknown difficulty {difficulty!r}")
    domain = DOMAIN_WORDS.get(_text(row, "domain", "category").lower().replace("-", "_"))
    return {"domain": domain, "difficulty": difficulty, "licence": _text(row, "licence", "license") or None}


def _pair(row: Row, instruction: str, response: str, **stated: Any) -> Parts:
    if not instruction:
        raise ValueError("no instruction")
    return Parts(instruction, response or None, **{**_stated(row), **stated})


def _alpaca(row: Row) -> Parts:
    asked, given = _text(row, "instruction"), _text(row, "input")
    if not asked:
        raise ValueError("no instruction")
    return _pair(row, f"{asked}\n{given}".strip(), _text(row, "response", "output"))


def _hh(row: Row) -> Parts:
    """The last turn of the human and of the assistant in the dialogue that was preferred."""
    asked, mark, answer = _text(row, "chosen").rpartition("Assistant:")
    if not mark or "\n\nHuman:" in answer:
        raise ValueError("the dialogue does not end with the assistant")
    return _pair(row, asked.rpartition("Human:")[2].strip(), answer.strip())


def _dolly(row: Row) -> Parts:
    asked = "\n\n".join(filter(None, (_text(row, "instruction"), _text(row, "context"))))
    return _pair(row, asked, _text(row, "response"))


def _metamath(row: Row) -> Parts:
    return _pair(row, _text(row, "query"), _text(row, "response"))


def _openorca(row: Row) -> Parts:
    asked = _text(row, "question")
    # The answer's form follows the system prompt ("explain like I'm five"), so it is part of what was asked.
    return _pair(row, "\n\n".join(filter(None, (_text(row, "system_prompt"), asked))) if asked else "",
                 _text(row, "response"))  # fmt: skip


def _question(row: Row) -> Parts:
    answer = _text(row, "answer")
    if "####" not in answer:
        return _pair(row, _text(row, "question"), answer)
    steps = len(CALCULATION.findall(answer))
    stated = {"domain": "math", "difficulty": GSM8K_STEPS.get(steps, "hard")}
    return _pair(row, _text(row, "question"), CALCULATION.sub("", answer), **stated)


def _prompt(row: Row) -> Parts:
    answer = _text(row, "response")
    tagged = TAG.match(answer)
    return _pair(row, _text(row, "prompt"), tagged.group(2).strip() if tagged else answer)


MAPPINGS: Mapping[str, RowMapping] = {
    "anthropic-hh": RowMapping(frozenset({"chosen"}), _hh, "conversation"),
    "openorca": RowMapping(frozenset({"system_prompt", "question"}), _openorca),
    "metamath": RowMapping(frozenset({"query", "response"}), _metamath, "math"),
    "dolly": RowMapping(frozenset({"instruction", "context"}), _dolly),
    "alpaca": RowMapping(frozenset({"instruction"}), _alpaca),
    "code-alpaca": RowMapping(frozenset({"instruction", "input", "output"}), _alpaca, "code"),
    "question-answer": RowMapping(frozenset({"question"}), _question),
    "prompt-response": RowMapping(frozenset({"prompt"}), _prompt),
}
"""By name, in the order in which rows are tried. CodeAlpaca's rows look like Alpaca's: name it, or give a domain."""


@dataclass(frozen=True)
class KnownDataset:
    mapping: str
    licence: str


KNOWN_DATASETS: Mapping[str, KnownDataset] = {
    "tatsu-lab/alpaca": KnownDataset("alpaca", "CC-BY-NC-4.0"),
    "vicgalle/alpaca-gpt4": KnownDataset("alpaca", "CC-BY-NC-4.0"),
    "Anthropic/hh-rlhf": KnownDataset("anthropic-hh", "MIT"),
    "sahil2801/CodeAlpaca-20k": KnownDataset("code-alpaca", "CC-BY-NC-4.0"),
    "databricks/databricks-dolly-15k": KnownDataset("dolly", "CC-BY-SA-3.0"),
    "meta-math/MetaMathQA": KnownDataset("metamath", "MIT"),
    "Open-Orca/OpenOrca": KnownDataset("openorca", "MIT"),
}
"""Mapping and licence of datasets of the Hugging Face hub, as their cards or repositories state them."""


def mapping_named(name: str) -> RowMapping:
    """The mapping of that name. Raises CogumiError with the nearest known one."""
    if name not in MAPPINGS:
        raise CogumiError(f"there is no mapping {name!r}", nearest(name, MAPPINGS))
    return MAPPINGS[name]


def mapping_for(fields: Mapping[str, Any]) -> RowMapping | None:
    """The first mapping whose fields a row has."""
    return next((mapping for mapping in MAPPINGS.values() if mapping.needs <= fields.keys()), None)
