"""Prune a checkpoint by layer class through llm-compressor (SparseGPT, Wanda or magnitude)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.compressor import calibration_set, quiet_compressor, run_oneshot
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class PruningReport:
    """Zeros by layer class (share of weights), and perplexity on the held-out answers around it."""

    method: str
    mask_structure: str
    sparsity_attention: float
    sparsity_feed_forward: float
    sparsity_missing: float
    """Largest shortfall of a class from what was asked."""
    zeros: int
    parameters: int
    calibration_samples: int
    perplexity_before: float
    perplexity_after: float
    perplexity_tokens: int


@quiet_compressor()
def prune(
    checkpoint: Path, calibration: Sequence[Pair], held_out: Sequence[Pair], out: Path, config: PruningConfig
) -> PruningReport:
    """Write a pruned copy of ``checkpoint`` (bfloat16). Attention and feed-forward have their own sparsity.

    Raises:
        CogumiError: a calibration set that is too small, or an N:M pattern by magnitude.
    """
    if config.method == "magnitude" and config.mask_structure != "0:0":
        raise CogumiError(
            f"magnitude pruning is unstructured here, mask_structure is {config.mask_structure!r}",
            "set compression.pruning.method to wanda or sparsegpt, or mask_structure to 0:0",
        )
    model, tokenizer = load_checkpoint(checkpoint, "float32")
    before, tokens = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    data = None
    samples = 0
    if config.method != "magnitude":
        data = calibration_set(tokenizer, calibration, config.calibration_samples, config.calibration_tokens)
        samples = len(data)
    for targets, sparsity in ((ATTENTION, config.sparsity_attention), (FEED_FORWARD, config.sparsity_feed_forward)):
        if sparsity > 0 and config.method == "magnitude":
            _magnitude(model, targets, sparsity)
    if config.method != "magnitude":
        recipe = _recipe(config)
        if recipe:
            run_oneshot(model, recipe, data, samples)
    after, _ = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    save_checkpoint(model.bfloat16(), tokenizer, out)
    attention, feed_forward = sparsity_of(model, ATTENTION), sparsity_of(model, FEED_FORWARD)
    return PruningReport(
        method=config.method,
        mask_structure=config.mask_structure,
        sparsity_attention=attention,
        sparsity_feed_forward=feed_forward,
        sparsity_missing=max(0.0, config.sparsity_attention - attention, config.sparsity_feed_forward - feed_forward),
        zeros=sum(int((p == 0).sum()) for p in model.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        calibration_samples=samples,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_tokens=tokens,
    )


def _recipe(config: PruningConfig) -> list[Any]:
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    modifier = SparseGPTModifier if config.method == "sparsegpt" else WandaPruningModifier
    classes = ((ATTENTION, config.sparsity_attention), (FEED_FORWARD, config.sparsity_feed_forward))
    return [
        modifier(
            sparsity=sparsity,
            mask_structure=config.mask_structure,
            targets=[f"re:.*{name}$" for name in names],
        )
        for names, sparsity in classes
        if sparsity > 0
    ]


def _magnitude(model: Any, names: Sequence[str], sparsity: float) -> None:
    """Zero the smallest weights of each named linear layer (unstructured)."""
    import torch

    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(tuple(names)):
                count = int(sparsity * module.weight.numel())
                smallest = module.weight.abs().flatten().topk(count, largest=False).indices
                module.weight.view(-1)[smallest] = 0.0


def sparsity_of(model: Any, names: Sequence[str]) -> float:
    """Share of exact zeros in the linear layers whose names end so."""
    zeros = total = 0
    for name, module in model.named_modules():
        if name.endswith(tuple(names)):
            zeros += int((module.weight == 0).sum())
            total += module.weight.numel()
    return zeros / max(1, total)
