"""The server over real HTTP: the official client on the main paths, raw httpx for hostile input."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import OpenAI

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import ServingConfig
from cogumi_dagster.lib.serving.client import ask_questions
from cogumi_dagster.lib.serving.server import bind, serve

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/health/"),
    ("GET", "/v1/%2e%2e/health"),
]
HTTP = httpx.Client(verify=False, trust_env=False, timeout=20)
"""One client for all: reading the certificates of this machine for each request takes longer than a test."""
HARD = {"model": "cogumi", "messages": [{"role": "user", "content": "hard code"}]}
HOLD = {"model": "cogumi-base", "messages": [{"role": "user", "content": "hold"}]}


@pytest.fixture(autouse=True, scope="module")
def _close_the_client() -> Iterator[None]:
    yield
    HTTP.close()


@contextmanager
def client_of(room) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{room.url}/v1", api_key=room.token, max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def client(quiet_room) -> Iterator[OpenAI]:
    with client_of(quiet_room) as client:
        yield client


def post(room, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(room.url + path, content=content, headers=room.headers, **more)


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until true; the bound is only there so that a failure ends."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never came true")


def health(room) -> dict[str, Any]:
    return HTTP.get(f"{room.url}/health").json()


def events_of(text: str) -> list[Any]:
    datas = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


# --- the main paths, with the official client ----------------------------------------------------


def test_a_chat_answer_carries_its_route(quiet_room, client) -> None:
    raw = client.chat.completions.with_raw_response.create(**HARD)
    done = raw.parse()
    assert done.choices[0].message.content == "code on <hard code> ünï 🙂"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (2, 6, 8)
    routing = done.model_extra["cogumi"]
    assert (routing["route"], routing["modifier"], routing["domain"]) == ("code", "code", "code")
    assert routing["confidence"] == pytest.approx(0.0498, abs=1e-4)
    assert raw.headers["X-Cogumi-Route"] == "code"
    assert raw.headers["X-Cogumi-Confidence"] == "0.0498"


def test_a_manual_model_has_no_confidence(quiet_room) -> None:
    response = post(quiet_room, HARD | {"model": "cogumi-base"})
    assert response.json()["cogumi"]["confidence"] is None
    assert response.headers["X-Cogumi-Route"] == "base"
    assert "X-Cogumi-Confidence" not in response.headers


def test_an_answer_can_be_sent_back_as_history(quiet_room, client) -> None:
    first = client.chat.completions.create(**HARD).choices[0].message
    turns = [*HARD["messages"], first.model_dump(), {"role": "user", "content": "wrong, easy code"}]
    done = client.chat.completions.create(model="cogumi", messages=turns)
    assert done.model_extra["cogumi"]["escalated"] is True
    assert done.model_extra["cogumi"]["route"] == "code"


def test_content_parts_and_the_developer_role(quiet_room, client) -> None:
    parts = [{"type": "text", "text": "easy"}, {"type": "text", "text": "one"}]
    turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(model="cogumi-base", messages=turns)
    assert done.choices[0].message.content == "base on <easy\none> ünï 🙂"


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("prompt", ["easy code", "hard code"])
def test_a_stream_says_the_same_as_the_whole_answer(quiet_room, client, prompt: str, include_usage: bool) -> None:
    turns = [{"role": "user", "content": prompt}]
    whole = client.chat.completions.create(model="cogumi", messages=turns)
    more = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(client.chat.completions.create(model="cogumi", messages=turns, stream=True, **more))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    last_with_choice = [chunk for chunk in chunks if chunk.choices][-1]
    assert last_with_choice.model_extra["cogumi"] == whole.model_extra["cogumi"]
    assert (chunks[-1].usage == whole.usage) is include_usage
    assert sum(chunk.usage is not None for chunk in chunks) == include_usage


def test_a_stream_ends_with_done(quiet_room) -> None:
    response = post(quiet_room, HARD | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    assert all("usage" not in data for data in events[:-1])


def test_raw_completions_whole_and_streamed(quiet_room, client) -> None:
    done = client.completions.create(model="cogumi-code", prompt="def f", max_tokens=3)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("code on <def", "length")
    assert done.model_extra["cogumi"]["route"] == "code"
    chunks = list(client.completions.create(model="cogumi-code", prompt="def f", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "code on <def" and len(chunks) > 3
    assert chunks[-1].model_extra["cogumi"]["route"] == "code"


def test_the_models_are_listed(quiet_room, client) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["cogumi", "cogumi-base", "cogumi-code", "cogumi-reasoning", "cogumi-automation"]


def test_parameters_reach_the_engine_and_harmless_fields_do_not_hurt(quiet_room, client) -> None:
    client.chat.completions.create(
        **(HARD | {"model": "cogumi-base"}), temperature=0.7, top_p=0.5, seed=11, stop="x", max_completion_tokens=9,
        n=1, user="u", metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0,
    )  # fmt: skip
    wanted = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.5, "seed": 11, "stop": ("x",), "logprobs": False}
    assert quiet_room.engine.samplings == [wanted]


def test_defaults_are_greedy(quiet_room) -> None:
    post(quiet_room, HARD | {"model": "cogumi-base", "temperature": None, "stop": None})
    wanted = {"max_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": (), "logprobs": False}
    assert quiet_room.engine.samplings == [wanted]


def test_a_sampled_answer_has_a_seed_of_its_own_unless_it_is_given(quiet_room) -> None:
    for _ in range(2):
        post(quiet_room, HARD | {"model": "cogumi-base", "temperature": 0.8})
    first, second = (sampling["seed"] for sampling in quiet_room.engine.samplings)
    assert first != second


def test_the_demo_client_reads_routes(quiet_room) -> None:
    rows = ask_questions(quiet_room.url, quiet_room.token, ["easy code", "hard reasoning"])
    assert [(row.question, row.route) for row in rows] == [("easy code", "base"), ("hard reasoning", "reasoning")]
    assert rows[1].answer.startswith("reasoning on <hard reasoning>")
    assert rows[0].confidence == pytest.approx(0.990, abs=1e-3) and rows[0].seconds > 0


def test_the_demo_client_says_what_is_wrong(quiet_room) -> None:
    with pytest.raises(CogumiError, match="refused the token"):
        ask_questions(quiet_room.url, "not-the-token", ["x"])
    with pytest.raises(CogumiError, match="the prompt is longer than the context"):
        ask_questions(f"{quiet_room.url}/v1", quiet_room.token, ["too long"])
    with pytest.raises(CogumiError, match="no server at"):
        ask_questions("http://127.0.0.1:9", quiet_room.token, ["x"])


# --- the door ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "value",
    [
        None, "", "Bearer", "Bearer wrong", "Bearer " + "x" * 10_000, 'Bearer "a-token-for-tests"',
        "Basic a-token-for-tests", "a-token-for-tests", "Bearer a-token-for-tests-and-more", "Bearer a-token-for-test",
        b"Bearer \xff\xfe",
    ],
)  # fmt: skip
def test_no_route_opens_without_the_token(quiet_room, method: str, path: str, value: str | bytes | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    response = HTTP.request(method, quiet_room.url + path, headers=headers, content=json.dumps(HARD))
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert quiet_room.engine.calls == []


def test_health_is_public_and_says_little(quiet_room) -> None:
    assert health(quiet_room) == {"status": "ok", "running": 0, "waiting": 0}


def test_two_authorization_headers_are_refused(quiet_room) -> None:
    headers = [("Authorization", f"Bearer {quiet_room.token}"), ("Authorization", "Bearer other")]
    assert HTTP.get(f"{quiet_room.url}/v1/models", headers=headers).status_code == 401


def test_unknown_paths_and_methods_have_the_error_shape(quiet_room) -> None:
    missing = HTTP.get(f"{quiet_room.url}/v1/nothing", headers=quiet_room.headers)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    wrong = HTTP.get(f"{quiet_room.url}/v1/chat/completions", headers=quiet_room.headers)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


# --- hostile bodies ------------------------------------------------------------------------------

HOSTILE = {
    "not json": b"hello",
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "not utf-8": b'{"model": "cogumi", "messages": [{"role": "user", "content": "\xff"}]}',
    "half a surrogate pair": b'{"model": "cogumi", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    "a surrogate in a key": b'{"\\ud800": 1}',
    "surrogate bytes": b'{"model": "cogumi", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "deep": b"[" * 10_000,
    "deep in a field": b'{"metadata":' + b'{"a":' * 3_000 + b"1" + b"}" * 3_001,
    "a long number": b'{"seed": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_cannot_be_read_is_a_400(quiet_room, name: str, path: str) -> None:
    response = post(quiet_room, HOSTILE[name], path)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert quiet_room.engine.calls == []


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("temperature", float("nan"), "temperature"),
    ("temperature", float("inf"), "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", 2.01, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("n", 2, "n"),
    ("n", 1_000_000_000, "n"),
    ("n", 1e9, "n"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 513, "max_tokens"),
    ("max_tokens", 10**18, "max_tokens"),
    ("max_tokens", 10**30, "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_completion_tokens", 10**9, "max_tokens"),
    ("seed", 2**63, "seed"),
    ("seed", -1, "seed"),
    ("stop", ["a"] * 5, "stop"),
    ("stop", [""], "stop"),
    ("stop", "x" * 300, "stop"),
    ("stream", "yes", "stream"),
    ("messages", [], "messages"),
    ("messages", "hello", "messages"),
    ("messages", [{"role": "user", "content": "x"}] * 520, "messages"),
    ("messages", [{"role": "tool", "content": "x"}], "messages.0.role"),
    ("messages", [{"role": "user"}], "messages.0.content"),
    ("messages", [{"role": "user", "content": None}], "messages.0.content"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0.content"),
    ("messages", [{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages.0.tool_calls"),
    ("model", 1, "model"),
    ("metadata", {"a": {"b": 1}}, "metadata"),
    ("logprobs", True, "logprobs"),
    ("presence_penalty", 1.0, "presence_penalty"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("grammar", "root ::= x", "grammar"),
    ("tools", [], "tools"),
    ("lora", [{"id": 0}], "lora"),
    ("cache_prompt", True, "cache_prompt"),
    ("stream_options", {"include_usage": True}, None),
]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("field", "value", "param"), BAD_FIELDS, ids=[f"{f}-{n}" for n, (f, *_) in enumerate(BAD_FIELDS)]
)
def test_a_bad_field_is_a_400_that_names_it(quiet_room, field: str, value: Any, param: str | None) -> None:
    response = post(quiet_room, HARD | {field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert quiet_room.engine.calls == []


def test_an_unknown_field_gets_a_hint_and_is_not_echoed_at_length(quiet_room) -> None:
    error = post(quiet_room, HARD | {"temprature": 1}).json()["error"]
    assert error["code"] == "unknown_parameter" and "did you mean 'temperature'" in error["message"]
    long = post(quiet_room, HARD | {"x" * 15_000: 1})
    assert long.status_code == 400 and len(long.content) < 1_000


def test_an_unknown_model_is_a_404(quiet_room) -> None:
    response = post(quiet_room, HARD | {"model": "cogumi-coed"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "did you mean 'cogumi-code'" in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["echo", "best_of", "suffix", "logprobs", "messages"])
def test_raw_completions_refuse_what_they_do_not_do(quiet_room, field: str) -> None:
    response = post(quiet_room, {"model": "cogumi", "prompt": "x", field: 5}, "/v1/completions")
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_a_large_body_is_a_413_declared_or_chunked(quiet_room) -> None:
    large = json.dumps(HARD | {"user": "x" * 30_000}).encode()
    assert post(quiet_room, large).status_code == 413

    def parts():
        for start in range(0, len(large), 1_000):
            yield large[start : start + 1_000]

    chunked = HTTP.post(f"{quiet_room.url}/v1/chat/completions", content=parts(), headers=quiet_room.headers)
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "body_too_large"


def test_a_body_at_the_limit_passes(quiet_room) -> None:
    body = json.dumps(HARD | {"user": ""}).encode()
    body = body.replace(b'"user": ""', b'"user": "' + b"x" * (20_000 - len(body)) + b'"')
    assert len(body) == 20_000
    assert post(quiet_room, body).status_code == 200


def test_a_declared_length_beyond_all_numbers_is_refused(quiet_room) -> None:
    with socket.create_connection(("127.0.0.1", int(quiet_room.url.rsplit(":", 1)[1]))) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {quiet_room.token}\r\n"
        line.sendall(f"{head}Content-Length: 99999999999999999999\r\n\r\n".encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 4")


# --- the line, and clients that leave ------------------------------------------------------------


def test_a_full_line_is_a_429_and_health_still_answers(room) -> None:
    with ThreadPoolExecutor(4) as threads:
        held = [threads.submit(post, room, HOLD) for _ in range(4)]
        eventually(lambda: health(room) == {"status": "ok", "running": 2, "waiting": 2})
        surplus = post(room, HOLD)
        streamed = post(room, HOLD | {"stream": True})
        room.engine.release.set()
        assert [future.result().status_code for future in held] == [200] * 4
    for refused in (surplus, streamed):
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
    assert room.engine.most_active == 2
    assert post(room, HOLD).status_code == 200


def test_the_official_client_sees_a_rate_limit(room) -> None:
    with ThreadPoolExecutor(4) as threads:
        held = [threads.submit(post, room, HOLD) for _ in range(4)]
        eventually(lambda: health(room)["waiting"] == 2)
        with client_of(room) as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**HOLD)
        room.engine.release.set()
        assert {future.result().status_code for future in held} == {200}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["cogumi", "cogumi-code"])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_frees_its_slot(room, stream: bool, model: str, path: str) -> None:
    """``cogumi`` streams nothing while the base's answer is held back: that wait must be cancelled as well."""
    body = (HOLD if path.startswith("chat") else {"prompt": "hold"}) | {"model": model, "stream": stream}

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(verify=False, timeout=20) as client:
            asking = asyncio.create_task(client.post(f"{room.url}/v1/{path}", json=body, headers=room.headers))
            while room.engine.active == 0:
                await asyncio.sleep(0.01)
            asking.cancel()

    asyncio.run(ask_and_leave())
    eventually(lambda: room.engine.active == 0 and health(room)["running"] == 0)
    assert room.engine.given_up == 1
    assert not room.engine.release.is_set()


