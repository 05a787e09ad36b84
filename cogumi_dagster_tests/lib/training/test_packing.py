"""Packed rows: the same loss as each example alone, nothing lost, nothing seen that is not one's own."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training import packing
from cogumi_dagster.lib.training.batches import Batch, Encoded, Pair, collate, encode_pairs
from cogumi_dagster.lib.training.fused_loss import BLOCK, head_loss, is_plain
from cogumi_dagster.lib.training.lora import load_base
from cogumi_dagster.lib.training.packing import (
    KEEPS_SCORES,
    MOST_SKIPS,
    answer_losses,
    pack,
    packed_attention,
    rows_of,
    schedule,
    segments_of,
    skip_positions,
    steps_of,
)
from cogumi_dagster.lib.training.student import load_checkpoint


def items(lengths: list[int]) -> list[Encoded]:
    return [Encoded(tuple(range(length)), max(1, length // 2), index) for index, length in enumerate(lengths)]


def padded_loss(model: Any, batch: Batch) -> Any:
    """transformers' own loss of a padded batch."""
    return model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss


@pytest.fixture(scope="module")
def loaded(student: Path) -> tuple[Any, Any]:
    model, tokenizer = load_base(student, four_bit=False, device="cpu")
    return model.float().eval(), tokenizer


