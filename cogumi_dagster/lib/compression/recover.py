"""Recovery training after pruning: the zeros stay zeros, the parent's logits are the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.compressor import load_sound, round_weights, save_rounded
from cogumi_dagster.lib.compression.prune import class_weights
from cogumi_dagster.lib.compression.pruning_steps import (
    PruningRecord,
    PruningStep,
    benchmark_tasks,
    loss_curve,
    score,
)  # fmt: skip
from cogumi_dagster.lib.evaluation.plots import LinePlot
from cogumi_dagster.lib.profile import LoraConfig, RecoveryConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded, Pair, encode_pairs
from cogumi_dagster.lib.training.loop import Loop
from cogumi_dagster.lib.training.merge import answer_logits as padded_logits
from cogumi_dagster.lib.training.merge import perplexity_of
from cogumi_dagster.lib.training.packing import Packed, answer_logits, pack, packed_rows, rows_of
from cogumi_dagster.lib.training.precision import mixed_precision
from cogumi_dagster.lib.training.workers import Workers


@dataclass(frozen=True)
class RecoveryReport:
    """``mask_intact``: every weight that was zero before training is zero after it.

    ``pruning`` and ``loss_by_sparsity`` are the whole way from the parent, as ``pruned_checkpoint`` recorded it.
    """

    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    perplexity_parent: float
    perplexity_pruned: float
    perplexity_recovered: float
    perplexity_tokens: int
    mask_intact: bool
    zeros: int
    tokens_per_second: float
    curve: tuple[tuple[int, float], ...]
    pruning: tuple[PruningStep, ...] = ()
    loss_by_sparsity: LinePlot | None = None


@dataclass(frozen=True)
class Training:
    """What ``train_masked`` did to a model."""

    curve: tuple[tuple[int, float], ...]
    tokens: int
    seconds: float
    zeros: int
    mask_intact: bool


def recover(
    pruned: Path,
    parent: Path,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    config: RecoveryConfig,
    *,
    scratch: Path,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> RecoveryReport:
    """Train the pruned layers on the examples that the pruned model finds hardest, and save the result.

    ``scratch`` keeps the training's checkpoints: a killed run goes on after the newest.

    Raises:
        CogumiError: an unsound checkpoint, no example, or a loss that is not finite.
    """
    model, tokenizer = load_sound(pruned)
    teacher, _ = load_sound(parent)
    model, teacher = model.to(device), teacher.to(device)
    parent_perplexity, tokens_measured = perplexity_of(padded_logits(teacher, tokenizer, held_out, 1024))
    pruned_perplexity, _ = perplexity_of(padded_logits(model, tokenizer, held_out, 1024))
    record = PruningRecord.load(pruned)
    embeddings = record is not None and "embeddings" in record.pruned
    training = train_masked(
        model, teacher, tokenizer, pairs, config, scratch=scratch, embeddings=embeddings, seed=seed, progress=progress
    )
    round_weights(model)
    recovered, _ = perplexity_of(padded_logits(model, tokenizer, held_out, 1024))
    rows: tuple[PruningStep, ...] = ()
    if record:
        right = score(model, tokenizer, benchmark_tasks(record.tasks, record.seed))
        last = record.steps[-1].recovered(recovered, right, training.mask_intact, training.seconds)
        rows = (*record.steps[:-1], last)
    save_rounded(model.cpu(), tokenizer, out)
    return RecoveryReport(
        steps=len(training.curve),
        tokens=training.tokens,
        loss_first=training.curve[0][1],
        loss_last=training.curve[-1][1],
        perplexity_parent=parent_perplexity,
        perplexity_pruned=pruned_perplexity,
        perplexity_recovered=recovered,
        perplexity_tokens=tokens_measured,
        mask_intact=training.mask_intact,
        zeros=training.zeros,
        tokens_per_second=training.tokens / training.seconds,
        curve=training.curve,
        pruning=rows,
        loss_by_sparsity=loss_curve(rows) if rows else None,
    )


def train_masked(
    model: Any,
    teacher: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    config: RecoveryConfig,
    *,
    scratch: Path,
    embeddings: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Training:
    """Train the linear layers, and the embeddings where they were pruned, in place; the rest is frozen.

    The mask is re-applied after every optimizer step (sparsegpt#17), and the loss mixes the answers' cross-entropy with
    the divergence from the unpruned teacher's logits. ``scratch`` keeps the loop's checkpoints.

    Raises:
        CogumiError: a loss that is not finite or explodes.
    """
    import torch

    encoded, _ = encode_pairs(tokenizer, pairs, config.max_length)
    weights = prunable_weights(model, embeddings=embeddings)
    masks = [weight.detach() != 0 for weight in weights]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)

    def mask() -> None:
        with torch.no_grad():
            for weight, kept in zip(weights, masks, strict=True):
                weight.mul_(kept)

    with packed_rows(model), packed_rows(teacher):
        hardest = _hardest(model, encoded, config)
        loop = Loop(
            model, hardest, [], _as_training(config), scratch, seed, progress, Workers(),
            losses=lambda student, row: _losses(student, teacher, row, config.distil_weight),
            after_step=mask, section="compression.recovery",
        )  # fmt: skip
        loop.train()
    model.eval()
    return Training(
        curve=tuple((int(row["step"]), row["loss"]) for row in loop.log),
        tokens=int(sum(row["tokens"] for row in loop.log)),
        seconds=sum(row["seconds"] for row in loop.log),
        zeros=sum(int((~kept).sum()) for kept in masks),
        mask_intact=all(bool((weight[~kept] == 0).all()) for weight, kept in zip(weights, masks, strict=True)),
    )


def _as_training(config: RecoveryConfig) -> LoraConfig:
    """The loop's settings: as many epochs as the steps need, and no warm-up."""
    return LoraConfig(
        learning_rate=config.learning_rate,
        max_steps=config.steps,
        epochs=float(config.steps),
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        warmup_share=0.0,
        save_every=max(20, config.steps // 10),  # all weights and Adam's moments: gigabytes for a billion weights
        load_in_4bit=False,
    )


def prunable_weights(model: Any, *, embeddings: bool) -> list[Any]:
    """The weights of attention and feed-forward, and those of the embeddings where asked."""
    classes = class_weights(model)
    return [*classes["attention"], *classes["feed_forward"], *(classes["embeddings"] if embeddings else ())]


def _hardest(model: Any, encoded: Sequence[Encoded], config: RecoveryConfig) -> list[Encoded]:
    """The examples of highest loss; scored on as many as the run could use twice over."""
    import torch

    candidates = list(encoded)[: 2 * config.steps * max(1, config.batch_tokens // 128)]
    losses: dict[int, float] = {}
    model.eval()
    with torch.no_grad(), mixed_precision(model.device.type):
        for row in rows_of(candidates, max(1024, *(len(item.ids) for item in candidates))):
            packed = pack(row)
            logits = answer_logits(model, packed)
            each = torch.nn.functional.cross_entropy(logits, packed.targets.to(logits.device), reduction="none").cpu()
            answers = each.split([len(item.ids) - item.answer_start for item in row])
            losses |= {item.index: float(answer.mean()) for item, answer in zip(row, answers, strict=True)}
    ranked = sorted(candidates, key=lambda item: -losses[item.index])
    return ranked[: max(1, round(config.hardest_share * len(ranked)))]


def _losses(model: Any, teacher: Any, packed: Packed, weight: float) -> Any:
    """Sums over the supervised tokens."""
    import torch

    with torch.no_grad(), mixed_precision(model.device.type):
        wanted = answer_logits(teacher, packed) if weight else None
    with mixed_precision(model.device.type):
        logits = answer_logits(model, packed)
    targets = packed.targets.to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    if wanted is None:
        return loss
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(wanted, -1), log_target=True, reduction="sum"
    )
    return (1 - weight) * loss + weight * divergence
