from collections import Counter

import pytest

from cogumi_dagster.lib.modifiers import siblings as siblings_module
from cogumi_dagster.lib.modifiers.failures import MODIFIER_DOMAINS, held_out_tasks, training_tasks
from cogumi_dagster.lib.modifiers.near import NearDuplicates
from cogumi_dagster.lib.modifiers.siblings import sibling_lessons
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import Task, Verdict


@pytest.mark.parametrize("modifier", MODIFIER_DOMAINS)
def test_siblings_are_new_solved_and_of_the_kinds_that_failed(modifier: str) -> None:
    held_out = held_out_tasks(modifier, 40, 3)
    learned = training_tasks(modifier, 48, 3, held_out)
    failures = learned[::2]
    clusters = {task.id: place % 8 for place, task in enumerate(failures)}
    said: list[tuple[int, int]] = []
    rows = sibling_lessons(
        failures, clusters, 2, known={task.id for task in learned}, held_out=held_out, seed=3,
        progress=lambda done, total, note: said.append((done, total)),
    )  # fmt: skip
    tasks = [Task.from_json(row["task"]) for row in rows]
    ids = [task.id for task in tasks]
    assert len(set(ids)) == len(ids) and not set(ids) & {task.id for task in [*learned, *held_out]}
    assert all(verify(task, row["response"]).passed for task, row in zip(tasks, rows, strict=True))
    assert not any(task in NearDuplicates(held_out) for task in tasks)
    assert {task.split for task in tasks} == {"train"}
    failed, drawn = (Counter((task.family, task.difficulty) for task in group) for group in (failures, tasks))
    assert all(count <= 2 * failed[kind] for kind, count in drawn.items())
    assert said == sorted(said) and len(rows) <= said[-1][0] <= said[-1][1] == 2 * len(failures)
    assert len(tasks) >= len(failures), "finite families give what they have"
    for row in rows:
        alike = {clusters[t.id] for t in failures if t.family == row["task"]["family"]}
        assert row["cluster"] in alike, "a sibling stands for the pattern of a failure of its family"


def test_none_are_drawn_where_none_are_wanted() -> None:
    learned = training_tasks("automation", 8, 3, [])
    clusters = {task.id: 0 for task in learned}
    assert sibling_lessons(learned, clusters, 0, known=set(), held_out=[], seed=3) == []


def test_a_solution_that_its_verifier_does_not_accept_is_not_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = training_tasks("automation", 8, 3, [])
    clusters = {task.id: 0 for task in learned}
    for passed in (False, None):
        monkeypatch.setattr(
            siblings_module, "verify", lambda task, text, passed=passed: Verdict(passed, "not accepted")
        )
        assert sibling_lessons(learned, clusters, 2, known=set(), held_out=[], seed=3) == []


def test_solutions_are_verified_in_their_order_and_again_where_they_failed_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = training_tasks("automation", 60, 3, [])
    tried = Counter[str]()

    def sometimes(task: Task, text: str) -> Verdict:
        tried[task.id] += 1
        wrong, slow = tasks.index(task) % 7 == 0, tasks.index(task) % 5 == 0
        return Verdict(not wrong and not (slow and tried[task.id] == 1), "")

    monkeypatch.setattr(siblings_module, "verify", sometimes)
    assert list(siblings_module._solved(tasks)) == [task for at, task in enumerate(tasks) if at % 7]
