"""Merge an adapter into the 16-bit student, and prove that merged and unmerged say the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, batches_of, encode_pairs, supervised_logits
from cogumi_dagster.lib.training.student import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class ParityReport:
    """How two models differ on the same tokens: token-level KL divergence (nats) and greedy agreement."""

    tokens: int
    mean_kl: float
    max_kl: float
    greedy_agreement: float


@dataclass(frozen=True)
class MergeReport:
    parity: ParityReport
    perplexity: float
    perplexity_tokens: int


def merge_adapter(checkpoint: Path, adapter: Path, out: Path, pairs: Sequence[Pair], *, max_length: int) -> MergeReport:
    """Merge in float32, save in bfloat16, and compare the saved file with base + adapter on ``pairs``.

    Never merges into NF4 weights, which damages the model (peft#2321).
    """
    from peft import PeftModel

    base, tokenizer = load_checkpoint(checkpoint, "float32")
    try:
        model = PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CogumiError(
            f"the adapter {adapter} does not fit {checkpoint}: {error}", "train it on this checkpoint"
        ) from error
    before = answer_logits(model, tokenizer, pairs, max_length)
    save_checkpoint(model.merge_and_unload().bfloat16(), tokenizer, out)
    merged, _ = load_checkpoint(out, "float32")
    after = answer_logits(merged, tokenizer, pairs, max_length)
    perplexity, count = perplexity_of(after)
    return MergeReport(parity(before, after), perplexity, count)


def answer_logits(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], max_length: int = 1 << 30
) -> list[tuple[Any, Any]]:
    """[(log-probabilities (n, vocabulary), targets (n,))] over the answers of ``pairs``; longer pairs are left out."""
    import torch

    encoded, _ = encode_pairs(tokenizer, pairs, max_length)
    results = []
    with torch.no_grad():
        for batch in batches_of(encoded, 1024, tokenizer.pad_token_id):
            logits, targets = supervised_logits(model, batch)
            results.append((torch.log_softmax(logits.float(), -1), targets))
    return results


def parity(reference: list[tuple[Any, Any]], other: list[tuple[Any, Any]]) -> ParityReport:
    """Compare two outputs of ``answer_logits`` on the same pairs: KL(reference || other) per token."""
    import torch

    divergences, agreements = [], []
    for (first, _), (second, _) in zip(reference, other, strict=True):
        divergences.append((first.exp() * (first - second)).sum(-1))
        agreements.append(first.argmax(-1) == second.argmax(-1))
    kl = torch.cat(divergences)
    return ParityReport(len(kl), float(kl.mean()), float(kl.max()), float(torch.cat(agreements).float().mean()))


def perplexity_of(outputs: list[tuple[Any, Any]]) -> tuple[float, int]:
    """(perplexity of the targets, number of tokens)."""
    import torch

    losses = torch.cat([-logs.gather(1, targets[:, None])[:, 0] for logs, targets in outputs])
    return float(losses.mean().exp()), len(losses)
