"""The learned strategy as training data: its text, and worked traces of it on class-balanced problems."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import majority_of
from cogumi_dagster.lib.evaluation.statistics import Proportion
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, in_parts, silent
from cogumi_dagster.lib.strategy.problems import StrategyFamily, classes_of, refuse_unjudged
from cogumi_dagster.lib.strategy.teacher import StrategyTeacher
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import Task

STRATEGY_FILE = "strategy.json"
TRIED_FIRST = 50
"""Traces that are asked for before the others."""
FEWEST_WORDS = 8
"""Of a teacher's answer that is to be a trace: a bare one is right by chance as often as not, and teaches nothing."""


@dataclass(frozen=True)
class StrategyReport:
    family: str
    strategy: str
    journal_best: int
    """The version that did best there, and not what is taught where it has no text."""
    traces: int
    wanted: int
    """Traces that were asked for: a family with too few problems for them has fewer, none of them rejected."""
    rejected: int
    """Answers of the teacher that its verifier did not accept, or that show no steps."""
    classes: dict[str, int]
    """Traces by family and answer, where a family's answers are closed."""
    imbalance: float
    """Share of traces by which classes differ in number, or that repeat the commonest open answer; the worst family."""
    by_difficulty: dict[str, int]
    teacher: str
    stand_in: bool
    usd: float
    """What the teacher's answers cost, those of its journal included."""


def learn_strategy(
    journal: Path,
    family: StrategyFamily,
    out: Path,
    *,
    traces: int,
    apart: Sequence[Task] = (),
    teacher: StrategyTeacher | None = None,
    seed: int,
    progress: Progress = silent,
) -> StrategyReport:
    """Write ``STRATEGY_FILE`` and traces.jsonl, on training problems balanced over their classes, none with a trace of
    ``apart``.

    Without ``teacher`` the solver writes the traces. They execute its last strategy, whatever the journal found to help
    a prompt most: the untrained student cannot follow any (that is what the adapter is for). A ``teacher`` executes the
    strategy that did best in its journal (where none helped it, still the best of them), and what the verifier accepts
    becomes a trace, unless it is a bare answer.

    Raises:
        CogumiError: the family's verifier cannot run, rejects a trace of its own solver, or so many of the teacher's
            that always giving the commonest answer would do as well; the teacher's journal has no strategy.
    """
    kept = json.loads((journal / "strategies.json").read_text())
    tasks = family.lessons(traces, seed, apart)
    drawn = len(tasks)
    refuse_unjudged(tasks)
    if teacher is None:
        text = family.strategies[-1]
        rows = [task.to_json() for task in tasks]
        for task in tasks:
            if task.solution is None:
                raise CogumiError(
                    f"{family.name} has no solver whose traces could be taught", "name a model as strategy.teacher"
                )
            if not verify(task, task.solution).passed:
                raise CogumiError(
                    f"the verifier of {family.name} rejects its own solver on task {task.id}", "mend the family"
                )
    else:
        text = kept["strategies"][kept["taught"]]["text"]
        if not text:
            raise CogumiError(
                f"there is no strategy for {family.name} in the journal of {teacher.name}",
                "look at its journal (strategy_journal), raise strategy.journal_batches, or take another "
                "strategy.teacher",
            )
        first = set(Random(seed).sample(range(drawn), min(TRIED_FIRST, drawn)))
        parts = [[task for place, task in enumerate(tasks) if (place in first) is now] for now in (True, False)]
        answers, asked, shown = [], 0, in_parts(progress, drawn)
        for part in filter(None, parts):  # a teacher that cannot do it is found out before all is paid for
            asked += len(part)
            attempted = teacher.attempt(part, text, shown(len(part)))
            answers += [a for a in attempted if a.passed and len(a.completion.text.split()) >= FEWEST_WORDS]
            accepted, majority = Proportion(len(answers), asked), majority_of(tasks)
            if not answers or not accepted.interval[0 if asked == drawn else 1] > majority.value:
                raise CogumiError(
                    f"the verifier of {family.name} accepts {len(answers)} of {asked} traces of {teacher.name}, no "
                    f"more than always giving the commonest answer would bring ({majority.value:.0%})",
                    "look at its journal (strategy_journal), or take another strategy.teacher",
                )
        tasks = [answer.task for answer in answers]
        rows = [{**answer.task.to_json(), "solution": answer.completion.text} for answer in answers]
    write_jsonl(out / "traces.jsonl", rows)
    (out / STRATEGY_FILE).write_text(json.dumps({"family": family.name, "text": text}, indent=1))
    levels = [task.difficulty for task in tasks]
    return StrategyReport(
        family=family.name,
        strategy=text,
        journal_best=int(kept["best"]),
        traces=len(tasks),
        wanted=traces,
        rejected=drawn - len(tasks),
        classes={f"{name}: {label}": count for (name, label), count in sorted(_classes(tasks).items())},
        imbalance=_imbalance(tasks),
        by_difficulty={str(level): levels.count(level) for level in sorted(set(levels))},
        teacher=teacher.name if teacher else "solver",
        stand_in=teacher.stand_in if teacher else True,
        usd=float(kept.get("usd", 0.0)) + (teacher.usd if teacher else 0.0),
    )


def _classes(tasks: Sequence[Task]) -> Counter[tuple[str, str]]:
    return Counter((task.family, str(task.answer)) for task in tasks if classes_of(task))


def _imbalance(tasks: Sequence[Task]) -> float:
    def of(family: Sequence[Task]) -> float:
        counts = Counter(task.answer or task.id for task in family)
        fewest = min((counts[label] for label in classes_of(family[0])), default=1)
        return (max(counts.values()) - fewest) / len(family)

    return max(of([task for task in tasks if task.family == name]) for name in {task.family for task in tasks})
