"""The study's loop: attempt a batch, see the verdicts, write a journal entry, distil a strategy, apply it.

Offline the exact solver is the teacher: its strategies are written down here, in the order in which
it proposes them, and its worked traces are exact. The attempts, verdicts and the stop are real.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import Answered
from cogumi_dagster.lib.evaluation.statistics import Estimate, Proportion, majority_baseline, mean_of_shares
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.strategy.problems import StrategyFamily, attempt, classes_of, said_in


@dataclass(frozen=True)
class JournalEntry:
    """One batch: which strategy was in the prompt, how it went, and what the teacher concluded."""

    batch: int
    strategy: int
    problems: int
    accuracy: Proportion
    balanced_accuracy: float
    majority: Proportion
    wrong: dict[str, int]
    """Wrong answers by what was said."""
    unparsed: int
    note: str


@dataclass(frozen=True)
class JournalReport:
    family: str
    teacher: str
    stand_in: bool
    entries: tuple[JournalEntry, ...]
    strategies: int
    best_strategy: int
    best_balanced_accuracy: float


def keep_journal(
    engine: Engine,
    family: StrategyFamily,
    out: Path,
    *,
    batches: int,
    problems: int,
    seed: int,
    progress: Progress = silent,
) -> JournalReport:
    """Run ``batches`` batches of fresh class-balanced training problems; stop early when a strategy no longer helps.

    Writes journal.jsonl and strategies.json (texts, and which did best).
    """
    entries: list[JournalEntry] = []
    scores: dict[int, list[float]] = {}
    current = 0
    for batch in range(batches):
        tasks = family.problems(problems, seed + 101 * batch, "train")
        answers = attempt(engine, tasks, strategy=family.strategies[current])
        entry = _entry(batch, current, answers)
        entries.append(entry)
        scores.setdefault(current, []).append(entry.balanced_accuracy)
        progress(batch + 1, batches, f"balanced accuracy {entry.balanced_accuracy:.2f} with strategy {current}")
        if current + 1 < len(family.strategies):
            current += 1
        elif len(scores[current]) > 1 and scores[current][-1] <= max(scores[current][:-1]):
            break
    means = {version: sum(values) / len(values) for version, values in scores.items()}
    best = max(means, key=lambda version: (means[version], version))
    write_jsonl(out / "journal.jsonl", (_row(entry) for entry in entries))
    texts = [{"version": version, "text": text} for version, text in enumerate(family.strategies)]
    (out / "strategies.json").write_text(json.dumps({"best": best, "strategies": texts}, indent=1))
    return JournalReport(family.name, "solver", True, tuple(entries), len(means), best, means[best])


def _entry(batch: int, strategy: int, answers: Sequence[Answered]) -> JournalEntry:
    labels = [str(answer.task.answer) for answer in answers]
    closed = [answer for answer in answers if classes_of(answer.task)]
    if closed and len({str(answer.task.answer) for answer in closed}) < 2:
        raise CogumiError("a batch of problems has one class only", "raise strategy.batch_problems")
    wrong = Counter(said_in(answer) for answer in closed if not answer.passed)
    unparsed = wrong.pop("", 0)
    balanced = balanced_accuracy(answers).value
    often = [label for label in wrong if wrong[label] > sum(wrong.values()) / 2]
    lean = f"says {often[0]} too often" if often else "errs both ways" if wrong else ""
    right = _share([answer.passed for answer in answers])
    note = "; the student ".join(part for part in (f"{right.successes} of {right.count} right", lean) if part)
    note += f" and gives no verdict {unparsed} times" if unparsed else ""
    note += "; it must write the steps down, one by one" if balanced < 0.75 else ""
    return JournalEntry(
        batch, strategy, len(answers), right, balanced, majority_baseline(labels), dict(wrong), unparsed, note
    )


def balanced_accuracy(answers: Sequence[Answered]) -> Estimate:
    """Mean of the recalls of each family's classes; a family of open answers counts as one class."""
    groups: dict[tuple[str, str], list[bool]] = {}
    for answer in answers:
        label = str(answer.task.answer) if classes_of(answer.task) else ""
        groups.setdefault((answer.task.family, label), []).append(answer.passed)
    return mean_of_shares([_share(passed) for passed in groups.values()])


def _share(passed: Sequence[bool]) -> Proportion:
    return Proportion(sum(passed), len(passed))


def _row(entry: JournalEntry) -> dict[str, object]:
    from cogumi_dagster.lib.evaluation.statistics import report_json

    return report_json(entry)
