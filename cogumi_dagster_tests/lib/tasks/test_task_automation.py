"""JSON calls: strict types, free key order, one call."""

import json

import pytest

from cogumi_dagster.lib.tasks.automation import AUTOMATION_HOME, find_objects
from cogumi_dagster.lib.tasks.automation_catalogue import CALENDAR, FILES, HOME, MESSAGES
from cogumi_dagster.lib.tasks.base import Task

CALL = {"name": "set_temperature", "arguments": {"room": "kitchen", "celsius": 21}}
TASK = Task("automation", "automation_home", "easy", "p", payload={"call": CALL})


@pytest.mark.parametrize(
    "response",
    [
        json.dumps(CALL),
        '```json\n{"arguments": {"celsius": 21, "room": "Kitchen"},\n "name": "set_temperature"}\n```',
        "Sure: " + json.dumps(CALL) + " Done.",
        json.dumps(CALL) + json.dumps(CALL),
    ],
)
def test_right_calls_pass(response: str) -> None:
    assert AUTOMATION_HOME.verify(TASK, response).passed is True


@pytest.mark.parametrize(
    "arguments",
    [
        {"room": "kitchen", "celsius": "21"},
        {"room": "kitchen", "celsius": 21.0},
        {"room": "kitchen", "celsius": True},
        {"room": "kitchen"},
        {"room": "kitchen", "celsius": 21, "unit": "C"},
        {"room": ["kitchen"], "celsius": 21},
        {"room": "bedroom", "celsius": 21},
    ],
)
def test_wrong_arguments_fail(arguments: dict[str, object]) -> None:
    response = json.dumps({"name": "set_temperature", "arguments": arguments})
    assert AUTOMATION_HOME.verify(TASK, response).passed is False


def test_two_different_calls_fail_and_so_does_an_extra_key() -> None:
    other = json.dumps({"name": "lock_doors", "arguments": {"room": "kitchen"}})
    assert AUTOMATION_HOME.verify(TASK, json.dumps(CALL) + other).passed is False
    assert AUTOMATION_HOME.verify(TASK, json.dumps({**CALL, "why": "x"})).passed is False


def test_nan_is_no_json() -> None:
    assert find_objects('{"a": NaN} {"b": 1}') == [{"b": 1}]


@pytest.mark.parametrize("function", CALENDAR + FILES + MESSAGES + HOME, ids=lambda one: one.name)
def test_each_request_tells_every_argument(function) -> None:  # type: ignore[no-untyped-def]
    for request in function.requests:
        for parameter in function.parameters:
            assert "{" + parameter + "}" in request
