"""Sample packing: examples end to end in one row, no padding, and none sees another.

Each example keeps the positions and the attention that it would have alone: on a GPU by torch's kernel for sequences
of any lengths (in 16 bit, from Ampere on), elsewhere example by example. That is also less work than a masked square:
attention is quadratic in an example's length instead of the row's.

What all examples of a row begin with (the template's system prompt, a fifth of a short example) is in
the row once: every example attends to it, and its gradient is the sum of theirs, as if each had its own.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, takewhile
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Encoded
from cogumi_dagster.lib.training.fused_loss import head_loss, is_plain
from cogumi_dagster.lib.training.memory import PRODUCT_MULTIPLE

PACKED_ATTENTION = "packed"
"""The name under which ``packed_attention`` is known to transformers."""
KEEPS_SCORES = 256
"""Tokens up to which an example's attention scores are kept for the backward pass on a CPU."""
MOST_SKIPS = 4
"""Of an example's positions."""
SHARED_AT_LEAST = 8
"""Tokens; a shorter common beginning is not worth the copies."""
ROW_MULTIPLE = 128
"""Tokens. Rows of a few sizes instead of a thousand let each step reuse the memory of the last: a fifth more tokens a
second on a CPU, for at most 127 tokens a row that nobody reads."""


@dataclass(frozen=True)
class Packed:
    """One row of examples. ``ids`` and ``positions`` are (1, tokens); ``predicting`` and ``targets`` (supervised,):
    the places whose hidden state predicts a supervised token, and that token."""

    ids: Any
    positions: Any
    predicting: Any
    targets: Any
    bounds: tuple[int, ...]
    """Where each example begins, or goes on after the shared beginning; the end of the last, and of the filling."""
    shared: int
    """Tokens that all examples begin with, at the row's start."""
    indices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Without the filling."""
        return self.bounds[len(self.indices)]

    @property
    def saved(self) -> int:
        """Tokens that are not computed because they are shared."""
        return self.shared * (len(self.indices) - 1)

    @property
    def supervised(self) -> int:
        return int(self.targets.numel())


def pack(items: Sequence[Encoded], *, share: bool = True) -> Packed:
    """``share``: what all begin with is in the row once, and the row is filled to a multiple of ``ROW_MULTIPLE``.

    Raises:
        CogumiError: no token is supervised (a template that matches nothing).
    """
    import torch

    shared = 0
    if share and len(items) > 1:
        shared = min(common_beginning(items), *(item.answer_start - 1 for item in items))
        shared = shared if shared >= SHARED_AT_LEAST else 0
    bounds = tuple(accumulate((len(item.ids) - shared for item in items), initial=shared))
    predicting = [
        start + place - shared
        for item, start in zip(items, bounds, strict=False)
        for place in range(item.answer_start - 1, len(item.ids) - 1)
    ]
    if not predicting:
        raise CogumiError("a batch has no supervised token", "the responses of these examples are empty")
    ids = torch.tensor([*items[0].ids[:shared], *(token for item in items for token in item.ids[shared:])])
    places = torch.tensor(predicting)
    targets = ids[places + 1]
    positions = torch.tensor([*items[0].places[:shared], *(p for item in items for p in item.places[shared:])])
    if share and (filling := -bounds[-1] % ROW_MULTIPLE):  # an example of its own that predicts nothing
        ids, positions = (torch.nn.functional.pad(side, (0, filling)) for side in (ids, positions))
        bounds = (*bounds, bounds[-1] + filling)
    return Packed(
        ids=ids[None],
        positions=positions[None],
        predicting=places,
        targets=targets,
        bounds=bounds,
        shared=shared,
        indices=tuple(item.index for item in items),
    )


def common_beginning(items: Sequence[Encoded]) -> int:
    """How many tokens, and their positions, are the same in all."""
    columns = zip(*(zip(item.ids, item.places, strict=True) for item in items), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def skip_positions(item: Encoded, most: int, rng: random.Random, after: int = 0) -> Encoded:
    """The example with up to ``MOST_SKIPS`` skips in its positions, each of ``most`` at most before a random token,
    not before those that come ``after`` so many.

    Rotary embeddings see distances only. Examples of one length teach which distance means what; with skips the
    distances of longer ones are met too, and what must be found is learned by what it is (Ruoss et al. 2023,
    "Randomized Positional Encodings Boost Length Generalization"; Zhu et al. 2023, "PoSE").
    """
    positions = list(range(len(item.ids)))
    for _ in range(rng.randint(0, MOST_SKIPS)):
        start, by = rng.randrange(min(after, len(positions) - 1), len(positions)), rng.randint(1, most)
        positions[start:] = (position + by for position in positions[start:])
    return replace(item, positions=positions)


def answer_losses(model: Any, packed: Packed) -> Any:
    """Sum of the cross-entropy over the supervised tokens."""
    import torch

    head, hidden = _predicting_states(model, packed)
    targets = packed.targets.to(hidden.device)
    if is_plain(head, hidden):
        return head_loss()(hidden, head.weight, targets)
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def answer_logits(model: Any, packed: Packed) -> Any:
    """Logits (supervised, vocabulary) of a packed row, in float32."""
    head, hidden = _predicting_states(model, packed)
    return head(hidden).float()


def _predicting_states(model: Any, packed: Packed) -> tuple[Any, Any]:
    """The output layer, and what it reads: the hidden states (supervised, size) of a packed row.

    Logits are computed where a token is supervised only: with a vocabulary of 49,152 and a hidden size of 576 they
    would otherwise be half of the work.
    """

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.config._attn_implementation != PACKED_ATTENTION:
        raise RuntimeError("the model's attention is not that for packed rows: examples would not see what they share")
    device = causal.get_input_embeddings().weight.device
    hidden = causal.model(
        input_ids=packed.ids.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
        bounds=packed.bounds,
        shared=packed.shared,
        segments=segments_of(packed.bounds, packed.shared, device) if device.type == "cuda" else None,
    ).last_hidden_state
    return causal.lm_head, hidden[0, packed.predicting.to(device)]


@dataclass(frozen=True)
class Segments:
    """What a row's attention reads, for a kernel of sequences of any lengths.

    ``queries`` and ``keys`` (segments + 1,): where each segment's begin among all; the last keys of a segment are its
    queries. ``places`` (all keys,): where in the row each key is, or None where the keys are the row.
    """

    queries: Any
    keys: Any
    longest_queries: int
    longest_keys: int
    places: Any


def segments_of(bounds: Sequence[int], shared: int, device: Any) -> Segments:
    """The shared beginning, where there is one, reads itself; each example reads it and itself."""
    import torch

    own = list(pairwise(bounds))
    if shared:
        read = [range(shared), *((*range(shared), *range(start, end)) for start, end in own)]
        own.insert(0, (0, shared))
    else:
        read = [range(start, end) for start, end in own]

    def ends(sizes: Sequence[int]) -> Any:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

    asked, seen = [end - start for start, end in own], [len(places) for places in read]
    places = torch.tensor([place for one in read for place in one], device=device) if shared else None
    return Segments(ends(asked), ends(seen), max(asked), max(seen), places)


def _on_gpu(query: Any, key: Any, value: Any, segments: Segments, scaling: float) -> Any:
    """(tokens, heads, size) of a whole row, in one kernel forward and one backward."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (side[0].transpose(0, 1).to(value.dtype) for side in (query, key, value))
    if segments.places is not None:
        key, value = key[segments.places], value[segments.places]
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    return varlen_attn(
        query.contiguous(), key, value, segments.queries, segments.keys, segments.longest_queries,
        segments.longest_keys, scale=scaling, window_size=(-1, 0),
    )  # fmt: skip


