"""Log-probabilities and perplexity of a GGUF through llama.cpp, on the tokens that transformers saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import Estimate, bootstrap
from cogumi_dagster.lib.inference.llama import free_cores
from cogumi_dagster.lib.training.batches import Encoded, Pair, encode_pairs

CHARACTERS_PER_TOKEN = 2.5
"""Of the packaged families' answers in SmolLM2's tokens, which split every digit."""

Outputs = list[tuple[Any, Any]]
"""[(log-probabilities (n, vocabulary), targets (n,))], as ``training.merge.answer_logits`` gives."""


def held_out_pairs(pairs: Sequence[Pair], tokens: int) -> list[Pair]:
    """The first of ``pairs`` whose answers make up about ``tokens`` tokens; reports give the exact count.

    Raises:
        CogumiError: there is none.
    """
    chosen, total = [], 0.0
    for pair in pairs:
        if total >= tokens:
            break
        chosen.append(pair)
        total += len(pair.response) / CHARACTERS_PER_TOKEN
    if not chosen:
        raise CogumiError("the validation split is empty: nothing to measure perplexity on", "raise dataset.examples")
    return chosen


def gguf_answer_logits(gguf: Path, tokenizer: Any, pairs: Sequence[Pair], *, lora: Path | None = None) -> Outputs:
    """What ``answer_logits`` computes with transformers, computed by llama.cpp on the same ids, in the same order."""
    import numpy as np
    import torch
    from llama_cpp import Llama

    encoded, _ = encode_pairs(tokenizer, pairs, 1 << 30)
    longest = max(len(item.ids) for item in encoded)
    threads = free_cores()
    llama = Llama(
        model_path=str(gguf),
        lora_path=str(lora) if lora else None,
        logits_all=True,
        n_ctx=longest + 8,
        n_batch=longest + 8,
        n_ubatch=min(512, longest + 8),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    results = []
    for item in sorted(encoded, key=_by_length):
        llama.reset()
        llama.eval(list(item.ids))
        rows = np.array(llama.scores[item.answer_start - 1 : len(item.ids) - 1], dtype=np.float32)
        targets = torch.tensor(item.ids[item.answer_start :])
        results.append((torch.log_softmax(torch.from_numpy(rows), -1), targets))
    llama.close()
    return results


def _by_length(item: Encoded) -> int:
    return len(item.ids)


def perplexity_change(reference: Outputs, other: Outputs, seed: int = 0) -> Estimate:
    """Perplexity of ``other`` over the reference's on the same tokens; the interval is a bootstrap over answers.

    ``other`` has an entry for each answer, as ``gguf_answer_logits`` gives; the reference may be batched otherwise.
    """
    import numpy as np
    import torch

    lengths = [len(targets) for _, targets in other]
    before, after = (torch.split(_losses(outputs), lengths) for outputs in (reference, other))
    rows = [(float((new - old).sum()), len(new)) for old, new in zip(before, after, strict=True)]
    return bootstrap(rows, lambda part: float(np.exp(part[:, 0].sum() / part[:, 1].sum())), seed)


def _losses(outputs: Outputs) -> Any:
    import torch

    return torch.cat([-logs.gather(1, targets[:, None])[:, 0] for logs, targets in outputs])


def flatten(outputs: Outputs) -> Outputs:
    """One pair of tensors, so that outputs that were batched differently can be compared."""
    import torch

    return [(torch.cat([logs for logs, _ in outputs]), torch.cat([targets for _, targets in outputs]))]
