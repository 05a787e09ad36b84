"""Ask the engine tasks and let their verifiers judge: the one way in which anything here is scored."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.evaluation.statistics import Proportion, majority_baseline
from cogumi_dagster.lib.inference import Completion, Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import FAMILIES, judged, verify
from cogumi_dagster.lib.tasks.base import Task, Verdict

MAX_TOKENS = 192
"""Of an answer to a task that no family speaks for."""


@dataclass(frozen=True)
class Answered:
    """One task with one answer and the verifier's word on it."""

    task: Task
    completion: Completion
    verdict: Verdict

    @property
    def passed(self) -> bool:
        return self.verdict.passed is True

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task.to_json(),
            "response": self.completion.text,
            "passed": self.verdict.passed,
            "reason": self.verdict.reason,
            "finish_reason": self.completion.finish_reason,
            "completion_tokens": self.completion.completion_tokens,
            "logprobs": [round(value, 4) for value in self.completion.logprobs],
        }


def prompt_of(task: Task, before: str = "") -> str:
    """The task's prompt, behind a text (such as a strategy) where one is given."""
    return f"{before}\n\n{task.prompt}" if before else task.prompt


def conversation(task: Task, before: str = "") -> list[Message]:
    return [{"role": "user", "content": prompt_of(task, before)}]


def room_for(task: Task) -> int:
    """Tokens that an answer to this task takes at most, if it is as the solver's; an engine may give more."""
    family = FAMILIES.get(task.family)
    return family.max_tokens if family else MAX_TOKENS


def answer_tasks(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    before: str = "",
    adapter: str | None = None,
    judge: Callable[[Task, str], Verdict] = verify,
    logprobs: bool = False,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    room: int | None = None,
    progress: Progress = silent,
) -> list[Answered]:
    """Judged answers to all tasks, greedy unless ``temperature`` is given. A verdict of None ("not run") stays; an
    answer that was cut off is wrong, whatever it says so far.

    ``temperature`` and ``seed`` are of all tasks or of each; ``before`` is put before every prompt (see ``prompt_of``);
    ``room`` is in tokens, each family's own unless given.
    """
    completions = engine.chat_many(
        [conversation(task, before) for task in tasks],
        adapter=adapter,
        max_tokens=[room or room_for(task) for task in tasks],
        temperature=temperature,
        seed=seed,
        logprobs=logprobs,
        progress=progress,
    )
    return [
        Answered(task, completion, judged(task, completion, judge))
        for task, completion in zip(tasks, completions, strict=True)
    ]


def machine_seconds(engine: Engine, answers: Sequence[Answered]) -> float:
    """How long the engine takes for these answers in a row, also where some were kept of an earlier run: each begins
    when a slot is free."""
    ends = [0.0] * engine.slots
    for answer in answers:
        heapq.heapreplace(ends, ends[0] + answer.completion.seconds)
    return max(ends)


def accuracy(answers: Sequence[Answered]) -> Proportion:
    """Passed of judged; what was not run does not count. The interval is over kinds of tasks."""
    judged = [answer for answer in answers if answer.verdict.passed is not None]
    return share_of(judged, [answer.passed for answer in judged])


def share_of(answers: Sequence[Answered], flags: Sequence[bool]) -> Proportion:
    """The share of ``answers`` with a flag. The interval is over kinds of tasks."""
    return Proportion.of(flags, [kind_of(answer.task) for answer in answers])


def kind_of(task: Task) -> str:
    """What tasks that come out right or wrong together have in common; of most only their own name."""
    return task.kind or task.id


def majority_of(tasks: Sequence[Task]) -> Proportion:
    """What giving each family's commonest answer gets, where one comes more than once: among answers that all differ
    none is common, and where a task has no short answer nothing is."""
    answers: dict[str, list[str]] = {}
    for task in tasks:
        if task.answer is not None:
            answers.setdefault(task.family, []).append(task.answer)
    commonest = [majority_baseline(known).successes for known in answers.values()]
    return Proportion(sum(count for count in commonest if count > 1), len(tasks))


def discordant(first: Sequence[Answered], second: Sequence[Answered]) -> tuple[int, int]:
    """How many of the same tasks only the first answered right, and only the second."""
    pairs = [(a.passed, b.passed) for a, b in zip(first, second, strict=True)]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def by_family(answers: Sequence[Answered]) -> Mapping[str, Proportion]:
    names = sorted({answer.task.family for answer in answers})
    return {name: accuracy([answer for answer in answers if answer.task.family == name]) for name in names}
