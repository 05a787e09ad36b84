"""Drawing: the mix, the split, the turns, and families that run out."""

from collections import Counter

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.tasks import draw_from, draw_tasks, shares
from cogumi_dagster.lib.tasks.base import Difficulty, Task


def test_mix_split_and_turns() -> None:
    tasks = draw_tasks(["chain_sum", "gcd", "scheduling"], 60, 0, "train")
    assert Counter(task.difficulty for task in tasks) == {"easy": 18, "medium": 30, "hard": 12}
    assert Counter(task.family for task in tasks) == {"chain_sum": 20, "gcd": 20, "scheduling": 20}
    assert {task.split for task in tasks} == {"train"}
    assert len({task.id for task in tasks}) == 60


def test_same_arguments_same_tasks() -> None:
    assert draw_tasks(["gcd"], 20, 4) == draw_tasks(["gcd"], 20, 4)
    assert draw_tasks(["gcd"], 20, 4) != draw_tasks(["gcd"], 20, 5)


def test_splits_do_not_meet() -> None:
    drawn = {
        split: {task.id for task in draw_tasks(["gcd"], 15, 0, split)} for split in ("train", "validation", "test")
    }  # type: ignore[arg-type]
    assert all(len(ids) == 15 for ids in drawn.values())
    assert not drawn["train"] & drawn["validation"] | drawn["train"] & drawn["test"]


def test_weights_are_kept() -> None:
    tasks = draw_tasks({"chain_sum": 3.0, "gcd": 1.0}, 40, 0)
    assert Counter(task.family for task in tasks) == {"chain_sum": 30, "gcd": 10}


def _pool(size: int, name: str):  # type: ignore[no-untyped-def]
    def pool(count: int, difficulty: Difficulty) -> list[Task]:
        return [Task("math", name, difficulty, f"{name} {difficulty} {n}") for n in range(min(size, count))]

    return pool


def test_finite_pools_are_made_up_for_by_others_and_then_end() -> None:
    pools = {"small": (1.0, _pool(2, "small")), "large": (1.0, _pool(40, "large"))}
    tasks = draw_from(pools, 60, None)
    assert len(tasks) == 60
    assert Counter(task.family for task in tasks)["small"] == 6
    assert len(draw_from(pools, 10_000, None)) == 3 * 42


def test_a_level_that_runs_out_is_made_up_for_by_the_other_levels() -> None:
    def only_easy(count: int, difficulty: Difficulty) -> list[Task]:
        return _pool(50, "one")(count, difficulty) if difficulty == "easy" else []

    assert len(draw_from({"one": (1.0, only_easy)}, 30, None)) == 30


def test_shares_add_up() -> None:
    assert shares(7, [0.3, 0.5, 0.2]) == [2, 4, 1]
    assert sum(shares(101, [1, 1, 1])) == 101


def test_nothing_to_draw_from() -> None:
    with pytest.raises(CogumiError, match="nothing to draw"):
        draw_tasks([], 5, 0)
