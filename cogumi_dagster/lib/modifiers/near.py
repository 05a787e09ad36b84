"""Which tasks are near-duplicates of others: the line between what is learned and what is held out."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from cogumi_dagster.lib.tasks import Pool, draw_from, family_pool
from cogumi_dagster.lib.tasks.base import Difficulty, Split, Task

SPARE = 3
"""Times as many tasks are drawn as are wanted at first, since some are near-duplicates."""
MOST_DRAWN = 6_000
"""Tasks of which a pool that is asked for more counts as exhausted."""
SHINGLE = 3
"""Words (or signs) in a shingle."""
SIMILARITY = 0.8
"""Jaccard similarity of two prompts' shingles from which, with the same answer, they are one problem."""

Shingles = frozenset[tuple[str, ...]]


class NearDuplicates:
    """Says of a task whether it is a problem of ``others`` in other words.

    Generated tasks share their template, so likeness of words alone says little: two are one problem where an exact
    solution is the same word for word, or where their prompts are alike and the answer is the same.
    """

    def __init__(self, others: Sequence[Task]) -> None:
        self._solutions = {(other.family, other.solution) for other in others if other.solution is not None}
        self._prompts: dict[tuple[str, str | None], list[Shingles]] = defaultdict(list)
        for other in others:
            self._prompts[other.family, other.answer].append(_shingles(other.prompt))

    def past(self, pool: Pool) -> Pool:
        """The pool without them."""
        return sifted(pool, lambda drawn: [task for task in drawn if task not in self])

    def __contains__(self, task: Task) -> bool:
        if (task.family, task.solution) in self._solutions:
            return True
        own = _shingles(task.prompt)
        alike = self._prompts.get((task.family, task.answer), ())
        return any(len(own & other) >= SIMILARITY * len(own | other) for other in alike)


def one_of_each_solution(pool: Pool) -> Pool:
    """The pool with the first of those tasks, of all levels, whose exact solution is the same word for word: the others
    would be no further evidence."""
    found: dict[str, str] = {}

    def firsts(drawn: list[Task]) -> list[Task]:
        return [task for task in drawn if found.setdefault(task.solution or task.id, task.id) == task.id]

    return sifted(pool, firsts)


def draw_distinct(families: Sequence[str], count: int, seed: int, split: Split) -> list[Task]:
    """Tasks of one split, no two with the same solution, the families in turn."""
    pools = {name: (1.0, one_of_each_solution(family_pool(name, seed))) for name in families}
    return draw_from(pools, count, {split})


def sifted(pool: Pool, sift: Callable[[list[Task]], list[Task]]) -> Pool:
    """What ``sift`` leaves of a pool: more is drawn until enough is left or the pool has no more."""

    def rest(number: int, difficulty: Difficulty) -> list[Task]:
        asked = SPARE * number
        while True:
            drawn = pool(asked, difficulty)
            left = sift(drawn)
            if len(left) >= number or len(drawn) < asked or asked > MOST_DRAWN:
                return left[:number]
            asked *= 4

    return rest


def _shingles(text: str) -> Shingles:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return frozenset(tuple(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1)))