def packed_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    bounds: tuple[int, ...] | None = None,
    shared: int = 0,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Causal attention within each example and to the shared beginning. (1, heads, tokens, size) each; returns
    (1, tokens, heads, size).

    The signature is that of transformers' attention functions.
    """
    import torch

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is not None and not dropout and has_flash_attention(value):
        return _on_gpu(query, key, value, segments, scaling)[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    sizes = [end - start for start, end in pairwise(bounds or (0, query.shape[2]))]
    if shared:
        sizes.insert(0, shared)
    # split, not slices: the gradient of a slice is a row of zeros as long as the whole, for each example
    examples = list(zip(*(side.split(sizes, dim=2) for side in (query, key, value)), strict=True))
    if shared:
        beginning, *own = examples
        examples = [tuple(torch.cat(both, dim=2) for both in zip(beginning, one, strict=True)) for one in own]
    parts = [_attention(q, k, v, scaling, dropout) for q, k, v in examples]
    if shared:  # every example has computed the beginning, and alike
        parts = [parts[0][:, :, :shared], *(part[:, :, shared:] for part in parts)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attention(query: Any, key: Any, value: Any, scaling: float, dropout: float) -> Any:
    """Causal attention of one example. (1, heads, tokens, size) each.

    torch's kernel for bfloat16 on a CPU is slow where rows are short, backward above all. With the scores in float32
    the products are as exact, and 2.4 times as fast at 128 tokens; but they are kept, so not for long examples.
    """
    import torch

    tokens = query.shape[2]
    if query.device.type == "cpu" and (filling := -tokens % PRODUCT_MULTIPLE):  # later tokens, that none looks at
        query, key, value = (torch.nn.functional.pad(side, (0, 0, 0, filling)) for side in (query, key, value))
        return _attention(query, key, value, scaling, dropout)[:, :, :tokens]
    rows, heads, *_ = query.shape
    short = rows == 1 and tokens <= KEEPS_SCORES
    # under autocast queries and keys are float32, rotated by float32 angles
    if query.device.type != "cpu" or value.dtype is not torch.bfloat16 or not short or dropout:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout
        )
    future = _future(tokens).expand(heads, -1, -1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(future, query[0].float(), key[0].float().transpose(1, 2), alpha=scaling)
        return torch.bmm(scores.softmax(-1).to(value.dtype), value[0])[None]


@lru_cache(maxsize=64)
def _future(tokens: int) -> Any:
    """(tokens, tokens): 0 where a token may look, minus infinity where it may not."""
    import torch

    return torch.full((tokens, tokens), float("-inf"), dtype=torch.float32, device="cpu").triu(1)


def has_flash_attention(value: Any) -> bool:
    """Whether torch's flash-attention kernels take a tensor: 16 bit, on a GPU of Ampere's generation or later."""
    import torch

    if value.device.type != "cuda" or value.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(value.device) >= (8, 0)


def attention_for_packed_rows() -> str:
    """The attention to load a model with whose rows are packed."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    return PACKED_ATTENTION


