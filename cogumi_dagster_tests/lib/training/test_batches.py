import random
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import (
    Encoded,
    Pair,
    batches_of,
    collate,
    encode_pairs,
    prompt_ids,
    supervised_logits,
)  # fmt: skip
from cogumi_dagster.lib.training.student import load_checkpoint


@pytest.fixture(scope="module")
def loaded(student: Path) -> tuple[Any, Any]:
    return load_checkpoint(student, "float32")


def items(lengths: list[int]) -> list[Encoded]:
    return [Encoded(tuple(range(length)), max(1, length // 2), index) for index, length in enumerate(lengths)]


def test_only_answers_are_supervised(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    _, tokenizer = loaded
    encoded, too_long = encode_pairs(tokenizer, pairs, 512)
    assert too_long == 0
    batch = collate(encoded, tokenizer.pad_token_id)
    for row, item in enumerate(encoded):
        pair = pairs[item.index]
        supervised = batch.targets[row][batch.targets[row] != -100].tolist()
        assert tokenizer.decode(supervised[:-1]) == pair.response
        assert supervised[-1] == tokenizer.eos_token_id
        assert batch.ids[row, : item.answer_start].tolist() == prompt_ids(tokenizer, pair.instruction)
        assert int(batch.mask[row].sum()) == len(item.ids)
    assert batch.supervised == sum(len(item.ids) - item.answer_start for item in encoded)
    assert batch.tokens == sum(len(item.ids) for item in encoded)


def test_the_prompt_is_the_chat_template(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = tokenizer.decode(prompt_ids(tokenizer, "Say hi."))
    assert text.endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")


def test_the_loss_is_that_of_transformers(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = loaded
    batch = collate(encode_pairs(tokenizer, pairs[:6], 512)[0], tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss
        ours = torch.nn.functional.cross_entropy(*supervised_logits(model, batch))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_supervised_logits_are_those_of_the_full_pass(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    import torch

    model, tokenizer = loaded
    batch = collate(encode_pairs(tokenizer, pairs[:3], 512)[0], tokenizer.pad_token_id)
    with torch.no_grad():
        full = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
        logits, targets = supervised_logits(model, batch)
    chosen = batch.targets[:, 1:] != -100
    torch.testing.assert_close(logits, full[chosen], rtol=1e-4, atol=1e-4)
    assert targets.tolist() == batch.targets[:, 1:][chosen].tolist()


def test_a_batch_without_supervised_tokens_is_refused() -> None:
    with pytest.raises(CogumiError, match="no supervised token"):
        collate([Encoded((1, 2, 3), 3, 0)], 0)


def test_examples_that_do_not_fit_are_counted(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    _, tokenizer = loaded
    long = Pair("Say much.", "much " * 200)
    encoded, too_long = encode_pairs(tokenizer, [*pairs, long], 100)
    assert too_long == 1
    assert [item.index for item in encoded] == list(range(len(pairs)))
    with pytest.raises(CogumiError, match="none of 1 examples fits in 100 tokens"):
        encode_pairs(tokenizer, [long], 100)


def test_evaluation_sees_every_example_once() -> None:
    encoded = items([random.Random(0).randint(2, 40) for _ in range(30)])
    batches = list(batches_of(encoded, 100, 0))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(30))
