"""More lessons of the kinds that the base fails: further problems of a failed task's family and level.

A failed task and its answer are one example of what is to be learned, and a family with an exact solver has any
number of them. The base was not asked these; they are drawn in the proportion in which it failed.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from cogumi_dagster.lib.modifiers.near import NearDuplicates
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import family_pool, verify
from cogumi_dagster.lib.tasks.base import Difficulty, Task

VERIFIED_AT_ONCE = 32
"""Tasks at most, and four for each core: code is run in a sandbox of its own, which is mostly waiting."""


def sibling_lessons(
    failures: Sequence[Task],
    clusters: Mapping[str, int],
    each: int,
    *,
    known: Collection[str],
    held_out: Sequence[Task],
    seed: int,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Up to ``each`` solved problems for every failure, as rows with task, response and the failure's cluster.

    Each solution has passed its verifier. None is one of ``known`` (ids) or near a ``held_out`` task; a
    finite family gives what it has.
    """
    if not each:
        return []
    near, taken = NearDuplicates(held_out), set(known)
    kinds: dict[tuple[str, Difficulty], list[Task]] = defaultdict(list)
    for task in failures:
        kinds[task.family, task.difficulty].append(task)
    rows = []
    begun = 0
    for (name, difficulty), failed in kinds.items():
        wanted = each * len(failed)
        progress(begun, each * len(failures), f"more of {name}")
        drawn = near.past(family_pool(name, seed + 1))(2 * (wanted + len(failed)), difficulty)
        new = (task for task in drawn if task.split == "train" and task.id not in taken)
        chosen = []
        for task in islice(_solved(new), wanted):
            chosen.append(task)
            progress(begun + len(chosen), each * len(failures), f"more of {name}")
        begun += wanted
        taken |= {task.id for task in chosen}
        rows += [
            {"task": task.to_json(), "response": task.solution, "cluster": clusters[failed[at % len(failed)].id]}
            for at, task in enumerate(chosen)
        ]
    return rows


def _solved(tasks: Iterable[Task]) -> Iterator[Task]:
    """Those whose own solution passes the verifier, in their order: alone, where it did not beside others (code has so
    many seconds)."""
    at_once, waiting = min(VERIFIED_AT_ONCE, 4 * (os.cpu_count() or 1)), iter(tasks)
    with ThreadPoolExecutor(at_once) as pool:
        while part := list(islice(waiting, at_once)):
            passed = list(pool.map(_passes, part))
            yield from (task for task, right in zip(part, passed, strict=True) if right or _passes(task))


def _passes(task: Task) -> bool:
    return task.solution is not None and verify(task, task.solution).passed is True