def test_a_client_that_leaves_the_line_frees_its_place(room) -> None:
    async def crowd() -> None:
        async with httpx.AsyncClient(verify=False, timeout=20, headers=room.headers) as client:
            url = f"{room.url}/v1/chat/completions"
            asking: list[asyncio.Task[httpx.Response]] = []
            for place, count in (("running", 2), ("waiting", 2), ("waiting", 0)):
                if count:
                    asking += [asyncio.create_task(client.post(url, json=HOLD)) for _ in range(count)]
                else:  # who waits leaves while two still run: a place that comes free meanwhile may be taken
                    assert all(task.cancel() for task in asking[2:])
                while (await client.get(f"{room.url}/health")).json()[place] != count:
                    await asyncio.sleep(0.01)

    asyncio.run(crowd())
    eventually(lambda: health(room) == {"status": "ok", "running": 0, "waiting": 0})
    assert len(room.engine.calls) == 2, "who left the line must never reach the engine"


def test_a_leaver_does_not_disturb_a_bystander(room) -> None:
    with ThreadPoolExecutor(1) as threads:
        bystander = threads.submit(post, room, HOLD | {"stream": True})
        eventually(lambda: room.engine.active == 1)
        with HTTP.stream(
            "POST", f"{room.url}/v1/chat/completions", json=HOLD | {"stream": True}, headers=room.headers
        ) as leaving:
            next(leaving.iter_raw())
        eventually(lambda: room.engine.given_up == 1)
        room.engine.release.set()
        events = events_of(bystander.result().text)
    said = "".join(data["choices"][0]["delta"].get("content", "") for data in events[:-1])
    assert said == "base on <hold> ünï 🙂" and events[-1] == "[DONE]"


