"""How to ask each provider, and what its errors mean.

The SDKs retry by themselves and send no idempotency key, so a hidden retry can bill again: every client is built with
``max_retries=0``. Errors say whether the call may have been billed, for the journal to keep it in doubt.
"""

import email.utils
import importlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine, Message, PromptTooLong
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.catalogue import Teacher, prompt_tokens_at_most

T = TypeVar("T")

TIMEOUT_SECONDS = 120.0
NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "LocalProtocolError"}
"""httpx's errors from before the request left this machine."""

WITHDRAWN = ("model_decommissioned", "decommissioned", "model_not_found", "does not exist")
"""What providers write when they no longer serve a model; Groq does so with status 400."""

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
"""Anthropic's words for OpenAI's."""

SDKS: dict[str, tuple[str, str]] = {
    "groq": ("groq", "Groq"),
    "openai": ("openai", "OpenAI"),
    "together": ("together", "Together"),
    "anthropic": ("anthropic", "Anthropic"),
}
"""Provider -> its package and the class of its client."""

HTTP_LOGGERS = ("httpx", "httpx2", "httpcore", "httpcore2")
"""With the SDKs', the loggers that write whole headers and requests at DEBUG; a server may echo the key in them."""

SECRET = re.compile(r"\b(?:sk|gsk|tgp|key)[-_][A-Za-z0-9_\-]{12,}|(?i:bearer)\s+[A-Za-z0-9._\-]{8,}")


@dataclass(frozen=True)
class Answer:
    """An answer. ``cached_tokens`` are the part of ``prompt_tokens`` billed at the cached price. Half of a surrogate
    pair, which a model can write and UTF-8 cannot, becomes a question mark."""

    text: str
    finish_reason: str
    """``stop``, ``length``, ``content_filter`` or the provider's own word."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))


class TeacherError(CogumiError):
    """A call that gave no usable answer.

    ``kind`` is a short reason for counting; ``maybe_billed`` that the provider may have done the work;
    ``teacher_down`` that no other call to this teacher will do better.
    """

    def __init__(
        self,
        problem: str,
        mend: str = "",
        *,
        kind: str,
        retryable: bool = False,
        retry_after: float | None = None,
        maybe_billed: bool = False,
        teacher_down: bool = False,
    ) -> None:
        super().__init__(problem, mend, retryable=retryable)
        self.kind = kind
        self.retry_after = retry_after
        self.maybe_billed = maybe_billed
        self.teacher_down = teacher_down


class ApiTeacher(Protocol):
    """A teacher behind an API."""

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int,
        response_schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        """One call, never retried. ``temperature`` None sends neither temperature nor seed. Raises TeacherError.

        ``response_schema`` holds the answer to a JSON schema where the provider can; a model that refuses schemas
        is asked without.
        """
        ...

    def models(self) -> set[str]:
        """The ids that the provider serves to this key. Raises TeacherError."""
        ...


class ChatTeacher:
    """Groq, OpenAI, Together and OpenAI-compatible servers: the chat completions API through their own SDKs."""

    def __init__(self, teacher: Teacher, key: str) -> None:
        self.teacher = teacher
        self._key = key
        self._client = _sdk_client(teacher, key)
        self._schemas = True

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int,
        response_schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        room = max_tokens + self.teacher.reasoning_tokens
        # Only the current APIs of Groq and OpenAI ask for the new name; compatible servers know the old one.
        renamed = self.teacher.provider in ("groq", "openai") and not self.teacher.base_url
        fields: dict[str, Any] = {"max_completion_tokens" if renamed else "max_tokens": room}
        if temperature is not None:
            fields |= {"temperature": temperature, "seed": seed}
        if self.teacher.reasoning_effort:
            fields["reasoning_effort"] = self.teacher.reasoning_effort
        if response_schema and self._schemas:
            form = {"name": "answer", "schema": dict(response_schema), "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}

        def call() -> Answer:
            send = partial(self._client.chat.completions.create, model=self.teacher.model, messages=list(messages))
            reply, refused = _with_or_without(send, fields, "response_format")
            self._schemas = self._schemas and not refused
            choice = reply.choices[0]
            usage = reply.usage
            if usage is None:  # some compatible servers send none: assume the worst, as the reservation did
                tokens = (prompt_tokens_at_most(messages), room, 0)
            else:
                tokens = (usage.prompt_tokens, usage.completion_tokens, _cached_tokens(usage.model_dump()))
            # A server could echo the key, and answers are kept.
            text = (choice.message.content or "").replace(self._key, "[redacted]")
            return Answer(text, str(choice.finish_reason or "stop"), *tokens)

        return _guarded(call, self.teacher, self._key)

    def models(self) -> set[str]:
        def call() -> set[str]:
            if self.teacher.provider == "together":  # its SDK's own list is of a project's private models
                listed = self._client.get("/v1/models", cast_to=object)
                return {str(model["id"]) for model in (listed["data"] if isinstance(listed, dict) else listed)}
            return {str(model.id) for model in self._client.models.list().data}

        return _guarded(call, self.teacher, self._key)


class AnthropicTeacher:
    """Anthropic's messages API. Its current version takes no temperature and no seed."""

    def __init__(self, teacher: Teacher, key: str) -> None:
        self.teacher = teacher
        self._key = key
        self._client = _sdk_client(teacher, key)
        self._schemas = True

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int,
        response_schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        fields: dict[str, Any] = {"system": system} if system else {}
        if response_schema and self._schemas:
            fields["output_config"] = {"format": {"type": "json_schema", "schema": dict(response_schema)}}

        def call() -> Answer:
            send = partial(
                self._client.messages.create,
                model=self.teacher.model,
                messages=[message for message in messages if message["role"] != "system"],
                max_tokens=max_tokens + self.teacher.reasoning_tokens,
            )
            reply, refused = _with_or_without(send, fields, "output_config")
            self._schemas = self._schemas and not refused
            text = "".join(block.text for block in reply.content if block.type == "text")
            text = text.replace(self._key, "[redacted]")
            usage = reply.usage
            cached = usage.cache_read_input_tokens or 0
            # Anthropic counts cached tokens beside input_tokens; the others count them inside.
            prompt = usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0)
            finish = FINISH_REASONS.get(str(reply.stop_reason), str(reply.stop_reason))
            return Answer(text, finish, prompt, usage.output_tokens, cached)

        return _guarded(call, self.teacher, self._key)

    def models(self) -> set[str]:
        return _guarded(lambda: {str(model.id) for model in self._client.models.list()}, self.teacher, self._key)


