"""The study's loop: attempt a batch, see the verdicts, write a journal entry, distil a strategy, apply it.

Offline the exact solver is the teacher: its strategies are the family's, in the order in which it
proposes them, and its worked traces are exact. The attempts, verdicts and the stop are real.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.evaluation.answers import Answered, accuracy, majority_of
from cogumi_dagster.lib.evaluation.statistics import (
    Estimate,
    Proportion,
    mean_of_shares,
    report_json,
)
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.strategy.problems import StrategyFamily, classes_of, refuse_too_few, refuse_unjudged, said_in
from cogumi_dagster.lib.strategy.teacher import StrategyTeacher
from cogumi_dagster.lib.tasks.base import Task

PATIENCE = 3
"""Strategies without a new best after which a teacher is done."""


@dataclass(frozen=True)
class JournalEntry:
    """One batch: which strategy was in the prompt, how it went, and what the teacher concluded."""

    batch: int
    strategy: int
    problems: int
    accuracy: Proportion
    balanced_accuracy: Estimate
    majority: Proportion
    wrong: dict[str, int]
    """Wrong answers by what was said."""
    unparsed: int
    note: str


@dataclass(frozen=True)
class StrategyVersion:
    """One strategy as it was tried. ``balanced_accuracy`` is over all of its batches; each has problems of its own."""

    version: int
    batches: int
    balanced_accuracy: Estimate
    text: str


@dataclass(frozen=True)
class JournalReport:
    family: str
    teacher: str
    stand_in: bool
    entries: tuple[JournalEntry, ...]
    versions: tuple[StrategyVersion, ...]
    unusable: dict[str, int]
    """The teacher's replies that were to be a strategy and are none, by why: cut off, refused, too long,
    empty, or how the call failed."""
    usd: float
    """What the teacher's answers cost."""
    strategies: int
    best_strategy: int
    """Of those that did best, the first that is one: a single batch tells close ones not apart."""
    best_balanced_accuracy: Estimate
    best_text: str


def keep_journal(
    teacher: StrategyTeacher,
    family: StrategyFamily,
    out: Path,
    *,
    batches: int,
    problems: int,
    distil_every: int = 1,
    seed: int,
    progress: Progress = silent,
) -> JournalReport:
    """Run at most ``batches`` batches of fresh training problems, with a new strategy after every ``distil_every``,
    but none after the last, which nothing would try.

    It ends early when the strategies no longer help: nothing new comes and the last one has been tried twice without
    gain, or ``PATIENCE`` strategies long no batch was better than the best before them. A reply that is no strategy
    (see ``JournalReport.unusable``) is not nothing new: it goes on with the last one, until ``PATIENCE`` were none.
    Writes journal.jsonl and strategies.json (texts, which did best, and which of those that are one, to be taught).

    Raises:
        CogumiError: a batch has too few problems, or answers cannot be judged; what the teacher raises.
    """
    entries: list[JournalEntry] = []
    strategies = [""]
    answered: dict[int, list[Answered]] = {}
    unusable: Counter[str] = Counter()
    for batch in range(batches):
        current = len(strategies) - 1
        tasks = family.problems(problems, seed + 101 * batch, "train")
        refuse_too_few(tasks, problems, "strategy.batch_problems")
        refuse_unjudged(tasks)
        answers = teacher.attempt(tasks, strategies[current])
        entry = _entry(batch, current, answers, teacher.reflect(answers))
        entries.append(entry)
        answered.setdefault(current, []).extend(answers)
        progress(batch + 1, batches, f"balanced accuracy {entry.balanced_accuracy.value:.2f} with strategy {current}")
        if (batch + 1) % distil_every or batch + 1 == batches:
            continue
        if _no_longer_helps(entries, PATIENCE * distil_every):
            break
        examples = list({task.family: task for task in tasks}.values())
        best = _best(answered)
        new = teacher.distil(
            [entry.note for entry in entries], strategies, best, balanced_accuracy(answered[best]).value, examples
        )
        *before, last = (one.balanced_accuracy.value for one in entries if one.strategy == current)
        if new.text:
            strategies.append(new.text)
        elif new.unusable:
            unusable[new.unusable] += 1
            if unusable.total() == PATIENCE:
                break
        elif before and last <= max(before):
            break
    tried = {version: balanced_accuracy(answers) for version, answers in answered.items()}
    best = _best(answered)
    write_jsonl(out / "journal.jsonl", (report_json(entry) for entry in entries))
    texts = [{"version": version, "text": text} for version, text in enumerate(strategies)]
    kept = {
        "best": best,
        "taught": _best({version: known for version, known in answered.items() if version} or answered),
        "teacher": teacher.name,
        "stand_in": teacher.stand_in,
        "usd": teacher.usd,
        "strategies": texts,
    }
    (out / "strategies.json").write_text(json.dumps(kept, indent=1))
    batches_of = Counter(entry.strategy for entry in entries)
    versions = tuple(StrategyVersion(v, batches_of[v], mean, strategies[v]) for v, mean in tried.items())
    return JournalReport(
        family.name, teacher.name, teacher.stand_in, tuple(entries), versions, dict(unusable), teacher.usd,
        len(tried), best, tried[best], strategies[best],
    )  # fmt: skip


def _no_longer_helps(entries: Sequence[JournalEntry], patience: int) -> bool:
    """Whether the last ``patience`` batches, all with a strategy, are no better than the best before them."""
    scores = [entry.balanced_accuracy.value for entry in entries]
    tried = sum(entry.strategy > 0 for entry in entries)
    return min(tried, len(scores) - 1) >= patience and max(scores[-patience:]) <= max(scores[:-patience])


def _best(answered: Mapping[int, Sequence[Answered]]) -> int:
    """The version of the best balanced accuracy; of equal ones the first that has a text (0 has none)."""
    return max(answered, key=lambda version: (balanced_accuracy(answered[version]).value, version > 0, -version))


def _entry(batch: int, strategy: int, answers: Sequence[Answered], note: str) -> JournalEntry:
    closed = [answer for answer in answers if classes_of(answer.task)]
    wrong = Counter(said_in(answer) for answer in closed if not answer.passed)
    unparsed = wrong.pop("", 0)
    majority = majority_of([answer.task for answer in answers])
    return JournalEntry(
        batch,
        strategy,
        len(answers),
        accuracy(answers),
        balanced_accuracy(answers),
        majority,
        dict(wrong),
        unparsed,
        note,
    )


def balanced_accuracy(answers: Sequence[Answered]) -> Estimate:
    """Mean of the recalls of each family's classes; a family of open answers counts as one class."""
    groups: dict[tuple[str, str], list[Answered]] = {}
    for answer in answers:
        label = str(answer.task.answer) if classes_of(answer.task) else ""
        groups.setdefault((answer.task.family, label), []).append(answer)
    return mean_of_shares([accuracy(group) for group in groups.values()])


def constant_baseline(tasks: Sequence[Task]) -> float:
    """The balanced accuracy of always giving each family's commonest answer: one class in so many is always right."""
    families: dict[str, list[Task]] = {}
    for task in tasks:
        families.setdefault(task.family, []).append(task)
    shares: list[float] = []
    for group in families.values():
        if classes_of(group[0]):
            shares += [1.0, *[0.0] * (len({task.answer for task in group}) - 1)]
        else:
            shares.append(majority_of(group).value)
    return sum(shares) / len(shares)
