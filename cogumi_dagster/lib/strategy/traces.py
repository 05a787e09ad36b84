"""The learned strategy as training data: its text, and worked traces of it on class-balanced problems."""

import json
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.strategy.problems import TO_LEARN, StrategyFamily
from cogumi_dagster.lib.tasks import verify


@dataclass(frozen=True)
class StrategyReport:
    family: str
    strategy: str
    journal_best: int
    traces: int
    yes: int
    no: int
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
        yes=sum(task.answer == "YES" for task in tasks),
        no=sum(task.answer == "NO" for task in tasks),
        by_difficulty={str(level): levels.count(level) for level in sorted(set(levels))},
        teacher="solver",
        stand_in=True,
    )
