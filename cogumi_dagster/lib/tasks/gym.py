"""Families over reasoning-gym: its generators and its scorers, with prompts and worked solutions of ours.

Source: reasoning-gym 0.1.25 (Apache-2.0). The package takes 3 s to import, so it is imported on first use.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.tasks.answers import final_number
from cogumi_dagster.lib.tasks.base import Difficulty, Task, Verdict
from cogumi_dagster.lib.tasks.drawing import distinct, seed_number

Entry = Mapping[str, Any]
"""A row of reasoning-gym: ``question``, ``answer`` and ``metadata``."""
Worked = tuple[str, str]
"""The steps of a solution and its short answer, both of our own making."""


def read_number(response: str) -> str:
    """The final number as plain digits, which is what reasoning-gym's scorers expect."""
    number = final_number(response)
    return "" if number is None else f"{number.normalize():f}"


@dataclass(eq=False)
class GymFamily:
    """One dataset of reasoning-gym.

    ``levels`` are its configs; ``ask`` writes the prompt; ``work`` the steps and the answer, or None to pass
    over an entry; ``read`` finds the answer in a response; ``facts`` is the metadata that the scorer reads.
    """

    name: str
    domain: str
    dataset: str
    levels: Mapping[Difficulty, Mapping[str, Any]]
    ask: Callable[[Entry], str]
    work: Callable[[Entry, Difficulty], Worked | None]
    read: Callable[[str], str] = read_number
    facts: tuple[str, ...] = ()
    max_tokens: int = 160
    version: str = "1"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        entries = self._entries(20 * count + 200, seed_number(self.name, difficulty, seed), difficulty)
        return distinct(lambda: self._task(next(entries, None), difficulty), count)

    def verify(self, task: Task, response: str) -> Verdict:
        given = self.read(response)
        if not given:
            return Verdict(False, "no answer was given")
        score = float(_scorer(self.dataset).score_answer(given, task.payload))
        if score >= 1.0:
            return Verdict(True, "right", 1.0)
        return Verdict(False, f"the answer is {task.answer}, not {given[:80]}")

    def _entries(self, size: int, seed: int, difficulty: Difficulty) -> Iterator[Entry]:
        dataset = _create(self.dataset, size=size, seed=seed, **self.levels[difficulty])
        for index in range(size):
            yield dataset[index]

    def _task(self, entry: Entry | None, difficulty: Difficulty) -> Task | None:
        worked = self.work(entry, difficulty) if entry else None
        if entry is None or worked is None:
            return None
        steps, answer = worked
        metadata = {name: entry["metadata"][name] for name in self.facts}
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=self.ask(entry),
            payload={"question": entry["question"], "answer": entry["answer"], "metadata": metadata},
            answer=answer,
            solution=f"{steps}\nAnswer: {answer}",
            source=f"reasoning_gym.{self.dataset}",
        )


@cache
def _scorer(dataset: str) -> Any:
    return _create(dataset, size=1, seed=0)


def _create(dataset: str, **config: Any) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise CogumiError("the package reasoning-gym is missing", "pip install reasoning-gym") from None
    return reasoning_gym.create_dataset(dataset, **config)
