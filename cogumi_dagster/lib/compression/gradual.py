"""Prune to the profile's targets, at once or over a schedule with recovery training between the steps."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.compressor import (
    Calibration,
    calibration_set,
    load_sound,
    round_weights,
    save_rounded,
)  # fmt: skip
from cogumi_dagster.lib.compression.prune import Targets, prune_model, require_prunable, steps_of
from cogumi_dagster.lib.compression.pruning_steps import (
    PruningRecord,
    PruningStep,
    benchmark_tasks,
    loss_curve,
    measured,
    score,
)  # fmt: skip
from cogumi_dagster.lib.compression.recover import prunable_weights, train_masked
from cogumi_dagster.lib.evaluation.plots import LinePlot
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.resume import newest_step, save_step
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of


@dataclass(frozen=True)
class PruningReport:
    """Zeros by layer class (share of weights), and perplexity on the held-out answers before and after.

    ``pruning`` has a row for the parent and one for each step; the last step's recovery is ``recovered_checkpoint``.
    """

    method: str
    mask_structure: str
    sparsity: float
    sparsity_attention: float
    sparsity_feed_forward: float
    sparsity_embeddings: float
    sparsity_missing: float
    """Largest shortfall of a class from what was asked."""
    masks_intact: bool
    """After no step was anything that an earlier step had zeroed other than zero."""
    zeros: int
    parameters: int
    calibration_samples: int
    calibration_tokens: dict[str, int]
    """By group (domain) of the examples that they are of."""
    perplexity_before: float
    perplexity_after: float
    perplexity_tokens: int
    resumed_from: int
    """Steps that an earlier, killed run had finished."""
    pruning: tuple[PruningStep, ...]
    loss_by_sparsity: LinePlot


def prune(
    checkpoint: Path,
    calibration: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    config: PruningConfig,
    *,
    scratch: Path,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> PruningReport:
    """Write a pruned copy of ``checkpoint`` (see ``kept_in``), with its record beside it.

    Each step of the schedule prunes further, then trains what is left with the unpruned parent as teacher; the last
    step only prunes. ``scratch`` keeps the newest finished step, from which a killed run goes on.

    Raises:
        CogumiError: an unsound checkpoint, a calibration set that is too small, a pattern or schedule that does not
            fit the model.
    """
    parent, tokenizer = load_sound(checkpoint)
    require_prunable(parent, config)
    data = None
    if config.method != "magnitude":
        data = calibration_set(tokenizer, calibration, config.calibration_samples, config.calibration_tokens)
    run = _Run(parent, tokenizer, data, calibration, held_out, config, device, seed)
    targets = steps_of(config)
    key = f"{config.model_dump_json()} {seed}"
    rows, start = _newest(scratch, key)
    resumed = max(0, len(rows) - 1)
    if not rows:
        perplexity, right = run.perplexity(parent), score(parent, tokenizer, run.tasks)
        rows = [measured(parent, 0, perplexity, right, True, 0.0)]
    for number, target in enumerate(targets[resumed:], resumed + 1):
        if len(targets) == 1:
            model = parent  # no teacher is needed: one model in memory, not two
        else:
            model, _ = load_sound(start or checkpoint)
        row = run.prune(model, number, target)
        if number < len(targets):
            row = run.recover(model, row, scratch / f"training-{number}", _part_of(progress, number, len(targets)))
            said = {"steps": [asdict(done) for done in (*rows, row)]}
            start = save_step(scratch, number, partial(save_rounded, model, tokenizer), said, key, keep=1)
            shutil.rmtree(scratch / f"training-{number}", ignore_errors=True)
        rows.append(row)
    save_rounded(model, tokenizer, out)
    classes = tuple(name for name in ("attention", "feed_forward", "embeddings") if targets[-1].of(name) > 0)
    PruningRecord(tuple(rows), classes, config.benchmark_tasks, seed).save(out)
    last = rows[-1]
    return PruningReport(
        method=config.method,
        mask_structure=config.mask_structure,
        sparsity=last.sparsity,
        sparsity_attention=last.attention,
        sparsity_feed_forward=last.feed_forward,
        sparsity_embeddings=last.embeddings,
        sparsity_missing=max([0.0, *(targets[-1].of(name) - getattr(last, name) for name in classes)]),
        masks_intact=all(row.mask_intact for row in rows),
        zeros=sum(int((p == 0).sum()) for p in model.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        calibration_samples=len(data) if data else 0,
        calibration_tokens=dict(data.tokens_by_group) if data else {},
        perplexity_before=rows[0].perplexity,
        perplexity_after=last.perplexity,
        perplexity_tokens=run.tokens,
        resumed_from=resumed,
        pruning=tuple(rows),
        loss_by_sparsity=loss_curve(rows),
    )


class _Run:
    """What every step of a pruning works with."""

    def __init__(
        self,
        parent: Any,
        tokenizer: Any,
        data: Calibration | None,
        pairs: Sequence[Pair],
        held_out: Sequence[Pair],
        config: PruningConfig,
        device: str,
        seed: int,
    ) -> None:
        self.parent, self.tokenizer, self.data, self.pairs = parent, tokenizer, data, pairs
        self.held_out, self.config, self.device, self.seed = held_out, config, device, seed
        self.tasks = benchmark_tasks(config.benchmark_tasks, seed)
        self.tokens = 0

    def perplexity(self, model: Any) -> float:
        perplexity, self.tokens = perplexity_of(answer_logits(model, self.tokenizer, self.held_out, 1024))
        return perplexity

    def prune(self, model: Any, number: int, target: Targets) -> PruningStep:
        """Prune ``model`` in place, rounded to what is saved, and measure it."""
        started = time.perf_counter()
        before = [weight == 0 for weight in prunable_weights(model, embeddings=True)]
        prune_model(model, self.data, self.config.method, target)
        round_weights(model)
        intact = all(
            bool((weight[zeros] == 0).all())
            for weight, zeros in zip(prunable_weights(model, embeddings=True), before, strict=True)
        )
        seconds = time.perf_counter() - started
        right = score(model, self.tokenizer, self.tasks)
        return measured(model, number, self.perplexity(model), right, intact, seconds)

    def recover(self, model: Any, row: PruningStep, scratch: Path, progress: Progress) -> PruningStep:
        """Train ``model`` in place, rounded again, and complete its row."""
        training = train_masked(
            model.to(self.device),
            self.parent.to(self.device),
            self.tokenizer,
            self.pairs,
            self.config.between,
            scratch=scratch,
            embeddings=self.config.sparsity_embeddings > 0,
            seed=self.seed + row.step,
            progress=progress,
        )
        round_weights(model.cpu())
        return row.recovered(
            self.perplexity(model), score(model, self.tokenizer, self.tasks), training.mask_intact, training.seconds
        )


def _part_of(progress: Progress, number: int, of: int) -> Progress:
    """The progress of the training in step ``number``, in units of the whole."""

    def report(done: int, total: int, note: str = "") -> None:
        progress((number - 1) * total + done, of * total, f"step {number}: {note}")

    return report


def _newest(scratch: Path, key: str) -> tuple[list[PruningStep], Path | None]:
    """The rows and the checkpoint of the newest step that is whole; nothing where there is none."""
    found = newest_step(scratch, key)
    if found is None:
        return [], None
    _, folder, said = found
    return [PruningStep.from_json(row) for row in said["steps"]], folder
