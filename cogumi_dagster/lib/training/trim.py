"""Vocabulary trimming: keep the tokens that a corpus needs, and every text can still be written.

Kept are all single bytes, the special tokens, every token that the corpus uses, the commonest others
if asked for, and the closure of the BPE merges that build them; so the corpus gets the same tokens
(renumbered), and anything else falls apart into smaller ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint, save_checkpoint

ROW_MULTIPLE = 32
"""Vocabulary rows are rounded up to this, so that every block quantization divides them."""


@dataclass(frozen=True)
class TrimReport:
    """``same_ids``: corpus texts whose tokens are the same, renumbered. Bytes are of the embeddings in 16 bit.

    Coverage (the share of tokens that were kept) and tokens a word are of the held-out texts. Perplexities are of the
    same answers by the untrimmed tokenizer's tokens, since a text in more tokens has more of them to be sure of.
    """

    vocabulary_before: int
    vocabulary_after: int
    texts: int
    same_ids: int
    round_trips: int
    coverage: float
    tokens_per_word_before: float
    tokens_per_word_after: float
    bytes_saved: int
    perplexity_before: float
    perplexity_after: float
    perplexity_ratio: float
    perplexity_tokens: int


def trim_vocabulary(
    checkpoint: Path, corpus: Sequence[Pair], held_out: Sequence[Pair], out: Path, *, keep: int = 0
) -> TrimReport:
    """Write the trimmed checkpoint to ``out`` and compare it with the untrimmed one.

    ``keep``: the first so many merges of the tokenizer's training are kept too, whether the corpus uses them or not.
    """
    import torch

    model, tokenizer = load_checkpoint(checkpoint, "float32")
    texts = [text for pair in corpus for text in (pair.instruction, pair.response)]
    before = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    template = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    used = {i for ids in before for i in ids} | set(tokenizer.encode(template, add_special_tokens=False))
    perplexity, count = perplexity_of(answer_logits(model, tokenizer, held_out[:16]))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _closure(state, used, keep)
    renumbered = {old: new for new, old in enumerate(kept)}
    trimmed = _trimmed_tokenizer(tokenizer, state, renumbered)
    after = [trimmed.encode(text, add_special_tokens=False) for text in texts]
    same = sum([renumbered.get(i) for i in old] == new for old, new in zip(before, after, strict=True))
    round_trips = sum(trimmed.decode(ids) == text for ids, text in zip(after, texts, strict=True))
    rows = -(-len(kept) // ROW_MULTIPLE) * ROW_MULTIPLE
    old_rows, width = model.get_input_embeddings().weight.shape
    with torch.no_grad():
        tables = (model.get_input_embeddings, model.get_output_embeddings)  # the same one where they are tied
        weights = [torch.zeros(rows, width) for _ in tables]
        for table, new in zip(tables, weights, strict=True):
            new[: len(kept)] = table().weight[torch.tensor(kept)]
        model.resize_token_embeddings(rows, mean_resizing=False)
        for table, new in zip(tables, weights, strict=True):
            table().weight.copy_(new)
    for name in ("bos", "eos", "pad"):
        token_id = getattr(trimmed, f"{name}_token_id")
        setattr(model.config, f"{name}_token_id", token_id)
        setattr(model.generation_config, f"{name}_token_id", token_id)
    trimmed_perplexity, trimmed_count = perplexity_of(answer_logits(model, trimmed, held_out[:16]))
    trimmed_perplexity **= trimmed_count / count
    others = [text for pair in held_out for text in (pair.instruction, pair.response)]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in others]
    words = sum(len(text.split()) for text in others)
    save_checkpoint(model.bfloat16(), trimmed, out)
    return TrimReport(
        vocabulary_before=old_rows,
        vocabulary_after=rows,
        texts=len(texts),
        same_ids=same,
        round_trips=round_trips,
        coverage=sum(i in renumbered for ids in plain for i in ids) / sum(map(len, plain)),
        tokens_per_word_before=sum(map(len, plain)) / words,
        tokens_per_word_after=sum(len(trimmed.encode(text, add_special_tokens=False)) for text in others) / words,
        bytes_saved=2 * width * (old_rows - rows),
        perplexity_before=perplexity,
        perplexity_after=trimmed_perplexity,
        perplexity_ratio=trimmed_perplexity / perplexity,
        perplexity_tokens=count,
    )


def _closure(state: dict[str, Any], used: set[int], common: int) -> list[int]:
    """The ids to keep, in order: specials, single-character tokens, the first merges, used ones, and their parts."""
    vocabulary: dict[str, int] = state["model"]["vocab"]
    parts: dict[str, tuple[str, str]] = {}
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        parts.setdefault(left + right, (left, right))
    names = {token_id: token for token, token_id in vocabulary.items()}
    waiting = [names[i] for i in used if i in names] + [token for token in vocabulary if len(token) == 1]
    waiting += list(parts)[:common]
    kept = {entry["id"] for entry in state["added_tokens"]}
    seen: set[str] = set()
    while waiting:
        token = waiting.pop()
        if token in seen or token not in vocabulary:
            continue
        seen.add(token)
        kept.add(vocabulary[token])
        waiting.extend(parts.get(token, ()))
    return sorted(kept)


def _trimmed_tokenizer(tokenizer: Any, state: dict[str, Any], renumbered: dict[int, int]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: renumbered[i] for t, i in state["model"]["vocab"].items() if i in renumbered}
    merges = []
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append([left, right])
    state = {**state, "model": {**state["model"], "vocab": vocabulary, "merges": merges}}
    state["added_tokens"] = [{**entry, "id": renumbered[entry["id"]]} for entry in state["added_tokens"]]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")},
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = tokenizer.chat_template
    return fast
