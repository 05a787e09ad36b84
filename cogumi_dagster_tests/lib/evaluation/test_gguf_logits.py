from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import (
    CHARACTERS_PER_TOKEN,
    flatten,
    gguf_answer_logits,
    held_out_pairs,
    perplexity_change,
)
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint


def test_targets_and_perplexity_are_those_of_transformers(student: Path, f16_gguf: Path, pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = load_checkpoint(student, "float32")
    theirs = flatten(answer_logits(model, tokenizer, pairs[:5], 512))
    ours = flatten(gguf_answer_logits(f16_gguf, tokenizer, pairs[:5]))
    assert ours[0][1].tolist() == theirs[0][1].tolist(), "the same order, however it was batched"
    assert torch.allclose(ours[0][0].exp().sum(-1), torch.ones(len(ours[0][1])), atol=1e-4)
    assert perplexity_of(ours)[0] == pytest.approx(perplexity_of(theirs)[0], rel=1e-3)


def test_the_change_of_perplexity_is_bootstrapped_over_answers() -> None:
    import torch

    def outputs(chances: list[list[float]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = [torch.tensor([[c, 1 - c] for c in part]).log() for part in chances]
        return [(logs, torch.zeros(len(logs), dtype=torch.long)) for logs in rows]

    reference = outputs([[0.5, 0.5, 0.5], [0.5]])  # batched otherwise
    same = perplexity_change(reference, outputs([[0.5], [0.5, 0.5], [0.5]]))
    assert (same.value, same.low, same.high, same.count) == (1, 1, 1, 3)
    mixed = perplexity_change(reference, outputs([[0.25], [0.5, 0.5], [0.5]]))
    assert mixed.value == pytest.approx(2 ** (1 / 4)) and mixed.low == 1 and mixed.high == pytest.approx(2)
    even = perplexity_change(reference, outputs([[0.25], [0.25, 0.25], [0.25]]))
    assert even.low == even.high == pytest.approx(2), "every answer the same: nothing to be unsure of"


def test_the_held_out_answers_make_up_the_tokens_wanted(pairs: list[Pair]) -> None:
    chosen = held_out_pairs(pairs, 60)
    assert chosen == pairs[: len(chosen)]
    characters = [len(pair.response) for pair in chosen]
    assert sum(characters[:-1]) / CHARACTERS_PER_TOKEN < 60 <= sum(characters) / CHARACTERS_PER_TOKEN
    assert held_out_pairs(pairs[:2], 10_000) == pairs[:2]
    with pytest.raises(CogumiError, match="the validation split is empty"):
        held_out_pairs([], 60)
