"""The interface of an inference engine: chat with an adapter chosen per request."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.progress import Progress, silent


class Message(TypedDict):
    """One turn of a conversation, as in OpenAI's API."""

    role: str
    content: str


class PromptTooLong(CogumiError):
    """A conversation that does not fit a slot's context."""


@dataclass(frozen=True)
class Completion:
    """An answer. ``logprobs`` are the natural-log probabilities of the generated tokens, in order, if asked for."""

    text: str
    finish_reason: str
    """``stop`` or ``length``."""
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[float, ...] = ()
    seconds: float = 0.0
    adapter: str | None = None
    cached_tokens: int = 0
    """Of the prompt's, those that were not computed again."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. The last one has ``completion`` (with the whole text and counts)."""

    text: str
    completion: Completion | None = None


class Engine(Protocol):
    """One base model with any number of LoRA adapters loaded beside it, called from any thread.

    ``adapter`` is a name given at start, or None for the base alone. Adapters never share a prompt
    cache. Temperature 0 is greedy. ``logprobs`` costs a look at the whole vocabulary for each token, so
    only those ask for it who read it. All methods raise CogumiError for an unknown adapter, a prompt
    longer than the context, or an engine that has stopped.
    """

    adapters: tuple[str, ...]
    slots: int

    def chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
    ) -> Completion: ...

    def stream(
        self,
        messages: Sequence[Message] | str,
        *,
        adapter: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
    ) -> Iterator[Chunk]:
        """Like ``chat``, piece by piece; a string is continued as it is, without the chat template. Closing the
        iterator early frees the slot."""
        ...

    def chat_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapter: str | None = None,
        max_tokens: int | Sequence[int] = 256,
        temperature: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        logprobs: bool = False,
        progress: Progress = silent,
    ) -> list[Completion]:
        """Answer all, in the given order, as many at once as the engine has slots.

        Limits, temperatures and seeds are of all or of each; a single seed is the first's, and grows by one.

        Equal conversations, as samples of one prompt are, run one after another, so that it is read once.
        """
        ...

    def close(self) -> None: ...
