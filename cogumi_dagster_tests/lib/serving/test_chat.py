"""The chat page: the conversation it keeps, the line under each answer, and that nothing is fetched from elsewhere."""

import asyncio
import gc
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.chat import build_chat, converse, launch_chat, route_line, shown, stopped
from cogumi_dagster.lib.serving.server import bind


@pytest.fixture
def page_leftovers() -> Iterator[None]:
    """Each Gradio page leaves an event loop unclosed; they are collected here, where that is no error."""
    yield
    asyncio.set_event_loop(None)
    gc.collect()


def talk(
    room, text: str, turns: list[dict[str, Any]] | None = None, model: str = "cogumi"
) -> list[list[dict[str, Any]]]:
    async def collect() -> list[list[dict[str, Any]]]:
        return [told async for told in converse(room.url, room.token, text, turns or [], model)]

    return asyncio.run(collect())


def test_an_answer_grows_and_ends_with_its_route(quiet_room) -> None:
    steps = talk(quiet_room, " hard code ")
    assert steps[0][0] == {"role": "user", "content": "hard code"}
    answers = [step[-1]["content"] for step in steps]
    assert answers[:3] == ["", "code", "code on"] and answers[-1] == "code on <hard code> ünï 🙂"
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    assert steps[-1][-1]["routing"]["route"] == "code" and steps[-1][-1]["problem"] == ""


def test_the_server_hears_the_whole_conversation_but_never_the_route_lines(quiet_room) -> None:
    turns = talk(quiet_room, "easy code")[-1]
    quiet_room.engine.conversations.clear()
    turns = talk(quiet_room, "wrong, easy code", turns)[-1]
    said = [turn["content"] for turn in quiet_room.engine.conversations[0]]
    assert said == ["easy code", "base on <easy code> ünï 🙂", "wrong, easy code"]
    assert turns[-1]["routing"]["escalated"] is True
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2


def test_the_chosen_model_is_asked(quiet_room) -> None:
    talk(quiet_room, "anything", model="cogumi-automation")
    assert quiet_room.engine.calls == [("automation", "anything")]


def test_blank_text_asks_nothing(quiet_room) -> None:
    assert talk(quiet_room, "  \n") == [[]]
    assert quiet_room.engine.calls == []


def test_a_failure_is_a_note_under_the_answer_and_what_was_said_stays(quiet_room) -> None:
    last = talk(quiet_room, "die", model="cogumi-base")[-1][-1]
    assert last["content"] == "base on"
    assert "engine failed" in last["problem"]
    assert "engine failed" in shown([last])[0]["content"][-1]["text"]
    quiet_room.engine.conversations.clear()
    talk(quiet_room, "easy code", [{"role": "user", "content": "die"}, {**last, "content": ""}])
    assert [turn["role"] for turn in quiet_room.engine.conversations[0]] == ["user", "user"]


def test_leaving_the_conversation_frees_the_server(room) -> None:
    async def leave() -> None:
        told = converse(room.url, room.token, "hold", [], "cogumi")
        await anext(told)
        waiting = asyncio.create_task(anext(told))
        while room.engine.active == 0:
            await asyncio.sleep(0.01)
        waiting.cancel()
        while room.engine.active:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert room.engine.given_up == 1


def test_stopping_keeps_what_was_said() -> None:
    asked = {"role": "user", "content": "q"}
    told = stopped([asked, {"role": "assistant", "content": "half an"}])
    assert told[-1] == {"role": "assistant", "content": "half an", "routing": {}, "problem": "stopped"}
    done = [asked, {"role": "assistant", "content": "whole", "routing": {"route": "base"}, "problem": ""}]
    assert stopped(done) == done and stopped([]) == []


def test_the_route_is_a_part_of_its_own_so_that_an_open_fence_cannot_swallow_it() -> None:
    rows = shown(
        [{"role": "assistant", "content": "```python\nx = 1", "routing": {"route": "base", "confidence": 0.9}}]
    )
    assert rows[0]["content"][0]["text"] == "```python\nx = 1"
    assert 'class="route"' in rows[0]["content"][1]["text"]


def test_the_line_says_route_confidence_and_modifier() -> None:
    line = route_line({"route": "code", "modifier": "code", "confidence": 0.314, "domain": "code", "escalated": False})
    assert " ".join(re.sub("<[^>]*>", " ", line).split()) == "modifier code base confidence 0.31 domain code"
    assert "width:31%" in line
    assert "chosen by hand" in route_line({"route": "base", "modifier": None, "confidence": None})
    assert "escalated" in route_line({"route": "code", "modifier": "code", "confidence": 1.0, "escalated": True})


def test_the_line_escapes_what_the_server_says() -> None:
    line = route_line({"route": "<script>", "domain": "<img>", "escalated": True, "reason": '"><script>'})
    assert "<script>" not in line and "<img>" not in line


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("page_leftovers")
def test_the_page_refuses_a_wrong_token_and_a_missing_server(quiet_room) -> None:
    with pytest.raises(CogumiError, match="refused the token"):
        build_chat(quiet_room.url, "wrong-token")
    with pytest.raises(CogumiError, match="no server at"):
        build_chat("http://127.0.0.1:9", "any-token")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("page_leftovers")
def test_a_port_in_use_is_named(quiet_room) -> None:
    with bind("127.0.0.1", 0) as held, pytest.raises(CogumiError, match="is in use"):
        launch_chat(quiet_room.url, quiet_room.token, held.getsockname()[1])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("page_leftovers")
def test_the_page_offers_the_models_keeps_the_token_and_loads_nothing_from_elsewhere(quiet_room) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch_chat(quiet_room.url, quiet_room.token, port, block=False)
    try:
        root = f"http://127.0.0.1:{port}"
        body = httpx.get(root, verify=False).text
        config = httpx.get(f"{root}/config", verify=False)
    finally:
        page.close()
    assert page.analytics_enabled is False
    assert quiet_room.token not in body and quiet_room.token not in config.text
    radio = next(part["props"] for part in config.json()["components"] if part["type"] == "radio")
    assert [value for _, value in radio["choices"]] == [
        "cogumi", "cogumi-base", "cogumi-code", "cogumi-reasoning", "cogumi-automation",
    ]  # fmt: skip
    assert re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*"', body) == []
    assert "fonts.googleapis.com/css" not in body + config.text
