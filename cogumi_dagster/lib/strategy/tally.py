"""The tally of hours with the list copied first, each meeting behind a letter of its own.

A small model that tallies meetings straight from the problem loses its place after six or seven of them, above all
where a meeting comes twice. A letter comes once: the next is always known, and what stands behind it is found by it.
"""

from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase

from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.tasks.scheduling import LENGTHS, LETTERS, STARTS, Meeting

STRATEGY = (
    "Give each hour a small letter: 9 is a, 10 is b, and so on to 17, which is i. Copy the meetings in their order, "
    "each behind a capital letter, with the letters in the order of the alphabet (after Z comes A). The first letter "
    "depends on the first meeting: [9-10] has A, [9-11] B, [9-12] C, [10-11] D, and so on. Then write a line for each "
    "capital: the capital and, for every hour of its meeting, from the start to the one before the end, the small "
    "letter and how many meetings have taken that hour so far. As soon as a number is above the rooms, stop: NO. If "
    "none ever is: YES. Example: [9-11], [10-12], rooms 2 gives rooms 2: B[9-11] C[10-12], then B a1 b1, then C b2 "
    "c1, all within 2: YES."
)
ROOM = 192
"""Tokens that the trace of ten meetings may take."""


def listed_trace(meetings: Sequence[Meeting], rooms: int) -> str:
    """The worked solution. It stops at the first number above ``rooms``."""
    names = _names(meetings)
    listed = (f" {name}[{start}-{end}]" for name, (start, end) in zip(names, meetings, strict=True))
    lines = [f"rooms {rooms}:{''.join(listed)}"]
    taken = Counter[int]()
    for name, (start, end) in zip(names, meetings, strict=True):
        line = f" {name}"  # behind a space as in the list, so that it is the same token
        for hour in range(start, end):
            taken[hour] += 1
            line += f" {LETTERS[hour]}{taken[hour]}"
            if taken[hour] > rooms:
                return "\n".join([*lines, f"{line} > {rooms}: NO"])
        lines.append(line)
    return "\n".join([*lines, f"all within {rooms}: YES"])


def listed_trace_of(task: Task) -> str:
    """The trace of a task of the family ``scheduling``."""
    return listed_trace([(start, end) for start, end in task.payload["meetings"]], task.payload["rooms"])


def _names(meetings: Sequence[Meeting]) -> list[str]:
    """Consecutive capitals. That the first differs from problem to problem teaches all of them at all places."""
    start, end = meetings[0]
    first = (start - STARTS[0]) * LENGTHS[1] + end - start - 1
    return [ascii_uppercase[(first + place) % len(ascii_uppercase)] for place in range(len(meetings))]
