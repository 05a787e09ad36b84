"""Conversation and creative writing: a seed instruction with constraints that rules can check.

Whether the text is good is the judge's business; whether it keeps to the constraints is decided here. There is no
exact solver, so ``solution`` is None.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Task, Verdict
from cogumi_dagster.lib.tasks.drawing import distinct, seeded

SEEDS = Path(__file__).parents[3] / "resources" / "sources"
CONSTRAINTS: Mapping[Difficulty, int] = {"easy": 1, "medium": 2, "hard": 3}
"""How many constraints a task carries."""

_ABBREVIATIONS = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|a\.m|p\.m)\.", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)*_]*(?=\s|$)")
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+\S")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

Constraint = dict[str, Any]
"""Plain JSON: ``kind`` and its parameter ``value``."""


def words_in(text: str) -> list[str]:
    return _WORD.findall(text)


def sentences_in(text: str) -> int:
    """Sentences, where an abbreviation or a decimal point ends none and an unfinished last one counts."""
    plain = _ABBREVIATIONS.sub("abbreviation", text).strip()
    ends = list(_SENTENCE_END.finditer(plain))
    rest = plain[ends[-1].end() :] if ends else plain
    return len(ends) + bool(words_in(rest))


def bullets_in(text: str) -> int:
    return sum(bool(_BULLET.match(line)) for line in text.splitlines())


def _includes(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _starts(text: str, word: str) -> bool:
    words = words_in(text)
    return bool(words) and words[0].lower() == word.lower()


@dataclass(frozen=True)
class Rule:
    """A kind of constraint: how it is put, how its value is drawn and how it is checked."""

    ask: str
    draw: Callable[[Random, tuple[str, ...]], Any]
    holds: Callable[[str, Any], bool]
    group: str
    """Constraints of one group exclude each other."""


RULES: Mapping[str, Rule] = {
    "sentences": Rule("Write exactly {} sentences.", lambda rng, _: rng.randint(2, 4),
                      lambda text, n: sentences_in(text) == n, "shape"),
    "bullets": Rule("Write a bullet list of exactly {} items, each on a line that starts with \"- \".",
                    lambda rng, _: rng.randint(3, 5), lambda text, n: bullets_in(text) == n, "shape"),
    "at_most_words": Rule("Use at most {} words.", lambda rng, _: rng.randrange(30, 81, 10),
                          lambda text, n: 0 < len(words_in(text)) <= n, "length"),
    "at_least_words": Rule("Use at least {} words.", lambda rng, _: rng.randrange(15, 41, 5),
                           lambda text, n: len(words_in(text)) >= n, "length"),
    "include": Rule("Include the word \"{}\".", lambda rng, words: rng.choice(words), _includes, "include"),
    "avoid": Rule("Do not use the word \"{}\".", lambda rng, _: rng.choice(("very", "really", "nice", "good", "thing")),
                  lambda text, word: bool(words_in(text)) and not _includes(text, word), "avoid"),
    "start": Rule("Start with the word \"{}\".", lambda rng, words: rng.choice(words), _starts, "start"),
    "end_question": Rule("End with a question mark.", lambda rng, _: True,
                         lambda text, _: text.rstrip(" \n\"'*_)").endswith("?"), "end"),
    "end_exclamation": Rule("End with an exclamation mark.", lambda rng, _: True,
                            lambda text, _: text.rstrip(" \n\"'*_)").endswith("!"), "end"),
    "lowercase": Rule("Use no capital letters.", lambda rng, _: True,
                      lambda text, _: bool(words_in(text)) and text == text.lower(), "case"),
}  # fmt: skip


@dataclass(eq=False)
class WritingFamily:
    """Seed instructions of one domain, each with one to three constraints."""

    name: str
    domain: str
    words: tuple[str, ...]
    """Words that a text may be asked to include."""
    openers: tuple[str, ...]
    max_tokens: int = 160
    version: str = "1"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        rng = seeded(self.name, difficulty, seed)
        seeds = [row["instruction"] for row in read_seeds(self.domain) if row["difficulty"] == difficulty]
        return distinct(lambda: self._task(rng, rng.choice(seeds), difficulty), count)

    def verify(self, task: Task, response: str) -> Verdict:
        text = response.strip()
        if not text:
            return Verdict(False, "the response is empty")
        constraints: list[Constraint] = task.payload["constraints"]
        broken = [one for one in constraints if not RULES[one["kind"]].holds(text, one["value"])]
        if broken:
            score = 1.0 - len(broken) / len(constraints)
            return Verdict(False, "not kept: " + " ".join(map(describe, broken)), score)
        return Verdict(True, "all constraints are kept", 1.0)

    def _task(self, rng: Random, instruction: str, difficulty: Difficulty) -> Task:
        constraints: list[Constraint] = []
        groups: set[str] = set()
        while len(constraints) < CONSTRAINTS[difficulty]:
            kind = rng.choice(list(RULES))
            rule = RULES[kind]
            if rule.group in groups or {rule.group, *groups} >= {"case", "start"}:
                continue
            if {kind, rule.group} & {"bullets", "end"} and ("end" in groups or _has(constraints, "bullets")):
                continue  # a list has no end that a sentence's mark would close
            pool = self.openers if kind == "start" else self.words
            constraints.append({"kind": kind, "value": rule.draw(rng, pool)})
            groups.add(rule.group)
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=" ".join([instruction, *map(describe, constraints)]),
            payload={"instruction": instruction, "constraints": constraints},
            source=f"resources/sources/{self.domain}_seeds.jsonl",
        )


def describe(constraint: Constraint) -> str:
    """A constraint as the prompt puts it."""
    return RULES[constraint["kind"]].ask.format(constraint["value"])


def _has(constraints: list[Constraint], kind: str) -> bool:
    return any(one["kind"] == kind for one in constraints)


@cache
def read_seeds(domain: str) -> tuple[dict[str, Any], ...]:
    """The seed instructions of a domain.

    Raises:
        CogumiError: the file is missing, or a row lacks its instruction or has an unknown difficulty.
    """
    path = SEEDS / f"{domain}_seeds.jsonl"
    rows = read_jsonl(path)
    for row in rows:
        if not isinstance(row.get("instruction"), str) or row.get("difficulty") not in DIFFICULTIES:
            raise CogumiError(
                f"{path.name}: a seed needs an instruction and a difficulty: {json.dumps(row)[:100]}",
                f"give it a difficulty of {', '.join(DIFFICULTIES)}",
            )
    return tuple(rows)


def seeds_version(domain: str) -> str:
    """SHA-256 (hex) of the file of seed instructions."""
    return hashlib.sha256((SEEDS / f"{domain}_seeds.jsonl").read_bytes()).hexdigest()


CONVERSATION = WritingFamily(
    "conversation_guided", "conversation",
    words=("please", "today", "because", "friend", "time", "help", "first", "maybe", "idea", "together"),
    openers=("Sure", "Well", "Of", "Thanks", "First", "Yes", "Hello", "Today"),
)  # fmt: skip
CREATIVE = WritingFamily(
    "creative_guided", "creative",
    words=("river", "silver", "window", "letter", "whisper", "lantern", "stone", "morning", "thread", "harbor"),
    openers=("Once", "Beneath", "Nobody", "Every", "Tonight", "Before", "When", "Somewhere"),
)  # fmt: skip
