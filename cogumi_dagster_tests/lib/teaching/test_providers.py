import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from wire_server import CANARY, Reply, anthropic_reply, chat_reply, error_reply

from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching import providers
from cogumi_dagster.lib.teaching.available import availability
from cogumi_dagster.lib.teaching.catalogue import Teacher
from cogumi_dagster.lib.teaching.providers import TeacherError, connect, redact, solve

MESSAGES = [Message(role="system", content="Be brief."), Message(role="user", content="2+2?")]
BASE = {"groq": "", "openai": "/v1", "together": "", "anthropic": ""}
CHAT = ("groq", "openai", "together")


def teacher(server: Any, provider: str, **changes: object) -> Teacher:
    fields: dict[str, object] = {
        "name": "t", "provider": provider, "model": "m", "tier": 2, "api_key_env": "CANARY_KEY",
        "usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "base_url": server.url + BASE[provider],
    }  # fmt: skip
    return Teacher.model_validate(fields | changes)


def ask(who: Teacher, temperature: float | None = None) -> Any:
    return connect(who).ask(MESSAGES, max_tokens=50, temperature=temperature, seed=3)


def failure(who: Teacher) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        ask(who)
    return caught.value


@pytest.mark.parametrize("provider", CHAT)
def test_chat_providers_send_and_read_openais_wire_format(server: Any, provider: str) -> None:
    server.script = [chat_reply("four", cached=8)]
    answer = ask(teacher(server, provider, reasoning_tokens=100), temperature=0.5)
    assert (answer.text, answer.finish_reason) == ("four", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (20, 10, 8)
    ((path, headers, body),) = server.seen
    assert path == {"groq": "/openai/v1/chat/completions"}.get(provider, "/v1/chat/completions")
    assert headers["authorization"] == f"Bearer {CANARY}"
    assert body["model"] == "m" and body["messages"] == MESSAGES
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (150, 0.5, 3)


def test_a_model_without_temperature_gets_no_sampling_field(server: Any) -> None:
    ask(teacher(server, "openai", reasoning_effort="low"))
    (body,) = server.posts()
    assert not {"temperature", "seed", "top_p"} & set(body)
    assert body["reasoning_effort"] == "low"


def test_anthropic_gets_its_system_prompt_apart_and_cached_tokens_are_counted_in(server: Any) -> None:
    server.script = [anthropic_reply("four", stop="max_tokens", cached=5)]
    answer = ask(teacher(server, "anthropic"), temperature=0.5)
    assert (answer.text, answer.finish_reason) == ("four", "length")
    assert (answer.prompt_tokens, answer.cached_tokens) == (20, 5)
    ((path, _, body),) = server.seen
    assert path == "/v1/messages"
    assert body["system"] == "Be brief." and body["messages"] == MESSAGES[1:]
    assert "temperature" not in body, "the API answers 400 to it"


@pytest.mark.parametrize("provider", [*CHAT, "anthropic"])
@pytest.mark.parametrize(
    ("reply", "kind", "retryable", "billed", "down"),
    [
        (Reply(429, {"Retry-After": "7"}, b'{"error": {"message": "slow"}}'), "rate limit", True, False, False),
        (Reply(500, {}, b'{"error": {"message": "oops"}}'), "server error", True, False, False),
        (Reply(504, {}, b"gateway"), "server error", True, True, False),
        (Reply(404, {}, b'{"error": {"message": "no such model"}}'), "model withdrawn", False, False, True),
        (Reply(400, {}, b'{"error": {"code": "model_decommissioned"}}'), "model withdrawn", False, False, True),
        (Reply(400, {}, b'{"error": {"message": "context too long"}}'), "bad request", False, False, False),
        (Reply(401, {}, b'{"error": {"message": "bad key"}}'), "key refused", False, False, True),
        (Reply(429, {}, b'{"error": {"code": "insufficient_quota"}}'), "no credit", False, False, True),
        (Reply(200, {}, b'{"choices": [{"mess'), "malformed answer", True, True, False),
        (Reply(200, {}, b"{}"), "malformed answer", True, True, False),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>"), "malformed answer", True, True, False),
        (Reply(0, {}, b""), "connection lost", True, True, False),
        (Reply(200, {}, b'{"choices": []}', cut=7), "connection lost", True, True, False),
    ],
)
def test_errors_are_told_apart(
    server: Any, provider: str, reply: Any, kind: str, retryable: bool, billed: bool, down: bool
) -> None:
    server.script = [reply]
    error = failure(teacher(server, provider))
    assert (error.kind, error.retryable, error.maybe_billed, error.teacher_down) == (kind, retryable, billed, down)
    assert error.retry_after == (7.0 if "Retry-After" in reply.headers else None)
    assert len(server.posts()) == 1, "the SDK must not retry by itself"


@pytest.mark.parametrize("provider", [*CHAT, "anthropic"])
def test_an_answer_that_drips_for_ever_is_given_up(server: Any, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read is quick, so only a deadline for the whole answer ends it."""
    monkeypatch.setattr(providers, "TIMEOUT_SECONDS", 0.2)
    server.script = [replace(chat_reply("x" * 10_000), drip=0.01)]
    error = failure(teacher(server, provider))
    assert (error.kind, error.retryable, error.maybe_billed) == ("timeout", True, True)


@pytest.mark.parametrize("provider", [*CHAT, "anthropic"])
def test_a_slow_body_that_arrives_is_an_answer(server: Any, provider: str) -> None:
    good = anthropic_reply("four") if provider == "anthropic" else chat_reply("four")
    server.script = [replace(good, drip=0.0005)]
    assert ask(teacher(server, provider)).text == "four"


def test_a_server_that_is_not_there_has_billed_nothing(server: Any) -> None:
    error = failure(teacher(server, "openai", base_url="http://127.0.0.1:9/v1"))
    assert (error.kind, error.retryable, error.maybe_billed) == ("unreachable", True, False)


@pytest.mark.parametrize("provider", [*CHAT, "anthropic"])
def test_a_key_that_the_server_echoes_is_in_no_exception_and_no_answer(server: Any, provider: str) -> None:
    key = CANARY
    server.script = [error_reply(401, f"Incorrect API key provided: {key}")]
    error = failure(teacher(server, provider))
    assert key not in "".join(traceback.format_exception(error))
    assert error.__context__ is None and error.__cause__ is None, "the SDK's exception holds the request's headers"
    server.script = [(anthropic_reply if provider == "anthropic" else chat_reply)(f"your key is {key}")]
    assert ask(teacher(server, provider)).text == "your key is [redacted]"


def test_redact_takes_out_what_looks_like_a_key() -> None:
    assert redact("gsk_abcdefghijklmnop and Bearer abc.def-ghi1") == "[redacted] and [redacted]"


@pytest.mark.parametrize("provider", [*CHAT, "anthropic"])
def test_availability_asks_the_provider_whether_the_model_is_served(server: Any, provider: str) -> None:
    who = teacher(server, provider)
    assert availability(who, None).ok
    server.models = ["another"]
    found = availability(who, None)
    assert not found.ok and "does not list" in found.reason and found.mend


def test_availability_without_key_or_price_goes_over_no_network(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unpriced = availability(teacher(server, "openai", usd_per_million_input=None), None)
    assert not unpriced.ok and "price" in unpriced.reason
    monkeypatch.delenv("CANARY_KEY")
    keyless = availability(teacher(server, "openai"), None)
    assert not keyless.ok and "CANARY_KEY" in keyless.reason and "export CANARY_KEY" in keyless.mend
    assert server.seen == []


def test_the_solver_answers_exactly_where_it_can() -> None:
    task = Task("math", "sum", "easy", "2+2?", answer="4", solution="2+2 = 4")
    answer = solve(task)
    assert answer is not None and answer.text == "2+2 = 4"
    assert solve(Task("math", "sum", "easy", "2+2?")) is None


def test_each_conversation_is_sampled_with_the_seed_of_its_sample(scripted_engine: Callable[..., Any]) -> None:
    """Where the place in the batch decided too, a later sample could be an earlier one's again."""
    engine = scripted_engine(lambda adapter, prompt: "4")
    seeds: list[Any] = []
    plain = engine.chat_many
    engine.chat_many = lambda conversations, *, seed, **how: seeds.append(seed) or plain(conversations, **how)
    for count in (3, 2):
        providers.ask_local(engine, [MESSAGES] * count, max_tokens=9, temperature=0.7, seed=count)
    assert seeds == [[3, 3, 3], [2, 2]]
