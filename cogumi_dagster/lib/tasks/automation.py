"""Automation: a request in words becomes one call of a typed function, as a JSON object.

The prompt lists a few signatures, one of which fits. The verifier checks the name and each argument with
strict types: a number in quotes, a missing argument or one too many is wrong; the order of keys is free.
"""

import json
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from cogumi_dagster.lib.tasks.automation_catalogue import CALENDAR, FILES, HOME, MESSAGES, Function
from cogumi_dagster.lib.tasks.base import Difficulty, Task, Verdict, split_of
from cogumi_dagster.lib.tasks.drawing import distinct, seeded

SIGNATURES = {"easy": 2, "medium": 3, "hard": 4}
"""How many functions the prompt lists."""
ARGUMENTS = {"easy": (1, 2), "medium": (2, 3), "hard": (3, 9)}
"""How many arguments the function that fits takes, where the catalogue has such a one."""


@dataclass(eq=False)
class AutomationFamily:
    """Requests against one catalogue of functions."""

    name: str
    catalogue: tuple[Function, ...]
    domain: str = "automation"
    max_tokens: int = 96
    version: str = "3"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        rng = seeded(self.name, difficulty, seed)
        return distinct(lambda: self._task(rng, difficulty), count)

    def verify(self, task: Task, response: str) -> Verdict:
        calls = find_objects(response)
        if not calls:
            return Verdict(False, "there is no JSON object in the response")
        if len(calls) > 1 and any(not _equal(call, calls[0]) for call in calls):
            return Verdict(False, "more than one call was given")
        problem = _difference(calls[0], task.payload["call"])
        return Verdict(False, problem) if problem else Verdict(True, "right", 1.0)

    def _task(self, rng: Random, difficulty: Difficulty) -> Task:
        least, most = ARGUMENTS[difficulty]
        fitting = [one for one in self.catalogue if least <= len(one.parameters) <= most] or list(self.catalogue)
        function = rng.choice(fitting)
        arguments = {name: draw(rng) for name, (_, draw) in function.parameters.items()}
        spoken = {name: function.say(name, value) for name, value in arguments.items()}
        template = rng.choice(function.requests)
        request = template.format(**spoken)
        others = rng.sample([one for one in self.catalogue if one is not function], SIGNATURES[difficulty] - 1)
        listed = [function, *others]
        rng.shuffle(listed)
        call = {"name": function.name, "arguments": arguments}
        answer = json.dumps(call, ensure_ascii=False)
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt="Functions:\n" + "\n".join(one.signature for one in listed) + f"\nRequest: {request}\n"
            'Reply with one JSON object {"name": ..., "arguments": {...}} and nothing else.',
            payload={"call": call},
            answer=answer,
            solution=answer,
            split_by=_split_by(f"{self.name} {template}"),
            kind=f"{self.name} {template}",
        )


def _split_by(request: str) -> str:
    """One in ten requests is only ever held out, whatever is filled in; of the others the prompt decides."""
    return request if split_of(request) == "test" else ""


def find_objects(text: str) -> list[dict[str, Any]]:
    """The outermost JSON objects in a text (in a code fence or bare), at most 20."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    found: list[dict[str, Any]] = []
    place = 0
    for _ in range(20):
        place = text.find("{", place)
        if place < 0:
            break
        try:
            value, place = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            place += 1
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _difference(call: dict[str, Any], right: dict[str, Any]) -> str:
    """What is wrong with a call, or an empty text."""
    if set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return "the object must have the keys name and arguments, and no other"
    if call["name"] != right["name"]:
        return f"the function is {right['name']}, not {str(call['name'])[:60]}"
    given, wanted = call["arguments"], right["arguments"]
    if set(given) != set(wanted):
        return f"the arguments are {', '.join(wanted)}"
    wrong = [name for name in wanted if not _equal(given[name], wanted[name])]
    return f"{wrong[0]} must be {json.dumps(wanted[wrong[0]], ensure_ascii=False)}" if wrong else ""


def _equal(left: Any, right: Any) -> bool:
    """Equality with equal types; texts may differ in spaces around and in the case of letters."""
    if type(left) is not type(right):
        return False
    if isinstance(left, str):
        return _plain(left) == _plain(right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return set(left) == set(right) and all(_equal(left[key], right[key]) for key in left)
    return bool(left == right)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


AUTOMATION_CALENDAR = AutomationFamily("automation_calendar", CALENDAR)
AUTOMATION_FILES = AutomationFamily("automation_files", FILES)
AUTOMATION_MESSAGES = AutomationFamily("automation_messages", MESSAGES)
AUTOMATION_HOME = AutomationFamily("automation_home", HOME)
