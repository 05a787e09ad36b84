"""The record of a pruning: one row a step, kept beside the checkpoint, with perplexity and score."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.prune import class_weights, zero_share
from cogumi_dagster.lib.evaluation.answers import accuracy, answer_tasks
from cogumi_dagster.lib.evaluation.plots import LinePlot
from cogumi_dagster.lib.evaluation.statistics import Proportion, report_json
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.tasks import FAMILIES, draw_tasks
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.training.student import save_checkpoint

SIDECAR = "pruning.json"
NOT_RUN = Proportion(0, 0)


@dataclass(frozen=True)
class PruningStep:
    """One step: shares of zeros, and perplexity and score before and after its recovery training.

    Step 0 is the unpruned parent. What was not measured is NaN, or a proportion of no cases.
    """

    step: int
    sparsity: float
    """Of all weights."""
    attention: float
    feed_forward: float
    embeddings: float
    perplexity: float
    perplexity_recovered: float
    score: Proportion
    score_recovered: Proportion
    mask_intact: bool
    """What was zero before the step is zero after its pruning, and what was zero then is zero at its end."""
    seconds: float

    def recovered(self, perplexity: float, score: Proportion, mask_intact: bool, seconds: float) -> "PruningStep":
        """With its recovery training added."""
        return replace(
            self,
            perplexity_recovered=perplexity,
            score_recovered=score,
            mask_intact=self.mask_intact and mask_intact,
            seconds=self.seconds + seconds,
        )

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "PruningStep":
        given: dict[str, Any] = {name: math.nan if value is None else value for name, value in row.items()}
        for name in ("score", "score_recovered"):
            given[name] = Proportion(row[name]["successes"], row[name]["count"])
        return cls(**given)


@dataclass(frozen=True)
class PruningRecord:
    """``pruned``: the classes that were pruned. ``tasks`` and ``seed``: the benchmark, to be repeated."""

    steps: tuple[PruningStep, ...]
    pruned: tuple[str, ...]
    tasks: int
    seed: int

    def save(self, folder: Path) -> None:
        (folder / SIDECAR).write_text(json.dumps(report_json(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "PruningRecord | None":
        """The record beside a checkpoint; None where nothing recorded how it was pruned."""
        if not (folder / SIDECAR).is_file():
            return None
        data = json.loads((folder / SIDECAR).read_text())
        steps = tuple(PruningStep.from_json(row) for row in data["steps"])
        return cls(steps, tuple(data["pruned"]), data["tasks"], data["seed"])


def measured(model: Any, step: int, perplexity: float, score: Proportion, intact: bool, seconds: float) -> PruningStep:
    """A row for the model as it is now, before any recovery."""
    shares = {name: zero_share(weights) for name, weights in class_weights(model).items()}
    return PruningStep(
        step=step,
        sparsity=zero_share(list(model.parameters())),
        perplexity=perplexity,
        perplexity_recovered=math.nan,
        score=score,
        score_recovered=NOT_RUN,
        mask_intact=intact,
        seconds=seconds,
        **shares,
    )


def benchmark_tasks(count: int, seed: int) -> list[Task]:
    """Tasks of the validation split, of every family that has an exact verifier, in equal parts."""
    return draw_tasks(list(FAMILIES), count, seed, "validation") if count else []


def score(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> Proportion:
    """Share of tasks that the model answers right, greedily, through llama.cpp in 16 bit."""
    if not tasks:
        return NOT_RUN
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, tokenizer, Path(folder) / "checkpoint")
        write_gguf(Path(folder) / "checkpoint", Path(folder) / "f16.gguf")
        engine = LlamaEngine(Path(folder) / "f16.gguf", slots=8)
        try:
            return accuracy(answer_tasks(engine, tasks))
        finally:
            engine.close()


def loss_curve(steps: Sequence[PruningStep]) -> LinePlot:
    """Loss against sparsity, before and after recovery: perplexity spans decades, its logarithm fits a plot."""
    pruned = [(row.sparsity, math.log(row.perplexity)) for row in steps]
    recovered = [
        (row.sparsity, math.log(row.perplexity_recovered)) for row in steps if not math.isnan(row.perplexity_recovered)
    ]
    series = {"pruned": pruned} | ({"after recovery": recovered} if recovered else {})
    return LinePlot("Held-out loss by sparsity", "share of zeros", "loss (nats a token)", series)
