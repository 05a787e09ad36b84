"""Recovery training after pruning: the zeros stay zeros, the parent's logits are the teacher."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.compressor import load_sound
from cogumi_dagster.lib.compression.prune import class_weights
from cogumi_dagster.lib.compression.pruning_steps import (
    PruningRecord,
    PruningStep,
    benchmark_tasks,
    loss_curve,
    score,
)  # fmt: skip
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.plots import LinePlot
from cogumi_dagster.lib.profile import RecoveryConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded, Pair, batches_of, collate, encode_pairs, supervised_logits
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of
from cogumi_dagster.lib.training.student import save_checkpoint


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
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> RecoveryReport:
    """Train the pruned layers on the examples that the pruned model finds hardest, and save the result.

    Raises:
        CogumiError: an unsound checkpoint, no example, or a loss that is not finite.
    """
    model, tokenizer = load_sound(pruned)
    teacher, _ = load_sound(parent)
    model, teacher = model.to(device), teacher.to(device)
    parent_perplexity, tokens_measured = perplexity_of(answer_logits(teacher, tokenizer, held_out, 1024))
    pruned_perplexity, _ = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    record = PruningRecord.load(pruned)
    embeddings = record is not None and "embeddings" in record.pruned
    training = train_masked(
        model, teacher, tokenizer, pairs, config, embeddings=embeddings, seed=seed, progress=progress
    )
    recovered, _ = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    rows: tuple[PruningStep, ...] = ()
    if record:
        right = score(model, tokenizer, benchmark_tasks(record.tasks, record.seed))
        last = record.steps[-1].recovered(recovered, right, training.mask_intact, training.seconds)
        rows = (*record.steps[:-1], last)
    save_checkpoint(model.bfloat16().cpu(), tokenizer, out)
    return RecoveryReport(
        steps=config.steps,
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
    embeddings: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Training:
    """Train the linear layers, and the embeddings where they were pruned, in place; the rest is frozen.

    The mask is re-applied after every optimizer step (sparsegpt#17), and the loss mixes the
    answers' cross-entropy with the divergence from the unpruned teacher's logits.
    """
    import torch

    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id
    encoded, _ = encode_pairs(tokenizer, pairs, config.max_length)
    groups = _hardest(model, encoded, config, pad)
    random.Random(seed).shuffle(groups)  # they come by length
    weights = prunable_weights(model, embeddings=embeddings)
    masks = [weight.detach() != 0 for weight in weights]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    model.train()
    curve, tokens, started = [], 0, time.perf_counter()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        batch = collate(groups[step % len(groups)], pad)
        loss = _loss(model, teacher, batch, config.distil_weight)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CogumiError(f"the recovery loss is {value} at step {step + 1}", "lower recovery.learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight.mul_(mask)
        tokens += batch.tokens
        curve.append((step + 1, value))
        progress(step + 1, config.steps, f"loss {value:.3f}")
    model.eval()
    return Training(
        curve=tuple(curve),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        zeros=sum(int((~mask).sum()) for mask in masks),
        mask_intact=all(bool((weight[~mask] == 0).all()) for weight, mask in zip(weights, masks, strict=True)),
    )


def prunable_weights(model: Any, *, embeddings: bool) -> list[Any]:
    """The weights of attention and feed-forward, and those of the embeddings where asked."""
    classes = class_weights(model)
    return [*classes["attention"], *classes["feed_forward"], *(classes["embeddings"] if embeddings else ())]


def _hardest(model: Any, encoded: Sequence[Encoded], config: RecoveryConfig, pad: int) -> list[list[Encoded]]:
    """The examples of highest loss, in batches; scored on as many as the run could use twice over."""
    import torch

    candidates = list(encoded)[: 2 * config.steps * max(1, config.batch_tokens // 128)]
    losses: dict[int, float] = {}
    with torch.no_grad():
        for batch in batches_of(candidates, 1024, pad):
            logits, targets = supervised_logits(model, batch)
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
            rows = (batch.targets[:, 1:] != -100).nonzero()[:, 0]
            for row, index in enumerate(batch.indices):
                losses[index] = float(each[rows == row].mean())
    ranked = sorted(candidates, key=lambda item: -losses[item.index])
    kept = ranked[: max(1, round(config.hardest_share * len(ranked)))]
    groups: list[list[Encoded]] = []
    for item in sorted(kept, key=lambda item: len(item.ids)):
        if groups and len(item.ids) * (len(groups[-1]) + 1) <= config.batch_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _loss(model: Any, teacher: Any, batch: Any, weight: float) -> Any:
    import torch

    logits, targets = supervised_logits(model, batch)
    with torch.no_grad():
        wanted, _ = supervised_logits(teacher, batch)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(wanted, -1), log_target=True, reduction="batchmean"
    )
    return (1 - weight) * loss + weight * divergence
