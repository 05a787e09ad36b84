"""Examples as token batches: the served chat template, loss on the answers only, little padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.errors import CogumiError


@dataclass(frozen=True)
class Pair:
    """An instruction and the response to learn. ``group`` is only for reports (domain, family)."""

    instruction: str
    response: str
    group: str = ""


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; the loss is on ``ids[answer_start:]``."""

    ids: tuple[int, ...]
    answer_start: int
    index: int
    positions: Sequence[int] = ()
    """Of the tokens; 0, 1, 2 and so on when left out: ``places`` are these."""

    @property
    def places(self) -> Sequence[int]:
        return self.positions or range(len(self.ids))


@dataclass(frozen=True)
class Batch:
    """``ids`` and ``mask`` are (batch, length); ``targets`` holds -100 where no loss is taken."""

    ids: Any
    mask: Any
    targets: Any
    indices: tuple[int, ...]
    supervised: int
    tokens: int
    """Tokens that are not padding."""


def prompt_ids(tokenizer: Any, instruction: str) -> list[int]:
    """The ids that the engine sees before it generates."""
    messages = [{"role": "user", "content": instruction}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, section: str = "training"
) -> tuple[list[Encoded], int]:
    """Encode with the chat template; return (encoded, how many were too long and left out).

    Prompt and answer are encoded apart, as they are when served: the answer's first token never
    merges with the template.
    """
    encoded, too_long = [], 0
    for index, pair in enumerate(pairs):
        prompt = prompt_ids(tokenizer, pair.instruction)
        answer = [*tokenizer.encode(pair.response, add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt) + len(answer) > max_length:
            too_long += 1
        else:
            encoded.append(Encoded((*prompt, *answer), len(prompt), index))
    if not encoded:
        raise CogumiError(
            f"none of {len(pairs)} examples fits in {max_length} tokens", f"raise {section}.max_length, or add examples"
        )
    return encoded, too_long


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Right-pad to the longest.

    Raises:
        CogumiError: no token of the batch is supervised (a template that matches nothing).
    """
    import torch

    length = max(len(item.ids) for item in items)
    ids = torch.full((len(items), length), pad, dtype=torch.long)
    mask = torch.zeros((len(items), length), dtype=torch.long)
    targets = torch.full((len(items), length), -100, dtype=torch.long)
    for row, item in enumerate(items):
        tokens = torch.tensor(item.ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        targets[row, item.answer_start : len(tokens)] = tokens[item.answer_start :]
    supervised = int((targets != -100).sum())
    if supervised == 0:
        raise CogumiError("a batch has no supervised token", "the responses of these examples are empty")
    return Batch(ids, mask, targets, tuple(item.index for item in items), supervised, int(mask.sum()))


def supervised_logits(model: Any, batch: Batch) -> tuple[Any, Any]:
    """(logits (n, vocabulary), target ids (n,)) at the n supervised positions of a batch, and at no other."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = causal.get_input_embeddings().weight.device
    hidden = causal.model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device)).last_hidden_state
    targets = batch.targets[:, 1:].to(device)
    chosen = targets != -100
    return causal.lm_head(hidden[:, :-1][chosen]), targets[chosen]


def batches_of(encoded: Sequence[Encoded], batch_tokens: int, pad: int) -> Iterator[Batch]:
    """All examples once, sorted by length, for evaluation."""
    current: list[Encoded] = []
    for item in sorted(encoded, key=lambda item: len(item.ids)):
        if current and len(item.ids) * (len(current) + 1) > batch_tokens:
            yield collate(current, pad)
            current = []
        current.append(item)
    if current:
        yield collate(current, pad)
