"""Answering with the base or a modifier: the routed model, the manual ones, and how each is streamed."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, cast

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.inference.base import Chunk, Completion, Engine, Message

logger = logging.getLogger(__name__)

ROUTED_MODEL = "cogumi"
ESCALATION_THRESHOLD = 0.5
"""Above it the user is taken to be dissatisfied: the detector is a logistic model, 0.5 is its decision boundary."""


class Decision(Protocol):
    """What a router says of a base answer. ``confidence`` is the probability that the base is right."""

    @property
    def route(self) -> str: ...
    @property
    def confidence(self) -> float: ...
    @property
    def modifier(self) -> str | None: ...
    @property
    def domain(self) -> str: ...


class Router(Protocol):
    """Decides from the prompt and the log-probabilities of the base's answer who should answer."""

    def decide(self, prompt: str, logprobs: Sequence[float], completion_tokens: int) -> Decision: ...


class Escalation(Protocol):
    """Scores (0 to 1) how dissatisfied a user's message is with the answer before it."""

    def score(self, text: str) -> float: ...


SERVED_TOKENS = 512
"""Room for an answer where a request names none, at least: a sum worked out digit by digit may need 378."""


@dataclass(frozen=True)
class Params:
    """How to sample. Temperature 0 is greedy, which is how every score in the reports was measured."""

    max_tokens: int = SERVED_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Routed:
    """An answer and how it came about. ``confidence`` and ``domain`` are None where no router was asked."""

    completion: Completion
    route: str
    """``base`` or the name of the modifier that answered."""
    confidence: float | None
    modifier: str | None
    domain: str | None
    escalated: bool
    reason: str

    def to_json(self) -> dict[str, object]:
        """The ``cogumi`` object of a response body."""
        return {
            "route": self.route,
            "confidence": None if self.confidence is None else round(self.confidence, 4),
            "modifier": self.modifier,
            "domain": self.domain,
            "escalated": self.escalated,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer; the last one has ``routed``.

    Pieces without text come while the base's answer is held back, so that the reader can close at any token.
    """

    text: str
    routed: Routed | None = None


class Assistant:
    """One engine, one router and one escalation detector behind OpenAI-like model names.

    ``cogumi`` is routed: the base answers first, and its token log-probabilities decide whether the answer
    stands or the modifier of the domain answers instead. ``cogumi-base`` and ``cogumi-<modifier>`` are manual.
    A streamed ``cogumi`` answer therefore begins late: the base's answer is held back until the decision,
    then either sent in its pieces or dropped for the modifier's stream.
    """

    def __init__(
        self, engine: Engine, router: Router, escalation: Escalation, answer_tokens: int = SERVED_TOKENS
    ) -> None:
        """``answer_tokens``: room for an answer where a request names none."""
        self.answer_tokens = answer_tokens
        self._engine = engine
        self._router = router
        self._escalation = escalation
        self._adapter_of: Mapping[str, str | None] = {
            f"{ROUTED_MODEL}-base": None,
            **{f"{ROUTED_MODEL}-{name}": name for name in engine.adapters},
        }

    @property
    def models(self) -> list[str]:
        """The names a request may ask for, the routed one first."""
        return [ROUTED_MODEL, *self._adapter_of]

    def answer(self, messages: Sequence[Message] | str, model: str, params: Params) -> Routed:
        """Answer a conversation, or continue raw text where a string is given.

        Raises:
            CogumiError: unknown model, or what the engine raises.
        """
        for piece in self.stream(messages, model, params):
            if piece.routed is not None:
                return piece.routed
        raise CogumiError("the engine ended an answer without saying so", "restart the server", retryable=True)

    def stream(self, messages: Sequence[Message] | str, model: str, params: Params) -> Generator[Piece, None, None]:
        """Answer piece by piece. Closing the generator at any piece frees the engine's slot.

        Raises:
            CogumiError: unknown model, or what the engine raises.
        """
        if model == ROUTED_MODEL:
            yield from self._stream_routed(messages, params)
        elif model in self._adapter_of:
            yield from self._stream_manual(messages, self._adapter_of[model], params)
        else:
            raise CogumiError(f"there is no model {model[:80]!r}", nearest(model[:80], self.models))

    def close(self) -> None:
        self._engine.close()

    def _stream_manual(
        self, messages: Sequence[Message] | str, adapter: str | None, params: Params
    ) -> Generator[Piece, None, None]:
        route = adapter or "base"
        reason = f"the request asked for {ROUTED_MODEL}-{route}"
        for chunk in self._generate(messages, adapter, params):
            done = chunk.completion
            yield Piece(chunk.text, Routed(done, route, None, adapter, None, False, reason) if done else None)

    def _stream_routed(self, messages: Sequence[Message] | str, params: Params) -> Generator[Piece, None, None]:
        escalated = self._dissatisfied(messages)
        held: list[str] = []
        base: Completion | None = None
        for chunk in self._generate(messages, None, params, logprobs=True):
            held.append(chunk.text)
            base = chunk.completion
            yield Piece("")
        if base is None:
            raise CogumiError("the engine ended an answer without saying so", "restart the server", retryable=True)
        decision = self._decide(messages, base)
        adapter, reason = self._choose(decision, escalated)
        logger.info("route %s, confidence %.3f: %s", adapter or "base", decision.confidence, reason)

        def routed(completion: Completion) -> Routed:
            return Routed(
                completion, adapter or "base", decision.confidence, adapter, decision.domain, escalated, reason
            )

        if adapter is None:
            yield from (Piece(text) for text in held if text)
            yield Piece("", routed(base))
            return
        for chunk in self._generate(messages, adapter, params):
            yield Piece(chunk.text, routed(chunk.completion) if chunk.completion else None)

    def _generate(
        self, messages: Sequence[Message] | str, adapter: str | None, params: Params, logprobs: bool = False
    ) -> Iterator[Chunk]:
        """The engine's chunks; closes the engine's iterator when it is closed itself."""
        chunks = self._engine.stream(
            messages, adapter=adapter, max_tokens=params.max_tokens, temperature=params.temperature,
            top_p=params.top_p, seed=params.seed, stop=params.stop, logprobs=logprobs,
        )  # fmt: skip
        with closing(cast(Generator[Chunk, None, None], chunks)):
            yield from chunks

    def _decide(self, messages: Sequence[Message] | str, base: Completion) -> Decision:
        """The router sees what it was trained on: the user's own words, not the whole conversation."""
        if base.text and not base.logprobs:
            raise CogumiError(
                "the engine gave no token log-probabilities, so the answer cannot be routed",
                f"ask for {ROUTED_MODEL}-base or a modifier by name",
            )
        prompt = messages if isinstance(messages, str) else _last_of(messages, "user")
        return self._router.decide(prompt, base.logprobs, base.completion_tokens)

    def _choose(self, decision: Decision, escalated: bool) -> tuple[str | None, str]:
        """The adapter that answers (None is the base), and why."""
        wanted = decision.modifier if escalated else None if decision.route == "base" else decision.route
        if wanted is None:
            if escalated:
                return None, f"the user is dissatisfied, but {decision.domain} has no modifier"
            return None, "the base's confidence reaches the threshold of the domain"
        if wanted not in self._engine.adapters:
            return None, f"the modifier {wanted} is not loaded"
        if escalated:
            return wanted, "the user is dissatisfied with the previous answer"
        return wanted, "the base is not confident"

    def _dissatisfied(self, messages: Sequence[Message] | str) -> bool:
        """Whether the user complains. Without an answer before there is nothing to complain of."""
        if isinstance(messages, str) or not any(m["role"] == "assistant" for m in messages):
            return False
        return self._escalation.score(_last_of(messages, "user")) > ESCALATION_THRESHOLD


def _last_of(messages: Sequence[Message], role: str) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == role), "")
