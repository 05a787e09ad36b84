"""OpenAI's wire format: which requests are accepted, and the shape of answers, stream events and errors."""

import json
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cogumi_dagster.lib.errors import nearest
from cogumi_dagster.lib.inference.base import Completion, Message
from cogumi_dagster.lib.serving.answering import Params, Routed

MAX_MESSAGES = 512
MAX_STOPS = 4
"""OpenAI's own limit."""
MAX_SEED = 2**31 - 1
SHOWN = 80
"""How much of a client's own text an error message repeats."""


class RequestError(Exception):
    """A request that is answered with an error body. ``headers`` go with it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; ``type`` follows from the status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    """Unknown keys and silent conversions are errors: nothing unchecked reaches the engine."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn. The null fields are those that clients send back with an answer of ours."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class GenerationRequest(Strict):
    """The fields that both routes share.

    Fields with one allowed value are OpenAI's, accepted where they ask for nothing. The last group is
    accepted and ignored: bookkeeping that changes no answer.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def asked_tokens(self) -> int | None:
        return self.max_tokens

    def params(self, context: int, answer_tokens: int) -> Params:
        """The sampling parameters, with room for ``answer_tokens`` and a seed drawn where the request names none.

        Raises:
            RequestError: it asks for more tokens than ``context`` holds.
        """
        asked = self.asked_tokens()
        if asked is not None and asked > context:
            raise RequestError(400, f"max_tokens is at most {context}, the context of this server", param="max_tokens")
        heat = self.temperature or 0.0
        drawn = secrets.randbelow(MAX_SEED) if heat else 0
        return Params(
            max_tokens=asked or min(answer_tokens, context),
            temperature=heat,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=drawn if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt_of(self) -> list[Message]:
        return [message.to_message() for message in self.messages]


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: raw text, without the chat template."""

    prompt: Annotated[str, Field(min_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: None = None

    def prompt_of(self) -> str:
        return self.prompt


R = TypeVar("R", bound=GenerationRequest)


def parse_request(kind: type[R], body: bytes) -> R:
    """Validate a body. Raises RequestError (400) that names the field: bad JSON, NaN, half surrogates, excess depth."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(kind, error) from None


def _explain(kind: type[BaseModel], error: ValidationError) -> RequestError:
    """The first thing wrong with a request. Of a union's branches the one that got furthest is shown."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    if first["type"] in ("json_invalid", "model_type", "model_attributes_type"):
        return RequestError(400, f"the body is not a JSON object that can be read: {first['msg'][:200]}")
    parts = [str(part)[:SHOWN] for part in first["loc"]]
    depth = 3 if parts[:1] == ["messages"] else 1
    param = ".".join(parts[:depth]) or None
    if first["type"] == "extra_forbidden":
        where = ".".join(parts)
        if len(parts) == 1:
            hint = nearest(parts[0], kind.model_fields)
            return RequestError(400, f"unknown field {where!r}: {hint}", param=where, code="unknown_parameter")
        return RequestError(400, f"unknown field {where!r}", param=where, code="unknown_parameter")
    same = [e for e in errors if [str(part)[:SHOWN] for part in e["loc"][:depth]] == parts[:depth]]
    deepest = max(same, key=lambda e: len(e["loc"]))
    return RequestError(400, f"{param or 'the request'}: {deepest['msg'][:200]}", param=param)


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def _usage(completion: Completion) -> dict[str, int]:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


@dataclass(frozen=True)
class Reply:
    """The bodies of one answer, whole or streamed; they share an id, a time and a model name.

    ``usage`` counts the answer that was sent. A base answer that the router dropped is not billed to the client.
    """

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, routed: Routed) -> dict[str, Any]:
        done = routed.completion
        choice: dict[str, Any] = {"index": 0, "finish_reason": done.finish_reason, "logprobs": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": done.text, "refusal": None}
        else:
            choice["text"] = done.text
        return self._body("", [choice], {"usage": _usage(done), "cogumi": routed.to_json()})

    def opening(self, include_usage: bool) -> dict[str, Any] | None:
        """The event that says who speaks; raw text has none."""
        return self._chunk({"role": "assistant", "content": ""}, include_usage) if self.chat else None

    def delta(self, text: str, include_usage: bool) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else text, include_usage)

    def finish(self, routed: Routed, include_usage: bool) -> dict[str, Any]:
        """The one event with a finish reason; it also carries the route."""
        body = self._chunk({} if self.chat else "", include_usage, routed.completion.finish_reason)
        return body | {"cogumi": routed.to_json()}

    def usage(self, routed: Routed) -> dict[str, Any]:
        """The event without choices that OpenAI sends last, where the client asked for it."""
        return self._body(".chunk", [], {"usage": _usage(routed.completion), "cogumi": routed.to_json()})

    def _chunk(
        self, content: dict[str, str] | str, include_usage: bool, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta" if self.chat else "text": content, "finish_reason": finish_reason}
        return self._body(".chunk", [choice | {"logprobs": None}], {"usage": None} if include_usage else {})

    def _body(self, suffix: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        name, prefix = (f"chat.completion{suffix}", "chatcmpl-") if self.chat else ("text_completion", "cmpl-")
        head = {"id": prefix + self.id, "object": name, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more
