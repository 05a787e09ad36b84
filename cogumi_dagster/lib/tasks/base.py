"""A task: a prompt with a verifier, a difficulty and a split that its own text decides."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]
Difficulty = Literal["easy", "medium", "hard"]

DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "medium", "hard")
DIFFICULTY_MIX: Mapping[Difficulty, float] = {"easy": 0.30, "medium": 0.50, "hard": 0.20}
"""The specification's mix of difficulties."""


def split_of(text: str) -> Split:
    """Train, validation or test (80/10/10) by the hash of the text's words, so that no text is ever in two."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    return "train" if bucket < 80 else "validation" if bucket < 90 else "test"


@dataclass(frozen=True)
class Task:
    """One task. ``solution`` is the exact solver's full response, or None where no solver exists.

    ``payload`` is plain JSON for the family's verifier; ``answer`` is the canonical short answer; ``split_by`` decides
    the split in place of the prompt, where one problem has many prompts: it is then of one split. ``kind`` is the
    template that it was filled into, where templates are fewer than tasks: those of one come out right or wrong
    together.
    """

    domain: str
    family: str
    difficulty: Difficulty
    prompt: str
    payload: dict[str, Any] = field(default_factory=dict)
    answer: str | None = None
    solution: str | None = None
    source: str = "generated"
    licence: str = "Apache-2.0"
    split_by: str = ""
    kind: str = ""

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.family}\n{self.prompt}".encode()).hexdigest()[:16]

    @property
    def split(self) -> Split:
        return split_of(self.split_by or self.prompt)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "split": self.split, **asdict(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Task":
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of a response. ``passed`` is None when it could not be judged ("not run")."""

    passed: bool | None
    reason: str
    score: float = 0.0
    """0 to 1; partial credit where the family gives it, else 1.0 for a pass."""


class Family(Protocol):
    """A task family: where tasks come from and who says whether an answer is right."""

    name: str
    domain: str
    max_tokens: int
    """Enough room for a right answer of this family, in the student's tokens."""

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        """``count`` distinct tasks at most (fewer where the family is finite), the same for the same seed."""
        ...

    def verify(self, task: Task, response: str) -> Verdict:
        """Judge ``response``. Never raises on any text; never executes it outside the sandbox."""
        ...
