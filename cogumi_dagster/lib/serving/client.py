"""The server seen from outside, through the official openai client: ask questions, read the routes."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.answering import ROUTED_MODEL

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

TIMEOUT_SECONDS = 300.0
"""Of one answer: 1,024 tokens at 5 tokens/s, on a slow machine with all slots busy."""


@dataclass(frozen=True)
class Asked:
    """One question and its answer. ``seconds`` is what the client waited, routing and queue included."""

    question: str
    answer: str
    route: str
    confidence: float | None
    seconds: float


def ask_questions(
    base_url: str, token: str, questions: Sequence[str], *, model: str = ROUTED_MODEL, max_tokens: int = 160
) -> list[Asked]:
    """Ask the questions one after the other, each as a conversation of its own.

    Args:
        base_url: where the server is, with or without ``/v1``.

    Raises:
        CogumiError: no server there, a wrong token, a request that the server refused.
    """
    rows = []
    with connect(base_url, token) as client:
        for question in questions:
            started = time.perf_counter()
            with plain_errors(base_url):
                done = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens
                )
            seconds = time.perf_counter() - started
            routing = routing_of(done)
            answer = done.choices[0].message.content or ""
            rows.append(Asked(question, answer, str(routing.get("route")), routing.get("confidence"), seconds))
    return rows


def connect(base_url: str, token: str) -> "OpenAI":
    """The official client for this server. It never retries by itself: a busy server says so."""
    from openai import OpenAI

    return OpenAI(base_url=_api_url(base_url), api_key=token, max_retries=0, timeout=TIMEOUT_SECONDS)


def connect_async(base_url: str, token: str) -> "AsyncOpenAI":
    """As ``connect``, for a caller that may be cancelled: that ends the request, and so the server's work."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=_api_url(base_url), api_key=token, max_retries=0, timeout=TIMEOUT_SECONDS)


def _api_url(base_url: str) -> str:
    return base_url.rstrip("/").removesuffix("/v1") + "/v1"


def routing_of(body: Any) -> dict[str, Any]:
    """The ``cogumi`` object of an answer or of a stream event; empty where there is none."""
    extra = getattr(body, "model_extra", None) or {}
    routing = extra.get("cogumi")
    return routing if isinstance(routing, dict) else {}


@contextmanager
def plain_errors(base_url: str) -> Generator[None, None, None]:
    """Turn the client's errors into ones that say what to do."""
    import openai

    try:
        yield
    except openai.AuthenticationError:
        raise CogumiError(f"the server at {base_url} refused the token", "give the token that `serve` names") from None
    except openai.RateLimitError:
        raise CogumiError(f"the server at {base_url} is busy", "try again in a few seconds", retryable=True) from None
    except openai.APITimeoutError:
        raise CogumiError(f"the server at {base_url} took too long", "ask for fewer tokens", retryable=True) from None
    except openai.APIConnectionError:
        raise CogumiError(f"there is no server at {base_url}", "start it with `cogumi serve`", retryable=True) from None
    except openai.APIError as error:
        said = error.body.get("message") if isinstance(error.body, dict) else error.message
        refused = isinstance(error, openai.APIStatusError) and error.status_code < 500
        mend = "change the request" if refused else "read the server's log, then try again"
        raise CogumiError(f"the server answered: {said}", mend, retryable=not refused) from None
