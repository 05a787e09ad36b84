"""Base against base + modifier on held-out tasks, served: repairs, keeps, and the double gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.evaluation.answers import Answered, accuracy, answer_tasks, by_family
from cogumi_dagster.lib.evaluation.statistics import SIGNIFICANCE, Proportion, mcnemar
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.modifiers.failures import modifier_tasks
from cogumi_dagster.lib.progress import Progress, silent


@dataclass(frozen=True)
class FamilyRow:
    family: str
    tasks: int
    base: float
    modified: float


@dataclass(frozen=True)
class ModifierReport:
    """Both on the same held-out tasks (split ``test``). The majority baseline of open answers is zero.

    The gate: McNemar's exact test finds more repairs than breaks (p < 0.05), which also excludes a
    regression beyond chance; ``repaired`` and ``kept`` carry the intervals of its two sides.
    """

    tasks: int
    split: str
    base: Proportion
    modified: Proportion
    repaired: Proportion
    kept: Proportion
    p_value: float
    net_gain: float
    improves: bool
    regresses: bool
    gate_passed: bool
    not_run: int
    families: tuple[FamilyRow, ...]


def evaluate_modifier(
    engine: Engine, modifier: str, out: Path, *, count: int, seed: int, progress: Progress = silent
) -> ModifierReport:
    """Answer ``count`` held-out tasks with and without the modifier; write both answers to answers.jsonl."""
    tasks = modifier_tasks(modifier, count, seed + 1, "test")

    def part(offset: int) -> Progress:
        return lambda done, total, note: progress(done + offset * total, 2 * total, note)

    base = answer_tasks(engine, tasks, progress=part(0))
    modified = answer_tasks(engine, tasks, adapter=modifier, progress=part(1))
    write_jsonl(
        out / "answers.jsonl",
        ({"base": b.to_json(), "modified": m.to_json()} for b, m in zip(base, modified, strict=True)),
    )
    return compare(base, modified, split="test")


def compare(base: Sequence[Answered], modified: Sequence[Answered], *, split: str) -> ModifierReport:
    """The figures of two lists of answers to the same tasks."""
    pairs = [
        (b, m)
        for b, m in zip(base, modified, strict=True)
        if b.verdict.passed is not None and m.verdict.passed is not None
    ]
    repaired = sum(not b.passed and m.passed for b, m in pairs)
    broken = sum(b.passed and not m.passed for b, m in pairs)
    failures = sum(not b.passed for b, _ in pairs)
    successes = len(pairs) - failures
    p_value = mcnemar(repaired, broken)
    improves = repaired > broken and p_value < SIGNIFICANCE
    regresses = broken > repaired and p_value < SIGNIFICANCE
    first: Mapping[str, Proportion] = by_family(base)
    second = by_family(modified)
    return ModifierReport(
        tasks=len(pairs),
        split=split,
        base=accuracy([b for b, _ in pairs]),
        modified=accuracy([m for _, m in pairs]),
        repaired=Proportion(repaired, failures),
        kept=Proportion(successes - broken, successes),
        p_value=p_value,
        net_gain=(repaired - broken) / max(1, len(pairs)),
        improves=improves,
        regresses=regresses,
        gate_passed=improves and not regresses,
        not_run=len(base) - len(pairs),
        families=tuple(
            FamilyRow(name, first[name].count, first[name].value, second[name].value) for name in sorted(first)
        ),
    )
