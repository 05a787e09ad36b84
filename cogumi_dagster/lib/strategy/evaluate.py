"""The four stages side by side: untrained student, student told the strategy, student with adapter, teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.evaluation.answers import Answered
from cogumi_dagster.lib.evaluation.statistics import (
    Estimate,
    Proportion,
    majority_baseline,
    mcnemar,
    mean_of_shares,
)  # fmt: skip
from cogumi_dagster.lib.inference import Completion, Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.strategy.journal import said_in
from cogumi_dagster.lib.strategy.problems import StrategyFamily, attempt
from cogumi_dagster.lib.tasks import verify

ADAPTER = "strategy"


@dataclass(frozen=True)
class StageRow:
    """One stage. Recall is per class; ``exact_traces`` is the share whose whole answer is the solver's."""

    stage: str
    problems: int
    accuracy: Proportion
    balanced_accuracy: Estimate
    recall_yes: Proportion
    recall_no: Proportion
    exact_traces: Proportion
    easy: Proportion
    medium: Proportion
    hard: Proportion


@dataclass(frozen=True)
class StrategyEvaluation:
    """All stages on the same class-balanced problems of split ``test``, served."""

    family: str
    split: str
    problems: int
    majority: Proportion
    stages: tuple[StageRow, ...]
    adapter_balanced_accuracy: float
    untrained_balanced_accuracy: float
    p_value: float


def evaluate_strategy(
    engine: Engine, family: StrategyFamily, out: Path, *, count: int, seed: int, progress: Progress = silent
) -> StrategyEvaluation:
    """``engine`` has the trained adapter loaded under the name ``strategy``."""
    tasks = family.problems(count, seed + 13, "test")

    def part(index: int) -> Progress:
        return lambda done, total, note: progress(done + index * total, 3 * total, note)

    stages: dict[str, Sequence[Answered]] = {
        "untrained student": attempt(engine, tasks, progress=part(0)),
        "student, strategy in the prompt": attempt(engine, tasks, strategy=family.strategies[-1], progress=part(1)),
        "student with adapter": attempt(engine, tasks, adapter=ADAPTER, progress=part(2)),
    }
    rows = [_row(name, answers) for name, answers in stages.items()]
    solved = [Answered(t, Completion(t.solution or "", "stop", 0, 0), verify(t, t.solution or "")) for t in tasks]
    teacher = _row("teacher (solver, exact)", solved)
    untrained, trained = stages["untrained student"], stages["student with adapter"]
    fixed = sum(not a.passed and b.passed for a, b in zip(untrained, trained, strict=True))
    broke = sum(a.passed and not b.passed for a, b in zip(untrained, trained, strict=True))
    write_jsonl(out / "answers.jsonl", ({"stage": n, **a.to_json()} for n, answers in stages.items() for a in answers))
    return StrategyEvaluation(
        family=family.name,
        split="test",
        problems=len(tasks),
        majority=majority_baseline([task.answer for task in tasks]),
        stages=(*rows, teacher),
        adapter_balanced_accuracy=rows[2].balanced_accuracy.value,
        untrained_balanced_accuracy=rows[0].balanced_accuracy.value,
        p_value=mcnemar(fixed, broke),
    )


def _row(stage: str, answers: Sequence[Answered]) -> StageRow:
    labels = [str(answer.task.answer) for answer in answers]
    said = [said_in(answer) for answer in answers]

    def share(chosen: list[bool]) -> Proportion:
        return Proportion(sum(chosen), len(chosen))

    def recall(label: str) -> Proportion:
        return share([guess == label for truth, guess in zip(labels, said, strict=True) if truth == label])

    def level(name: str) -> Proportion:
        return share([answer.passed for answer in answers if answer.task.difficulty == name])

    exact = [answer.completion.text.strip() == (answer.task.solution or "").strip() for answer in answers]
    passed = share([answer.passed for answer in answers])
    yes, no = recall("YES"), recall("NO")
    return StageRow(
        stage, len(answers), passed, mean_of_shares([yes, no]), yes, no, share(exact),
        level("easy"), level("medium"), level("hard"),
    )  # fmt: skip
