"""Drawing distinct tasks from a seeded generator."""

import hashlib
from collections.abc import Callable
from random import Random

from cogumi_dagster.lib.tasks.base import Task

_PATIENCE = 200
"""Misses in a row after which a family counts as exhausted: at 200, one in a hundred tasks is still new
with a chance of 13 %."""


def seeded(*parts: object) -> Random:
    """A generator that depends on the parts and on nothing else (not on PYTHONHASHSEED)."""
    return Random("/".join(map(str, parts)))


def seed_number(*parts: object) -> int:
    """A 31-bit seed, far from that of any other parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def distinct(make: Callable[[], Task | None], count: int) -> list[Task]:
    """Up to ``count`` tasks with different prompts; fewer when ``make`` brings nothing new any more."""
    tasks: dict[str, Task] = {}
    misses = 0
    while len(tasks) < count and misses < _PATIENCE:
        task = make()
        if task is None or task.prompt in tasks:
            misses += 1
            continue
        tasks[task.prompt] = task
        misses = 0
    return list(tasks.values())