# --- engines that fail ---------------------------------------------------------------------------


def test_an_engine_that_dies_mid_stream_gives_an_error_event(room) -> None:
    body = {"model": "cogumi-base", "messages": [{"role": "user", "content": "die"}], "stream": True}
    response = post(room, body)
    events = events_of(response.text)
    assert response.status_code == 200
    assert events[1]["choices"][0]["delta"]["content"] == "base"
    assert events[-1]["error"]["code"] == "engine_failed"
    assert "[DONE]" not in events and "secret" not in response.text
    assert all(data["choices"][0]["finish_reason"] is None for data in events[:-1])
    with client_of(room) as client, pytest.raises(openai.APIError, match="engine failed"):
        list(client.chat.completions.create(**body))
    assert health(room)["running"] == 0


def test_an_engine_that_dies_is_a_500_without_its_secrets(room) -> None:
    response = post(room, {"model": "cogumi", "messages": [{"role": "user", "content": "die"}]})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert "secret" not in response.text
    assert post(room, HARD).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_a_400_streamed_or_not(room, stream: bool) -> None:
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "too long"}], "stream": stream}
    response = post(room, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the prompt is longer than the context: shorten it"


def test_an_engine_that_stopped_is_a_503_with_retry_after(room, monkeypatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise CogumiError("the engine has been closed", "start it again", retryable=True)

    monkeypatch.setattr(room.engine, "stream", stopped)
    response = post(room, HARD)
    assert response.status_code == 503 and "Retry-After" in response.headers


def test_half_a_surrogate_from_the_model_does_not_break_the_body(room, monkeypatch) -> None:
    words = room.engine._words
    monkeypatch.setattr(room.engine, "_words", lambda prompt, *rest: words("easy \ud83d", *rest))
    assert post(room, HARD).json()["choices"][0]["message"]["content"] == "base on <easy ?> ünï 🙂"
    events = events_of(post(room, HARD | {"stream": True}).text)
    assert "".join(data["choices"][0]["delta"].get("content", "") for data in events[:-1]).endswith("?> ünï 🙂")


def test_shutting_down_ends_what_is_under_way(start_room) -> None:
    room = start_room(ServingConfig(slots=1, queue=1))
    thread = threading.Thread(target=lambda: post(room, HOLD | {"stream": True}), daemon=True)
    thread.start()
    eventually(lambda: room.engine.active == 1)
    # the fixture stops the server and asserts that its thread ends


# --- port, starting ------------------------------------------------------------------------------


def test_a_port_in_use_is_named_before_the_bundle_is_touched(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(CogumiError, match=f"port {port} of 127.0.0.1 is in use\n  mend: .*another port"):
            serve(
                tmp_path / "no-bundle", "127.0.0.1", port, None,
                token_file=tmp_path / "token", config=ServingConfig(), say=lambda line: None,
            )  # fmt: skip
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 8600), ("no such host", 8600)])
def test_an_address_that_cannot_be_served_is_a_clear_error(host: str, port: int) -> None:
    with pytest.raises(CogumiError, match="cannot listen"):
        bind(host, port)


