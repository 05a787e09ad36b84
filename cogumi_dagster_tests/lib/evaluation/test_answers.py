from collections.abc import Callable
from typing import Any

from cogumi_dagster.lib.evaluation.answers import (
    MAX_TOKENS,
    Answered,
    accuracy,
    answer_tasks,
    by_family,
    machine_seconds,
    majority_of,
    room_for,
)
from cogumi_dagster.lib.evaluation.statistics import Proportion
from cogumi_dagster.lib.inference.base import Completion
from cogumi_dagster.lib.tasks import FAMILIES, draw_tasks
from cogumi_dagster.lib.tasks.base import Task, Verdict

TASKS = [Task("math", f"family{n % 2}", "easy", f"task {n}", answer=str(n)) for n in range(6)]


def judge(task: Task, response: str) -> Verdict:
    return Verdict(None, "not run") if response == "?" else Verdict(response == task.answer, "judged")


def test_machine_time_is_that_of_slots_that_run_side_by_side(scripted_engine: Callable[..., Any]) -> None:
    engine = scripted_engine(lambda adapter, prompt: "")
    took = [Answered(TASKS[0], Completion("", "stop", 1, 1, seconds=s), Verdict(True, "")) for s in (3, 1, 1, 1)]
    assert machine_seconds(engine, took) == 6
    engine.slots = 2
    assert machine_seconds(engine, took) == 3
    engine.slots = 8
    assert machine_seconds(engine, took) == 3


def test_every_answer_is_judged_by_its_own_task(scripted_engine: Callable[..., Any]) -> None:
    engine = scripted_engine(lambda adapter, prompt: {"task 0": "?", "task 1": "wrong"}.get(prompt, prompt[-1]), ("a",))
    seen: list[int] = []
    answers = answer_tasks(
        engine, TASKS, adapter="a", judge=judge, progress=lambda done, total, note: seen.append(done)
    )
    assert [answer.verdict.passed for answer in answers] == [None, False, True, True, True, True]
    assert [answer.passed for answer in answers] == [False, False, True, True, True, True]
    assert seen == [1, 2, 3, 4, 5, 6]
    assert engine.asked == [("a", task.prompt) for task in TASKS]
    assert (accuracy(answers).successes, accuracy(answers).count) == (4, 5), "what was not run does not count"
    assert {name: (p.successes, p.count) for name, p in by_family(answers).items()} == {
        "family0": (2, 2), "family1": (2, 3),
    }  # fmt: skip
    row = answers[0].to_json()
    assert row["passed"] is None and row["reason"] == "not run" and row["task"]["id"] == TASKS[0].id
    assert row["logprobs"] == [-0.1] * 10 and row["completion_tokens"] == 10


def test_the_verifiers_of_the_families_are_the_default(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]]
) -> None:
    tasks = draw_tasks(["scheduling"], 5, 0, "test")
    known = solutions(tasks)
    assert accuracy(answer_tasks(scripted_engine(lambda a, p: known[p]), tasks)).value == 1.0


def test_an_answer_has_the_room_that_its_family_needs() -> None:
    assert room_for(TASKS[0]) == MAX_TOKENS
    for name, family in FAMILIES.items():
        assert room_for(Task("x", name, "easy", "p")) == family.max_tokens


def test_the_commonest_answer_of_each_family_is_the_baseline() -> None:
    def tasks(family: str, *answers: str | None) -> list[Task]:
        return [Task("math", family, "easy", f"{family} {n}", answer=answer) for n, answer in enumerate(answers)]

    closed, open_ended = tasks("a", "YES", "YES", "NO"), tasks("b", None, None)
    assert majority_of([*closed, *tasks("c", "1", "2")]) == Proportion(2, 5), "of c none is common"
    assert majority_of([*closed, *open_ended]) == Proportion(2, 5) and majority_of(open_ended) == Proportion(0, 2)
