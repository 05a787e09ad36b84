"""Recovery training after pruning: the zeros stay zeros, the parent's logits are the teacher."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import RecoveryConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded, Pair, batches_of, collate, encode_pairs, supervised_logits
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class RecoveryReport:
    """``mask_intact``: every weight that was zero before training is zero after it, and only those."""

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


def recover(
    pruned: Path,
    parent: Path,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    config: RecoveryConfig,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> RecoveryReport:
    """Train the pruned layers on the examples that the pruned model finds hardest.

    The mask is re-applied after every optimizer step (sparsegpt#17), and the loss mixes the
    answers' cross-entropy with the divergence from the unpruned parent's logits.

    Raises:
        CogumiError: no example, or a loss that is not finite.
    """
    import torch

    torch.manual_seed(seed)
    model, tokenizer = load_checkpoint(pruned, "float32")
    teacher, _ = load_checkpoint(parent, "float32")
    pad = tokenizer.pad_token_id
    parent_perplexity, tokens_measured = perplexity_of(answer_logits(teacher, tokenizer, held_out, 1024))
    pruned_perplexity, _ = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    encoded, _ = encode_pairs(tokenizer, pairs, 512)
    groups = _hardest(model, encoded, config, pad)
    masks = {
        name: module.weight != 0
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    layers = {name: model.get_submodule(name) for name in masks}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [layer.weight for layer in layers.values()], lr=config.learning_rate, weight_decay=0.0
    )
    model.train()
    curve, tokens, started = [], 0, time.perf_counter()
    for step in range(config.steps):
        batch = collate(groups[step % len(groups)], pad)
        loss = _loss(model, teacher, batch, config.distil_weight)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CogumiError(f"the recovery loss is {value} at step {step + 1}", "lower recovery.learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([layer.weight for layer in layers.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in masks.items():
                layers[name].weight.mul_(mask)
        tokens += batch.tokens
        curve.append((step + 1, value))
        progress(step + 1, config.steps, f"loss {value:.3f}")
    seconds = time.perf_counter() - started
    model.eval()
    recovered, _ = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    save_checkpoint(model.bfloat16(), tokenizer, out)
    intact = all(bool(((layers[name].weight != 0) & ~mask).sum() == 0) for name, mask in masks.items())
    return RecoveryReport(
        steps=config.steps,
        tokens=tokens,
        loss_first=curve[0][1],
        loss_last=curve[-1][1],
        perplexity_parent=parent_perplexity,
        perplexity_pruned=pruned_perplexity,
        perplexity_recovered=recovered,
        perplexity_tokens=tokens_measured,
        mask_intact=intact,
        zeros=sum(int((~mask).sum()) for mask in masks.values()),
        tokens_per_second=tokens / seconds,
        curve=tuple(curve),
    )


def _hardest(model: Any, encoded: Sequence[Encoded], config: RecoveryConfig, pad: int) -> list[list[Encoded]]:
    """The examples of highest loss, in batches; scored on as many as the run could use twice over."""
    import torch

    candidates = list(encoded)[: 2 * config.steps * max(1, config.batch_tokens // 128)]
    losses: dict[int, float] = {}
    with torch.no_grad():
        for batch in batches_of(candidates, 1024, pad):
            logits, targets = supervised_logits(model, batch)
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
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