@contextmanager
def packed_rows(model: Any) -> Iterator[None]:
    """Attention for packed rows, for as long as it lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention_for_packed_rows())
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def steps_of(encoded: Sequence[Encoded], batch_tokens: int, seed: int) -> list[list[Encoded]]:
    """One epoch in random order, as optimizer steps of at most ``batch_tokens`` tokens (or one longer example)."""
    order = list(encoded)
    random.Random(seed).shuffle(order)
    steps: list[list[Encoded]] = []
    size = batch_tokens
    for item in order:
        if size + len(item.ids) > batch_tokens:
            steps.append([])
            size = 0
        steps[-1].append(item)
        size += len(item.ids)
    return steps


def schedule(
    encoded: Sequence[Encoded], batch_tokens: int, epochs: float, max_steps: int, seed: int
) -> list[list[Encoded]]:
    """All steps of a run, in order: whole epochs and a last share of one, at most ``max_steps``."""
    steps: list[list[Encoded]] = []
    for epoch in range(int(epochs) + 1):
        share = min(1.0, epochs - epoch)
        if share > 0 and len(steps) < max_steps:
            one = steps_of(encoded, batch_tokens, seed + epoch)
            steps.extend(one[: max(1, round(share * len(one)))])
    return steps[:max_steps]


def rows_of(items: Sequence[Encoded], row_tokens: int) -> list[list[Encoded]]:
    """One step's examples in rows of at most ``row_tokens`` (first fit, longest first): few rows, nearly full.

    Raises:
        CogumiError: an example is longer than a row.
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -len(item.ids)):
        size = len(item.ids)
        if size > row_tokens:
            raise CogumiError(
                f"an example of {size} tokens does not fit in a row of {row_tokens}",
                "lower training.max_length, or give the step more memory",
            )
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([item])
            room.append(row_tokens - size)
        else:
            rows[place].append(item)
            room[place] -= size
    return rows
