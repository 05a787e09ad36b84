from collections.abc import Callable
from dataclasses import replace

import pytest

from cogumi_dagster.lib.modifiers.failures import MODIFIER_DOMAINS, families_for, held_out_tasks, training_tasks
from cogumi_dagster.lib.modifiers.near import NearDuplicates, one_of_each_solution
from cogumi_dagster.lib.routing.examples import router_tasks, system_tasks
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Task


def task(prompt: str, answer: str, solution: str | None = None, family: str = "f") -> Task:
    return Task("math", family, "easy", prompt, answer=answer, solution=solution)


HELD_OUT = task(
    "Meetings: [9-11], [10-12], [13-14]. Rooms: 2. Can all meetings be scheduled? End with YES or NO, please.",
    "YES", "the trace",
)  # fmt: skip


@pytest.mark.parametrize(
    ("other", "near"),
    [
        (HELD_OUT, True),
        (task("Something else altogether, but solved alike.", "YES", "the trace"), True),
        (task(HELD_OUT.prompt.replace("please", "thanks"), "YES", "another"), True),
        (task(HELD_OUT.prompt.replace("please", "thanks"), "NO", "another"), False),  # another answer, another problem
        (task(HELD_OUT.prompt, "YES", "the trace", family="g"), False),
        (task("How many rooms are needed for three meetings in the morning?", "YES", None), False),
    ],
)
def test_the_same_problem_in_other_words(other: Task, near: bool) -> None:
    assert (other in NearDuplicates([HELD_OUT])) is near


def test_without_a_solution_only_prompts_count() -> None:
    assert task("a b c d", "1") not in NearDuplicates([task("e f g h", "2")])


@pytest.mark.parametrize("modifier", MODIFIER_DOMAINS)
def test_no_training_task_is_a_near_duplicate_of_one_that_is_measured_on(modifier: str) -> None:
    held_out = [*held_out_tasks(modifier, 40, 3), *router_tasks(42, 3), *system_tasks(42, 3)]
    learned = training_tasks(modifier, 60, 3, held_out)
    assert len(learned) == 60 and len({one.id for one in learned}) == 60
    assert {one.split for one in learned} == {"train"}
    taught = NearDuplicates(learned)
    assert not [one for one in held_out if one in taught]
    assert len({one.family for one in learned}) >= 4
    assert training_tasks(modifier, 60, 3, []), "nothing is held out"


def pool_of(size: int) -> Callable[[int, Difficulty], list[Task]]:
    """Problems of which nine in ten share their answer and solution with another."""
    tasks = [replace(task(f"problem {n}", str(n // 10)), solution=f"is {n // 10}") for n in range(size)]
    return lambda number, difficulty: tasks[:number]


def test_more_is_drawn_until_enough_is_left() -> None:
    each = one_of_each_solution(pool_of(1000))(20, "easy")
    assert len(each) == 20 == len({one.solution for one in each}) and each[0].prompt == "problem 0"
    assert len(one_of_each_solution(pool_of(100))(20, "easy")) == 10, "a pool that has no more gives what is left"
    known = NearDuplicates([replace(task("said otherwise", "0"), solution="is 0")])
    assert [one.prompt for one in known.past(pool_of(1000))(3, "easy")] == ["problem 10", "problem 11", "problem 12"]


@pytest.mark.parametrize("modifier", MODIFIER_DOMAINS)
def test_no_two_held_out_tasks_are_one_and_every_family_is_learned_at_all_levels(modifier: str) -> None:
    held_out = held_out_tasks(modifier, 120, 0)
    solutions = [one.solution for one in held_out if one.solution]
    assert len(held_out) == 120 and len(solutions) == len(set(solutions))
    levels = {(one.family, one.difficulty) for one in training_tasks(modifier, 400, 0, held_out)}
    assert levels == {(family, level) for family in families_for(modifier) for level in DIFFICULTIES}
