"""Which tasks are near-duplicates of others: the line between what is learned and what is held out."""

import re
from collections import defaultdict
from collections.abc import Sequence

from cogumi_dagster.lib.tasks import Pool
from cogumi_dagster.lib.tasks.base import Task

SPARE = 3
"""Times as many tasks are drawn as are wanted, since some are near-duplicates."""
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
        return lambda number, difficulty: [task for task in pool(SPARE * number, difficulty) if task not in self][
            :number
        ]

    def __contains__(self, task: Task) -> bool:
        if (task.family, task.solution) in self._solutions:
            return True
        own = _shingles(task.prompt)
        alike = self._prompts.get((task.family, task.answer), ())
        return any(len(own & other) >= SIMILARITY * len(own | other) for other in alike)


def _shingles(text: str) -> Shingles:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return frozenset(tuple(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1)))
