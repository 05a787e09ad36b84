"""One adapter for all families of the strategy study beside each family's own, on the same problems."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.artifacts import ArtifactRef
from cogumi_dagster.lib.evaluation.statistics import PairedDifference, Proportion, paired_difference
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.strategy.evaluate import ANSWERS_FILE, SUITES
from cogumi_dagster.lib.strategy.problems import strategy_family


@dataclass(frozen=True)
class Compared:
    """One family: the problems that both adapters answered, and ``own`` less ``one`` on them."""

    family: str
    own: Proportion
    one: Proportion
    difference: PairedDifference
    own_traces: int
    one_traces: int
    """Of this family, in the training of each."""
    own_steps: int | None
    one_steps: int | None
    """Of the training of each, where its report is there."""


def one_for_all(refs: Sequence[ArtifactRef]) -> list[Compared]:
    """Each family whose own adapter and the one for all were evaluated; none without the one for all."""
    made = {(ref.manifest.asset, ref.manifest.partition): ref for ref in refs}
    whole = made.get(("strategy_evaluation", "all"))
    return list(_compared(made, whole.path)) if whole else []


def _compared(made: dict[tuple[str, str | None], ArtifactRef], whole: Path) -> Iterator[Compared]:
    taken = _passed(whole)
    for part in strategy_family("all").each():
        evaluated = made.get(("strategy_evaluation", part.name))
        if evaluated is None:
            continue
        own = _passed(evaluated.path)
        both = [(passed, taken[task]) for task, passed in own.items() if task in taken]
        if both:
            first, second = zip(*both, strict=True)
            counts = [_traces(made.get(("learned_strategy", name)), part.name) for name in (part.name, "all")]
            steps = [_steps(made.get(("strategy_adapter", name))) for name in (part.name, "all")]
            difference = paired_difference(first, second, seed=0)
            yield Compared(part.name, Proportion.of(first), Proportion.of(second), difference, *counts, *steps)


def _passed(folder: Path) -> dict[str, bool]:
    """Of the answers to suites: problem -> whether the verifier accepted it. Empty where the file is not here."""
    path = folder / ANSWERS_FILE
    rows = read_jsonl(path) if path.is_file() else []
    return {row["task"]["id"]: row["passed"] is True for row in rows if row["stage"] == SUITES}


def _traces(learned: ArtifactRef | None, family: str) -> int:
    path = learned.path / "traces.jsonl" if learned else None
    return sum(row["family"] == family for row in read_jsonl(path)) if path and path.is_file() else 0


def _steps(adapter: ArtifactRef | None) -> int | None:
    return adapter.manifest.metrics["report"]["steps"] if adapter else None
