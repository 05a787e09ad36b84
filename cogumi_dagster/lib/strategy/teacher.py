"""Who attempts, reflects and distils: the exact solver offline, or any teacher of the catalogue.

The solver needs no attempts of its own: it watches the student try, and has its strategies written down beforehand, in
the order in which it proposes them. A teacher of the catalogue solves the problems itself, reads its own mistakes and
writes both the journal and the strategies; every call goes through the journal of calls and under the cap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, zip_longest
from typing import Protocol

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import Answered, answer_tasks, prompt_of, room_for
from cogumi_dagster.lib.inference import Completion, Engine
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.strategy.problems import StrategyFamily, classes_of, said_in
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.asking import OVER_BUDGET, TOO_LONG, Asker, Outcome, Request
from cogumi_dagster.lib.teaching.catalogue import MICROS, Teacher
from cogumi_dagster.lib.teaching.teach import chat_messages

SHOWN_MISTAKES, SHOWN_SUCCESSES = 6, 2
SHOWN_CHARACTERS, SHOWN_LOCALLY = 8000, 1600
"""Of all attempts, or all notes, together, to an API and to the local teacher, whose context is a thousand tokens."""
FAILED_FOR_GOOD = (TOO_LONG, "bad request", "in doubt")
"""Failures of a call that asking again does not mend: the attempt counts as no answer."""
LONGEST_STRATEGY = 2000
"""Characters a family. A longer text is no strategy that a small model could follow."""
STRATEGY_WORDS = 200
"""A family."""
WRITING_TOKENS = 512
"""Room for an entry of the journal (at most 120 words), and for a strategy as often as it has families."""
NO_TEXT = {"length": "cut off", "content_filter": "refused"}
"""Why an answer that ended so does not count."""

REFLECT = (
    "You are keeping a journal while you learn to solve a kind of problem. Below are problems that you have just "
    "answered, each with your answer and the verdict.\n\n{attempts}\n\n{score} In at most 120 words, write the journal "
    "entry: which mistakes recur, why, and what you will do otherwise. Only the entry."
)
DISTIL = (
    "This is a kind of problem:\n\n{example}\n\nYour journal so far:\n\n{notes}\n\n"
    "Your best strategy so far:\n\n{strategy}\n\n"
    "Write a better strategy: numbered steps that a far smaller model can execute one by one, writing down every "
    "intermediate result, with nothing left to be seen at a glance. General, about no single problem; at most "
    "{words} words. Only the strategy."
)


@dataclass(frozen=True)
class Distilled:
    """What came of the wish for a strategy."""

    text: str = ""
    """Empty where there is nothing new."""
    unusable: str = ""
    """Why the reply was no strategy; see ``JournalReport.unusable``."""


class StrategyTeacher(Protocol):
    """Attempts problems, and learns from how it went."""

    @property
    def name(self) -> str: ...

    @property
    def stand_in(self) -> bool: ...

    @property
    def usd(self) -> float:
        """What its answers have cost so far, whenever they were paid."""
        ...

    def attempt(self, tasks: Sequence[Task], strategy: str, progress: Progress = silent) -> list[Answered]:
        """Answers, judged, with the strategy (or none) before each problem."""
        ...

    def reflect(self, answers: Sequence[Answered]) -> str:
        """The journal's entry on a batch."""
        ...

    def distil(
        self, notes: Sequence[str], strategies: Sequence[str], best: int, score: float, examples: Sequence[Task]
    ) -> Distilled:
        """The next strategy. ``score`` is the balanced accuracy of the ``best`` of ``strategies`` so far, ``examples``
        has a problem of each family."""
        ...


@dataclass
class SolverTeacher:
    """The stand-in: the student attempts, rules reflect, and the family's written strategies come one after another."""

    engine: Engine
    family: StrategyFamily
    name: str = "solver"
    stand_in: bool = True
    usd: float = 0.0

    def attempt(self, tasks: Sequence[Task], strategy: str, progress: Progress = silent) -> list[Answered]:
        return answer_tasks(self.engine, tasks, before=strategy, progress=progress)

    def reflect(self, answers: Sequence[Answered]) -> str:
        closed = [answer for answer in answers if classes_of(answer.task)]
        wrong = [said_in(answer) for answer in closed if not answer.passed]
        said = [label for label in wrong if label]
        often = next((label for label in said if said.count(label) > len(said) / 2), "")
        lean = f"the student says {often} too often" if often else "the student errs both ways" if said else ""
        right = sum(answer.passed for answer in answers)
        note = "; ".join(part for part in (f"{right} of {len(answers)} right", lean) if part)
        note += f" and gives no verdict {wrong.count('')} times" if "" in wrong else ""
        return note + ("; it must write the steps down, one by one" if right < 0.75 * len(answers) else "")

    def distil(
        self, notes: Sequence[str], strategies: Sequence[str], best: int, score: float, examples: Sequence[Task]
    ) -> Distilled:
        left = self.family.strategies[len(strategies) :]
        return Distilled(left[0] if left else "")