def connect(teacher: Teacher) -> ApiTeacher:
    """A client of a paid teacher, with the key from the environment.

    Raises:
        TeacherError: the key is not set, or the provider's SDK is not installed.
    """
    key = os.environ.get(teacher.api_key_env or "", "").strip()
    if not key:
        raise TeacherError(
            f"teacher {teacher.name!r} has no key: {teacher.api_key_env} is not set",
            f"export {teacher.api_key_env}=..., or take {teacher.name!r} out of the profile's mix",
            kind="no key",
            teacher_down=True,
        )
    return AnthropicTeacher(teacher, key) if teacher.provider == "anthropic" else ChatTeacher(teacher, key)


def ask_local(
    engine: Engine,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    temperature: float | None,
    seed: int,
) -> list[Answer | None]:
    """The local teacher's answers, as many at once as the engine has slots; None for a prompt that is too long. Each is
    sampled with ``seed``: with one that grew by its place, the second sample of a prompt could be its first again.

    Raises:
        CogumiError: the engine fails.
    """
    ask = partial(ask_local, engine, max_tokens=max_tokens, temperature=temperature, seed=seed)
    try:
        completions = engine.chat_many(
            conversations,
            max_tokens=max_tokens,
            temperature=temperature or 0.0,
            seed=[seed] * len(conversations),
        )
    except PromptTooLong:
        if len(conversations) == 1:
            return [None]
        half = len(conversations) // 2  # find it, and lose no other answer
        return [*ask(conversations[:half]), *ask(conversations[half:])]
    return [Answer(c.text, c.finish_reason, c.prompt_tokens, c.completion_tokens) for c in completions]


def encodable(text: str) -> str:
    """``text`` as UTF-8 can say it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def solve(task: Task) -> Answer | None:
    """The exact solver's answer, or None where the task has no solver."""
    return None if task.solution is None else Answer(task.solution, "stop", 0, 0)


def redact(text: str, key: str = "") -> str:
    """``text`` without ``key`` and without anything that looks like one."""
    if key:
        text = text.replace(key, "[redacted]")
    return SECRET.sub("[redacted]", text)


def _cached_tokens(usage: dict[str, Any]) -> int:
    """Groq and OpenAI report cached tokens in a detail, Together beside the others, some servers not at all."""
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or usage.get("cached_tokens") or 0)


def _sdk_client(teacher: Teacher, key: str) -> Any:
    for logger in map(logging.getLogger, (*SDKS, *HTTP_LOGGERS)):
        logger.setLevel(max(logger.level, logging.INFO))
    sdk, name = SDKS[teacher.provider]
    try:
        module = importlib.import_module(sdk)
    except ImportError:
        raise TeacherError(
            f"teacher {teacher.name!r} needs the package {sdk!r}",
            f"pip install {sdk}",
            kind="no SDK",
            teacher_down=True,
        ) from None
    options: dict[str, Any] = {"base_url": teacher.base_url} if teacher.base_url else {}
    return getattr(module, name)(
        api_key=key,
        max_retries=0,
        timeout=TIMEOUT_SECONDS,
        http_client=_http_client(module.DefaultHttpxClient, teacher.concurrency),
        **options,
    )


