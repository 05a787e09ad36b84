"""The learned strategy as training data: its text, and worked traces of it on class-balanced problems."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.strategy.problems import TO_LEARN, StrategyFamily, classes_of
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import Task


@dataclass(frozen=True)
class StrategyReport:
    family: str
    strategy: str
    journal_best: int
    traces: int
    classes: dict[str, int]
    """Traces by family and answer, where a family's answers are closed."""
    imbalance: float | None
    """The largest difference between a family's classes, as a share of its traces. None where answers are open."""
    by_difficulty: dict[str, int]
    teacher: str
    stand_in: bool


def learn_strategy(journal: Path, family: StrategyFamily, out: Path, *, traces: int, seed: int) -> StrategyReport:
    """Write strategy.json and traces.jsonl.

    The traces execute the teacher's last strategy, whatever the journal found to help a prompt most:
    the untrained student cannot follow any (that is what the adapter is for), the teacher can.

    Raises:
        CogumiError: the family's verifier rejects a trace of its own solver.
    """
    best = int(json.loads((journal / "strategies.json").read_text())["best"])
    tasks = family.problems(traces, seed + 7, "train", TO_LEARN)
    for task in tasks:
        if task.solution is None or verify(task, task.solution).passed is not True:
            raise CogumiError(
                f"the verifier of {family.name} rejects its own solver on task {task.id}", "mend the family"
            )
    write_jsonl(out / "traces.jsonl", (task.to_json() for task in tasks))
    (out / "strategy.json").write_text(json.dumps({"family": family.name, "text": family.strategies[-1]}, indent=1))
    levels = [task.difficulty for task in tasks]
    return StrategyReport(
        family=family.name,
        strategy=family.strategies[-1],
        journal_best=best,
        traces=len(tasks),
        classes={f"{name}: {label}": count for (name, label), count in sorted(_classes(tasks).items())},
        imbalance=_imbalance(tasks),
        by_difficulty={str(level): levels.count(level) for level in sorted(set(levels))},
        teacher="solver",
        stand_in=True,
    )


def _classes(tasks: Sequence[Task]) -> Counter[tuple[str, str]]:
    return Counter((task.family, str(task.answer)) for task in tasks if classes_of(task))


def _imbalance(tasks: Sequence[Task]) -> float | None:
    found = _classes(tasks)
    differences = []
    for family in {name for name, _ in found}:
        counts = [count for (name, _), count in found.items() if name == family]
        differences.append((max(counts) - (min(counts) if len(counts) > 1 else 0)) / sum(counts))
    return max(differences, default=None)