def test_packed_and_unpacked_losses_are_equal(loaded: tuple[Any, Any], student: Path, pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = loaded
    plain, _ = load_checkpoint(student, "float32")  # transformers' own attention, one example a row, padded
    encoded = encode_pairs(tokenizer, pairs, 512)[0]
    with torch.no_grad():
        packed = pack(encoded, share=False)
        together = float(answer_losses(model, packed))
        alone = sum(float(answer_losses(model, pack([item]))) for item in encoded)
        once = pack(encoded)
        shared = float(answer_losses(model, once))
        padded = collate(encoded, tokenizer.pad_token_id)
        theirs = float(padded_loss(plain, padded)) * padded.supervised
    assert packed.tokens == sum(len(item.ids) for item in encoded) and packed.supervised == padded.supervised
    assert together == pytest.approx(alone, rel=1e-5)
    assert once.shared >= 20, "the template's system prompt"
    assert once.tokens == packed.tokens - once.saved == packed.tokens - once.shared * (len(encoded) - 1)
    assert once.targets.tolist() == packed.targets.tolist()
    assert shared == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(theirs, rel=1e-4)


def test_an_example_sees_nothing_of_its_neighbours(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = loaded
    one, two, other = encode_pairs(tokenizer, pairs[:3], 512)[0]
    with torch.no_grad():
        first = [float(answer_losses(model, pack(row))) for row in ([one, two], [one, other])]
        tail = [float(answer_losses(model, pack([item]))) for item in (two, other)]
    assert first[0] - tail[0] == pytest.approx(first[1] - tail[1], rel=1e-4)


def test_gradients_are_those_of_the_padded_batch(student: Path, pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = load_base(student, four_bit=False, device="cpu")
    plain, _ = load_checkpoint(student, "float32")
    model = model.float()
    encoded = encode_pairs(tokenizer, pairs[:6], 512)[0]
    found = []
    for chosen, loss in (
        (model, lambda: answer_losses(model, pack(encoded, share=False)) / pack(encoded).supervised),
        (model, lambda: answer_losses(model, pack(encoded)) / pack(encoded).supervised),
        (plain, lambda: padded_loss(plain, collate(encoded, tokenizer.pad_token_id))),
    ):
        weight = chosen.model.layers[0].self_attn.k_proj.weight
        weight.requires_grad_(True)
        weight.grad = None
        loss().backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("length", [20, KEEPS_SCORES + 1])
def test_short_examples_in_bfloat16_are_as_exact_as_the_kernel_s(length: int) -> None:
    import torch

    torch.manual_seed(0)
    sides = [torch.randn(1, 3, 2 * length, 16).bfloat16().requires_grad_() for _ in range(3)]
    given = torch.randn(1, 2 * length, 3, 16)
    exact = [side.detach().double().requires_grad_() for side in sides]
    bounds = (0, length, 2 * length)
    for q, k, v in (sides, exact):
        out, _ = packed_attention(None, q, k, v, None, bounds=bounds)
        out.backward(given.to(out.dtype))
    for side, true in zip(sides, exact, strict=True):
        assert side.grad is not None and true.grad is not None
        assert (side.grad - true.grad).norm() < 0.01 * true.grad.norm()


@pytest.mark.parametrize("shared", [0, 17])
def test_a_gpu_s_kernel_is_asked_for_what_each_example_reads(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is computed here segment by segment: the last keys of each are its queries."""
    import torch

    def kernel(q: Any, k: Any, v: Any, queries: Any, keys: Any, most_q: int, most_k: int, *, scale: float, **said: Any):
        assert said == {"window_size": (-1, 0)}, "causal"
        assert (queries[-1], keys[-1]) == (len(q), len(k)) and len(q) == bounds[-1] and len(k) == len(v)
        found = []
        for (asks, asked), (sees, seen) in zip(pairwise(queries), pairwise(keys), strict=True):
            assert asked - asks <= most_q and seen - sees <= most_k
            scores = torch.einsum("qhd,khd->hqk", q[asks:asked], k[sees:seen]) * scale
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + seen - sees - asked + asks)
            shares = scores.masked_fill(future, -torch.inf).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", shares, v[sees:seen]))
        return torch.cat(found)

    torch.manual_seed(0)
    bounds = tuple(shared + end for end in (0, 5, 40, 41, 64))
    q, k, v = (torch.randn(1, heads, bounds[-1], 16, dtype=torch.float64) for heads in (6, 2, 2))
    wanted, _ = packed_attention(None, q, k, v, None, bounds=bounds, shared=shared)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(packing, "has_flash_attention", lambda value: True)
    segments = segments_of(bounds, shared, "cpu")
    found, _ = packed_attention(None, q, k, v, None, bounds=bounds, shared=shared, segments=segments)
    torch.testing.assert_close(found, wanted)


def test_the_gpu_s_kernel_takes_16_bit_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Value:
        device = torch.device("cuda", 0)

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    for capability, takes in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert packing.has_flash_attention(Value(torch.bfloat16)) is takes
        assert not packing.has_flash_attention(Value(torch.float32))
    assert not packing.has_flash_attention(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 7, 32, BLOCK, 2 * BLOCK + 33])
def test_the_output_layer_s_loss_and_gradient_are_torch_s(tokens: int) -> None:
    import torch

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    targets = torch.randint(50, (tokens,))
    one, other = (torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    ours = head_loss()(one, head.weight, targets)
    theirs = torch.nn.functional.cross_entropy(head(other), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for loss in (ours, theirs):
        (loss / 3).backward()
    torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(head_loss()(one, head.weight, targets), theirs)
    assert is_plain(head, one)
    assert not is_plain(head, one.bfloat16()) and not is_plain(torch.nn.Linear(8, 50, bias=False), one)


def test_rows_of_other_lengths_multiply_matrices_of_the_same_sizes(student: Path) -> None:
    """oneDNN keeps code for each size that it has met: a training on every length there is grew until it was ended."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in ("mm", "scaled_dot_product")):
                seen.add((str(func), *(tuple(a.shape) for a in args if hasattr(a, "shape"))))
            return func(*args, **(kwargs or {}))

    model = load_base(student, four_bit=False, device="cpu")[0].bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    found = []
    for lengths in ([40, 50], [33, 64], [61, 37]):
        seen: set[Any] = set()
        row = pack([replace(item, answer_start=9 + item.index) for item in items(lengths)])
        with Sizes():
            answer_losses(model, row).backward()
        found.append(seen)
    assert len(found[0]) > 5 and found[0] == found[1] == found[2]


def test_only_a_beginning_that_all_have_and_no_answer_is_shared() -> None:
    long = tuple(range(20))
    one, two = Encoded((*long, 31, 32, 33), 21, 0), Encoded((*long, 41, 42), 21, 1)
    row = pack([one, two])
    assert (row.shared, row.saved, row.bounds) == (20, 20, (20, 23, 25, 128))
    assert row.ids[:, : row.tokens].tolist() == [[*long, 31, 32, 33, 41, 42]]
    assert row.positions[:, : row.tokens].tolist() == [[*range(20), 20, 21, 22, 20, 21]]
    assert row.predicting.tolist() == [20, 21, 23] and row.targets.tolist() == [32, 33, 42]
    same = Encoded((*long, 31), 20, 2)
    assert pack([same, same]).shared == 19, "the last token of the prompt predicts, for each its own"
    assert pack([one]).shared == pack([one, two], share=False).shared == 0
    assert pack([one, Encoded((*long[:7], 5, 6), 8, 3)]).shared == 0, "too short to be worth it"


@given(st.integers(3, 60), st.integers(1, 40), st.integers(0, 70), st.integers())
def test_skips_only_ever_lengthen_distances(length: int, most: int, after: int, seed: int) -> None:
    item = items([length])[0]
    found = skip_positions(item, most, random.Random(seed), after)
    kept = min(after, length - 1)
    assert list(found.positions[:kept]) == list(range(kept))
    steps = [after - before for before, after in pairwise(found.positions)]
    assert (found.ids, found.answer_start) == (item.ids, item.answer_start)
    assert len(found.positions) == length and found.positions[0] >= 0
    assert all(step >= 1 for step in steps) and sum(step > 1 for step in steps) <= MOST_SKIPS
    assert found.positions[-1] <= length - 1 + MOST_SKIPS * most


def test_positions_are_an_example_s_own_after_what_is_shared() -> None:
    long = tuple(range(20))
    one, two = Encoded((*long, 31, 32, 33), 21, 0), Encoded((*long, 41, 42), 21, 1, (*range(12), *range(15, 25)))
    row = pack([one, two])
    assert row.shared == 12, "what has other positions is not the same"
    assert row.positions[:, : row.tokens].tolist() == [[*range(12), *range(12, 23), *range(15, 25)]]
    assert pack([two, one], share=False).positions.tolist() == [[*two.positions, *range(23)]]


def test_a_row_without_supervised_tokens_is_refused() -> None:
    with pytest.raises(CogumiError, match="no supervised token"):
        pack([Encoded((1, 2, 3), 3, 0)])


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(CogumiError, match="an example of 12 tokens does not fit in a row of 10"):
        rows_of(items([4, 12]), 10)


@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=150), tokens=st.integers(1, 300), seed=st.integers(0, 9)
)
def test_an_epoch_holds_every_example_once_within_the_budget(lengths: list[int], tokens: int, seed: int) -> None:
    encoded = items(lengths)
    steps = steps_of(encoded, tokens, seed)
    assert sorted(item.index for step in steps for item in step) == list(range(len(lengths)))
    assert all(len(step) == 1 or sum(len(item.ids) for item in step) <= tokens for step in steps)
    assert steps == steps_of(encoded, tokens, seed)


@given(lengths=st.lists(st.integers(2, 90), min_size=1, max_size=60), room=st.integers(90, 400))
def test_rows_hold_every_example_once_and_are_mostly_full(lengths: list[int], room: int) -> None:
    rows = rows_of(items(lengths), room)
    assert sorted(item.index for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(len(item.ids) for item in row) for row in rows]
    assert all(size <= room for size in filled)
    assert sum(size <= room // 2 for size in filled) <= 1, "first fit leaves at most one row half empty"


def test_the_schedule_is_epochs_and_a_share_of_one_and_stops() -> None:
    encoded = items([10] * 40)
    assert len(schedule(encoded, 100, 1.0, 1000, 0)) == 4
    assert len(schedule(encoded, 100, 2.5, 1000, 0)) == 10
    assert len(schedule(encoded, 100, 0.1, 1000, 0)) == 1
    assert len(schedule(encoded, 100, 2.5, 7, 0)) == 7
    two = schedule(encoded, 100, 2.0, 1000, 0)
    assert two[:4] != two[4:], "each epoch has an order of its own"
