"""Meeting rooms: the sweep against a naive oracle, the published ranges, the balance and the verifier."""

from itertools import product

import pytest

from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty
from cogumi_dagster.lib.tasks.scheduling import (
    FEW_KINDS,
    LENGTHS,
    MEETINGS,
    ROOMS,
    SCHEDULING,
    STARTS,
    is_feasible,
    peak,
    trace,
)


def test_trace() -> None:
    assert trace([(9, 11), (10, 12)], 2) == "rooms 2\n[9-11] a1 b1\n[10-12] b2 c1\nall within 2: YES"
    assert trace([(9, 11), (10, 12), (9, 10)], 1) == "rooms 1\n[9-11] a1 b1\n[10-12] b2 > 1: NO"


def test_an_end_frees_the_room_for_a_start_at_the_same_time() -> None:
    assert trace([(9, 11), (11, 12)], 1) == "rooms 1\n[9-11] a1 b1\n[11-12] c1\nall within 1: YES"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_trace_ends_with_the_answer(difficulty: Difficulty) -> None:
    for task in SCHEDULING.generate_balanced(60, 5, difficulty):
        meetings, rooms = [tuple(m) for m in task.payload["meetings"]], task.payload["rooms"]
        assert task.solution and task.solution.endswith("YES" if peak(meetings) <= rooms else "NO")
        assert task.answer == task.solution.split()[-1]


def test_longer_problems_are_balanced_and_longer() -> None:
    tasks = SCHEDULING.generate_longer(40, 0)
    assert [task.answer for task in tasks].count("NO") == 20
    assert {len(task.payload["meetings"]) for task in tasks} == {7, 8, 9, 10}


def test_lessons_are_balanced_and_most_hard_ones_go_to_the_end_of_the_longest_list() -> None:
    tasks = SCHEDULING.generate_lessons(120, 0, "hard")
    lines = [str(task.solution).count("[") for task in tasks]
    long = [task for task, written in zip(tasks, lines, strict=True) if written >= 5]
    assert len({task.id for task in tasks}) == 120 and max(len(task.payload["meetings"]) for task in tasks) == 6
    assert [task.answer for task in tasks].count("NO") == 60
    assert len(long) >= 80 and [task.answer for task in long].count("NO") >= 40
    few = [task for task in long if len({tuple(meeting) for meeting in task.payload["meetings"]}) <= FEW_KINDS]
    assert len(few) >= 40
    assert SCHEDULING.generate_lessons(30, 0, "medium") == SCHEDULING.generate_balanced(30, 0, "medium")


def test_peak_agrees_with_counting_hour_by_hour() -> None:
    spans = [(start, start + length) for start in (9, 10, 11) for length in (1, 2, 3)]
    for meetings in product(spans, repeat=3):
        naive = max(sum(start <= hour < end for start, end in meetings) for hour in range(9, 18))
        assert peak(meetings) == naive
        assert is_feasible(meetings, naive) and not is_feasible(meetings, naive - 1)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_published_ranges(difficulty: Difficulty) -> None:
    for task in SCHEDULING.generate(60, 2, difficulty):
        meetings, rooms = task.payload["meetings"], task.payload["rooms"]
        assert MEETINGS[difficulty][0] <= len(meetings) <= MEETINGS[difficulty][1]
        assert ROOMS[difficulty][0] <= rooms <= ROOMS[difficulty][1]
        for start, end in meetings:
            assert STARTS[0] <= start <= STARTS[1] and LENGTHS[0] <= end - start <= LENGTHS[1]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_balanced_has_as_many_no_as_yes(difficulty: Difficulty) -> None:
    tasks = SCHEDULING.generate_balanced(50, 1, difficulty)
    answers = [task.answer for task in tasks]
    assert (len({task.id for task in tasks}), answers.count("YES"), answers.count("NO")) == (50, 25, 25)
    assert answers != sorted(answers)


def test_the_yes_or_no_of_the_last_line_counts() -> None:
    task = next(task for task in SCHEDULING.generate(20, 0, "medium") if task.answer == "YES")
    assert SCHEDULING.verify(task, "No, wait. yes").passed is True
    assert SCHEDULING.verify(task, "YES. There is no conflict.").passed is True
    assert SCHEDULING.verify(task, "Answer: YES, no hour needs more rooms.").passed is True
    assert SCHEDULING.verify(task, "YES, or so it seems; no, it is hard to say").passed is True
    assert SCHEDULING.verify(task, "all within 3: YES\nI hope that this helps!").passed is True
    assert SCHEDULING.verify(task, "It says yes and it says no, I think").passed is False
    assert SCHEDULING.verify(task, "I don't think the answer is YES").passed is False
    assert SCHEDULING.verify(task, "YES... no.").passed is False
    assert SCHEDULING.verify(task, "I know nothing").passed is False