def _http_client(kind: Any, connections: int) -> Any:
    """The SDK's own kind of HTTP client, as many connections as calls, and a deadline for the whole answer.

    httpx's timeout is for each read, so a server that sends a byte a minute would hold a call for ever. SDKs differ
    in the httpx that they bring (1 or 2).
    """
    httpx: Any = importlib.import_module(
        next(c.__module__ for c in kind.__mro__ if "httpx" in c.__module__).split(".")[0]
    )

    class Bounded(httpx.SyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any, request: Any) -> None:
            self.stream, self.request = stream, request
            self.deadline = time.monotonic() + TIMEOUT_SECONDS

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self.stream:
                if time.monotonic() > self.deadline:
                    raise httpx.ReadTimeout(f"no whole answer in {TIMEOUT_SECONDS:g} s", request=self.request)
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def bound(response: Any) -> None:
        response.stream = Bounded(response.stream, response.request)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max(20, connections))
    return kind(limits=limits, event_hooks={"response": [bound]})


def _with_or_without(send: Callable[..., Any], fields: Mapping[str, Any], schema: str) -> tuple[Any, bool]:
    """The reply, and whether the schema was refused: with status 400, which is not billed; it is sent without then."""
    try:
        return send(**fields), False
    except Exception as error:
        if schema not in fields or getattr(error, "status_code", 0) != 400:
            raise
    return send(**{name: value for name, value in fields.items() if name != schema}), True


def _guarded(call: Callable[[], T], teacher: Teacher, key: str) -> T:
    """Make a call; turn whatever the SDK raises into a TeacherError that holds no key."""
    try:
        answer = call()
    except Exception as error:
        failure = _explain(error, teacher, key)
    else:
        return answer
    # Raised outside the handler, so that the SDK's exception (with its request's headers) does not hang on to it.
    raise failure


def _explain(error: Exception, teacher: Teacher, key: str) -> TeacherError:
    """What an SDK's exception means. The SDKs share names and shapes, so no SDK is imported to tell."""
    names = {cls.__name__ for cls in type(error).__mro__}
    cause = type(error.__cause__ or error.__context__).__name__
    what = redact(" ".join(f"{error} {getattr(error, 'body', None) or ''}".split()), key)[:400]
    where = f"teacher {teacher.name!r} ({teacher.provider} {teacher.model})"
    if "APIConnectionError" in names:
        if cause in NEVER_SENT:
            mend = "check the network and base_url"
            return TeacherError(f"{where} could not be reached: {what}", mend, kind="unreachable", retryable=True)
        kind = "timeout" if "APITimeoutError" in names else "connection lost"
        return TeacherError(f"{where}: {kind}: {what}", kind=kind, retryable=True, maybe_billed=True)
    status = int(getattr(error, "status_code", 0) or 0)
    if status >= 400:
        return _explain_status(status, what, where, teacher, getattr(error, "response", None))
    problem = f"{where} sent an answer that cannot be read: {type(error).__name__}: {what}"
    return TeacherError(problem, kind="malformed answer", retryable=True, maybe_billed=True)


def _explain_status(status: int, what: str, where: str, teacher: Teacher, response: Any) -> TeacherError:
    said = f"{where} answered {status}: {what}"
    if status in (401, 403):
        mend = f"check {teacher.api_key_env} and what its account may use"
        return TeacherError(said, mend, kind="key refused", teacher_down=True)
    if status == 402 or "insufficient_quota" in what:
        return TeacherError(said, "the account has no credit left", kind="no credit", teacher_down=True)
    if status == 404 or (status == 400 and any(word in what for word in WITHDRAWN)):
        mend = "the model was withdrawn or renamed: set another id in the catalogue"
        return TeacherError(said, mend, kind="model withdrawn", teacher_down=True)
    if status == 429:
        return TeacherError(said, kind="rate limit", retryable=True, retry_after=_retry_after(response))
    if status in (408, 409) or status >= 500:
        # A gateway gives up while the model may still be writing, so 502 and 504 may be billed.
        billed, wait = status in (502, 504), _retry_after(response)
        return TeacherError(said, kind="server error", retryable=True, retry_after=wait, maybe_billed=billed)
    return TeacherError(said, "the provider refuses this request", kind="bad request")


def _retry_after(response: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = str(getattr(response, "headers", {}).get("retry-after") or "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