def test_serve_refuses_a_folder_that_is_no_bundle_and_gives_the_port_back(tmp_path: Path) -> None:
    held = bind("127.0.0.1", 0)
    port = held.getsockname()[1]
    held.close()
    with pytest.raises(CogumiError, match="is not a bundle"):
        serve(
            tmp_path, "127.0.0.1", port, "a-good-token",
            token_file=tmp_path / "token", config=ServingConfig(), say=lambda line: None,
        )  # fmt: skip
    bind("127.0.0.1", port).close()


def test_serve_says_where_it_is_and_where_the_token_is(tmp_path: Path, assistant, engine, monkeypatch) -> None:
    """The whole of ``serve`` but the bundle, which has tests of its own."""
    servers: list[uvicorn.Server] = []

    class Watched(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.delenv("COGUMI_TOKEN", raising=False)
    monkeypatch.setattr(uvicorn, "Server", Watched)
    opened = SimpleNamespace(version="0123456789abcdef", adapters={"code": None})
    monkeypatch.setattr("cogumi_dagster.lib.serving.bundle.open_bundle", lambda path: opened)
    monkeypatch.setattr("cogumi_dagster.lib.serving.bundle.load_assistant", lambda bundle, **sizes: assistant)
    said: list[str] = []
    file = tmp_path / "token"

    def run() -> None:
        serve(tmp_path, "127.0.0.1", 0, None, token_file=file, config=ServingConfig(), say=said.append)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: bool(servers) and servers[0].started)
        url = re.search(r"http://\S+", "\n".join(said)).group()  # type: ignore[union-attr]
        token = file.read_text().strip()
        with OpenAI(base_url=url, api_key=token, max_retries=0) as client:
            models = client.models.list()
    finally:
        servers[0].should_exit = True
        thread.join(10)
    assert [model.id for model in models] == assistant.models
    assert engine.closed
    assert any(f"cat {file}" in line for line in said)
    assert not any(token in line for line in said)