@dataclass
class CatalogueTeacher:
    """A teacher that is asked: a provider's model, or the local one."""

    asker: Asker
    teacher: Teacher
    max_tokens: int
    """Of an answer, where its family does not need more."""
    usd: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def stand_in(self) -> bool:
        return self.teacher.stand_in

    def attempt(self, tasks: Sequence[Task], strategy: str, progress: Progress = silent) -> list[Answered]:
        prompts = [prompt_of(task, strategy) for task in tasks]
        room = max(self.max_tokens, *map(room_for, tasks))
        asked = self._ask(prompts, [task.id for task in tasks], [task.domain for task in tasks], room, progress)
        texts = [text for text, _ in asked]
        if len(tasks) > 1 and not any(texts) and not strategy:  # with one it may be the strategy's fault
            raise CogumiError(
                f"{self.name} answered none of {len(tasks)} problems: refused, cut off at {room} tokens, or too long",
                "see its calls in the log, or take another strategy.teacher",
            )
        return [
            Answered(task, Completion(text, "stop", 0, 0), verify(task, text))
            for task, text in zip(tasks, texts, strict=True)
        ]

    def reflect(self, answers: Sequence[Answered]) -> str:
        wrong = _of_all_kinds([answer for answer in answers if not answer.passed])[:SHOWN_MISTAKES]
        right = _of_all_kinds([answer for answer in answers if answer.passed])[:SHOWN_SUCCESSES]
        entries = [
            f"Problem: {a.task.prompt}\nYour answer: {a.completion.text[: self._room // 4]}\n"
            f"Verdict: {'right' if a.passed else f'wrong; the right answer is {a.task.answer}'}"
            for a in (*wrong, *right)
        ]
        shown = "\n\n".join(self._fitting(entries))
        score = f"{sum(answer.passed for answer in answers)} of {len(answers)} were right."
        prompt = REFLECT.format(attempts=shown, score=score)
        ((text, _),) = self._ask([prompt], ["reflection"], [answers[0].task.domain], WRITING_TOKENS)
        return text.strip()

    def distil(
        self, notes: Sequence[str], strategies: Sequence[str], best: int, score: float, examples: Sequence[Task]
    ) -> Distilled:
        listed = "\n".join(self._fitting([f"{number}. {note}" for number, note in enumerate(notes, 1)][::-1])[::-1])
        shown = "\n\n".join(self._fitting([task.prompt for task in examples]))
        known = f"{strategies[best]}\n\nBalanced accuracy with it: {score:.2f}." if strategies[best] else "none yet"
        parts = len(examples)
        prompt = DISTIL.format(example=shown, notes=listed, strategy=known, words=STRATEGY_WORDS * parts)
        ((reply, unusable),) = self._ask([prompt], ["strategy"], [examples[0].domain], WRITING_TOKENS * parts)
        text = reply.strip()
        if unusable or len(text) > LONGEST_STRATEGY * parts:
            return Distilled(unusable=unusable or "too long")
        return Distilled("" if text in strategies else text)

    @property
    def _room(self) -> int:
        return SHOWN_LOCALLY if self.teacher.provider == "local" else SHOWN_CHARACTERS

    def _fitting(self, entries: Sequence[str]) -> list[str]:
        """The first entries, as many as fit; of a first one that is too long its beginning."""
        totals = accumulate(map(len, entries))
        return [one for one, total in zip(entries, totals, strict=True) if total <= self._room] or [
            entry[: self._room] for entry in entries[:1]
        ]

    def _ask(
        self,
        prompts: Sequence[str],
        names: Sequence[str],
        domains: Sequence[str],
        max_tokens: int,
        progress: Progress = silent,
    ) -> list[tuple[str, str]]:
        """(Text, why there is none); an answer that failed for good (see ``FAILED_FOR_GOOD``; truncated, refused) is
        empty.

        Raises:
            CogumiError: the teacher cannot be asked or did not answer, or the budget is used up; the answers that
                came stay in the journal of calls.
        """
        requests = [
            Request(chat_messages(self.teacher, prompt), name, domain)
            for prompt, name, domain in zip(prompts, names, domains, strict=True)
        ]
        new = self.asker.unanswered(self.name, requests, max_tokens=max_tokens)
        if new and (why := self.asker.why_not(self.name)):
            raise CogumiError(
                f"the strategy's teacher {self.name} cannot be asked: {why}",
                f"set {self.teacher.api_key_env or 'its key'}, or take another strategy.teacher, such as solver",
            )
        outcomes = self.asker.ask_many(self.name, requests, max_tokens=max_tokens, progress=progress)
        self.usd += sum(outcome.micros for outcome in outcomes) / MICROS
        if unpaid := sum(outcome.failure in OVER_BUDGET for outcome in outcomes):
            raise self.asker.over_budget(unpaid, "the strategy's problems")
        if lost := [o.failure for o in outcomes if o.answer is None and o.failure not in FAILED_FOR_GOOD]:
            raise CogumiError(
                f"{self.name} gave no answer to {len(lost)} of {len(prompts)} prompts: {lost[0]}",
                "run again: the answers that came are kept",
                retryable=True,
            )
        return [_text_of(outcome) for outcome in outcomes]


def _text_of(outcome: Outcome) -> tuple[str, str]:
    """The text of an answer; where there is none, why."""
    answer = outcome.answer
    if answer is None:
        return "", outcome.failure
    why = NO_TEXT.get(answer.finish_reason, "" if answer.text.strip() else "empty")
    return "" if why else answer.text, why


def _of_all_kinds(answers: Sequence[Answered]) -> list[Answered]:
    """The same: families in turn, and of each its levels and right answers in turn, the hard ones first."""
    families: dict[str, dict[tuple[str, str], list[Answered]]] = {}
    for answer in reversed(answers):  # batches go from easy to hard
        task = answer.task
        kind = (task.difficulty, str(task.answer) if classes_of(task) else "")
        families.setdefault(task.family, {}).setdefault(kind, []).append(answer)
    return _in_turn([_in_turn(list(kinds.values())) for kinds in families.values()])


def _in_turn(groups: Sequence[Sequence[Answered]]) -> list[Answered]:
    """The first of each group, then the second of each, and so on."""
    return [answer for answer in chain.from_iterable(zip_longest(*groups)) if answer is not None]
