"""More lessons of the kinds that the base fails: further problems of a failed task's family and level.

A failed task and its answer are one example of what is to be learned, and a family with an exact solver has any
number of them. The base was not asked these; they are drawn in the proportion in which it failed.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cogumi_dagster.lib.modifiers.near import NearDuplicates
from cogumi_dagster.lib.tasks import get_family
from cogumi_dagster.lib.tasks.base import Difficulty, Task

SPARE = 3
"""Times as many are drawn as are wanted: some are of another split, known already, or near a held-out task."""


def sibling_lessons(
    failures: Sequence[Task],
    clusters: Mapping[str, int],
    each: int,
    *,
    known: Collection[str],
    held_out: Sequence[Task],
    seed: int,
) -> list[dict[str, Any]]:
    """Up to ``each`` solved problems for every failure, as rows with task, response and the failure's cluster.

    None is one of ``known`` (ids), none a near-duplicate of ``held_out`` tasks; a finite family gives what it has.
    """
    near, taken = NearDuplicates(held_out), set(known)
    kinds: dict[tuple[str, Difficulty], list[Task]] = defaultdict(list)
    for task in failures:
        kinds[task.family, task.difficulty].append(task)
    rows = []
    for (name, difficulty), failed in kinds.items():
        wanted = each * len(failed)
        drawn = {
            task.id: task
            for task in get_family(name).generate(SPARE * (wanted + len(failed)), seed + 1, difficulty)
            if task.split == "train" and task.solution is not None and task.id not in taken and task not in near
        }
        taken |= set(drawn)
        rows += [
            {"task": task.to_json(), "response": task.solution, "cluster": clusters[failed[at % len(failed)].id]}
            for at, task in enumerate(list(drawn.values())[:wanted])
        ]
    return rows
