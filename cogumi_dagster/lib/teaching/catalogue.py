"""The catalogue of teachers: data that users edit, not code.

Providers withdraw models and change prices, so ids and prices live in one YAML file (``resources/teachers.yaml``).
Money is counted in integer micro-dollars: a price in dollars per million tokens is micro-dollars per token.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.profile import Count, Section

Provider = Literal["solver", "local", "groq", "openai", "together", "anthropic"]
PAID_PROVIDERS: tuple[str, ...] = ("groq", "openai", "together", "anthropic")
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high"]
Price = Annotated[float, Field(ge=0.0)]

TEMPLATE_TOKENS = 256
"""Room for what a provider's chat template adds once (gpt-oss's preamble is the longest we know, under 100)."""

MESSAGE_TOKENS = 16
"""Room for the role markers of one message."""

MICROS = 1_000_000
"""Micro-dollars in a dollar."""


class Teacher(Section):
    """One teacher. ``name`` is its key in the file."""

    name: str
    provider: Provider
    model: str
    tier: Literal[1, 2, 3]
    usd_per_million_input: Price | None = None
    usd_per_million_output: Price | None = None
    usd_per_million_cached: Price | None = None
    requests_per_minute: Count = 60
    tokens_per_minute: Count | None = None
    concurrency: Count = 4
    base_url: str | None = None
    api_key_env: str | None = None
    system_prompt: str = ""
    system_prompt_version: str = ""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    reasoning_effort: ReasoningEffort | None = None
    reasoning_tokens: Annotated[int, Field(ge=0)] = 0
    stand_in: bool = False

    @model_validator(mode="after")
    def _fits_the_provider(self) -> "Teacher":
        if self.paid and not self.api_key_env:
            raise ValueError(f"provider {self.provider} needs api_key_env: the name of a variable that holds the key")
        if self.provider == "anthropic" and (self.temperature is not None or self.reasoning_effort):
            raise ValueError("Anthropic's API takes neither temperature nor reasoning_effort: leave them out")
        return self

    @property
    def paid(self) -> bool:
        """Whether its calls leave this machine."""
        return self.provider in PAID_PROVIDERS

    @property
    def priced(self) -> bool:
        return self.usd_per_million_input is not None and self.usd_per_million_output is not None

    def wire(self) -> dict[str, Any]:
        """Everything but the prompt's words and sampling that decides what it answers."""
        parts = {
            "provider": self.provider,
            "model": self.model,
            "base_url": self.base_url,
            "reasoning_effort": self.reasoning_effort,
            "reasoning_tokens": self.reasoning_tokens,
        }
        if self.system_prompt_version:  # raised, it asks everything anew though the words are the same
            parts["system_prompt_version"] = self.system_prompt_version
        return parts

    def cost_micros(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> int:
        """Micro-dollars of a call, rounded up. ``cached_tokens`` are part of ``prompt_tokens``.

        Raises:
            CogumiError: the teacher has no price; an unknown price is never taken for zero.
        """
        if self.usd_per_million_input is None or self.usd_per_million_output is None:
            raise CogumiError(
                f"teacher {self.name!r} has no price",
                "set usd_per_million_input and usd_per_million_output in the catalogue (0.0 where it is free)",
            )
        cached_price = (
            self.usd_per_million_input if self.usd_per_million_cached is None else self.usd_per_million_cached
        )
        micros = (
            Decimal(str(self.usd_per_million_input)) * max(0, prompt_tokens - cached_tokens)
            + Decimal(str(cached_price)) * cached_tokens
            + Decimal(str(self.usd_per_million_output)) * completion_tokens
        )
        return int(micros.to_integral_value(ROUND_CEILING))

    def worst_case_micros(self, messages: Sequence[Message], max_tokens: int) -> int:
        """The most a call can cost, in micro-dollars.

        A token of a byte-level tokenizer is at least one byte, so the prompt has at most as many tokens as bytes.
        """
        return self.cost_micros(prompt_tokens_at_most(messages), max_tokens + self.reasoning_tokens)


def prompt_tokens_at_most(messages: Sequence[Message]) -> int:
    """An upper bound on the tokens of a prompt, for any byte-level tokenizer."""
    size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
    return size + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS


def prompt_tokens_about(messages: Sequence[Message]) -> int:
    """About how many tokens a prompt has: four bytes each, the providers' own rule of thumb for English."""
    size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
    return size // 4 + MESSAGE_TOKENS * len(messages)


def teacher_version(teacher: Teacher, engine_version: str = "") -> str:
    """A hash of all that changes a teacher's answers: not its price, limits, tier or name.

    ``engine_version`` names the weights behind a local teacher (the hash of its GGUF).
    """
    parts = {**teacher.wire(), "system_prompt": teacher.system_prompt, "temperature": teacher.temperature}
    if teacher.provider == "local":
        parts["engine"] = engine_version
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def prices_version(prices: Mapping[str, tuple[float, float]]) -> str:
    """A hash of what teachers cost."""
    return hashlib.sha256(json.dumps(prices, sort_keys=True).encode()).hexdigest()[:16]


class Catalogue(Section):
    """All teachers of one file, by name."""

    path: str
    teachers: dict[str, Teacher]

    def get(self, name: str) -> Teacher:
        """The teacher of that name.

        Raises:
            CogumiError: there is none; names the nearest.
        """
        teacher = self.teachers.get(name)
        if teacher is None:
            raise CogumiError(f"{self.path}: there is no teacher {name!r}", nearest(name, self.teachers))
        return teacher

    def prices(self) -> dict[str, tuple[float, float]]:
        """Dollars per million tokens of prompt and of answer, of the paid teachers whose price is known."""
        return {
            teacher.name: (teacher.usd_per_million_input or 0.0, teacher.usd_per_million_output or 0.0)
            for teacher in self.teachers.values()
            if teacher.paid and teacher.priced
        }


def load_catalogue(path: Path) -> Catalogue:
    """Read a catalogue.

    Raises:
        CogumiError: no such file, not YAML, an unknown key, a value out of range; with the mend.
    """
    if not path.is_file():
        raise CogumiError(f"there is no catalogue of teachers {path}", "check `teaching.catalogue` in the profile")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogumiError(f"{path} is not YAML: {error}", "mend the line that the message names") from None
    if not isinstance(data, dict) or not data:
        raise CogumiError(f"{path} names no teacher", "start from resources/teachers.yaml")
    teachers: dict[str, Teacher] = {}
    for name, entry in data.items():
        if not isinstance(entry, dict):
            raise CogumiError(f"{path}: teacher {name!r} is no mapping", "start from resources/teachers.yaml")
        if "name" in entry:
            raise CogumiError(f"{path}: teacher {name!r} states a name", "leave it out: the key is the name")
        try:
            teachers[str(name)] = Teacher.model_validate({"name": str(name), **entry})
        except ValidationError as error:
            raise CogumiError(*_explain(path, str(name), error)) from None
    return Catalogue(path=str(path), teachers=teachers)


def _explain(path: Path, name: str, error: ValidationError) -> tuple[str, str]:
    """The first thing wrong with an entry, as (problem, mend)."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    rest = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = (field for field in Teacher.model_fields if field != "name")
        return f"{path}: unknown key {where!r} in teacher {name!r}{rest}", nearest(where, known)
    if first["type"] == "missing":
        return f"{path}: teacher {name!r} lacks {where!r}{rest}", f"add {where}"
    if not where:
        return f"{path}: teacher {name!r}: {first['msg']}{rest}", "mend that entry of the catalogue"
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{path}: teacher {name!r}: {where}: {first['msg']}{shown}{rest}", f"set {where} to a value of that kind"
