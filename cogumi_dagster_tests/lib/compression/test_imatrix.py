from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix, collect_imatrix, read_imatrix, require_fit, write_imatrix
from cogumi_dagster.lib.compression.mix import read_layout
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.student import load_checkpoint


@pytest.fixture(scope="module")
def loaded(student: Path) -> tuple[Any, Any]:
    return load_checkpoint(student, "float32")


@pytest.fixture(scope="module")
def collected(loaded: tuple[Any, Any], pairs: list[Pair]) -> Imatrix:
    return collect_imatrix(*loaded, pairs, dataset="sums")


def test_it_is_the_mean_square_of_what_each_layer_is_given(
    loaded: tuple[Any, Any], collected: Imatrix, pairs: list[Pair]
) -> None:
    model, tokenizer = loaded
    layer, given = model.model.layers[1].mlp, []
    hook = layer.gate_proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0]))
    encoded, _ = encode_pairs(tokenizer, pairs, 10_000)
    with torch.no_grad():
        states = [model.model(input_ids=torch.tensor([item.ids])).last_hidden_state[0] for item in encoded]
    hook.remove()
    assert collected.tokens == sum(len(item.ids) for item in encoded) == sum(map(len, states))
    for name, inputs in {"blk.1.ffn_gate.weight": given, "token_embd.weight": states}.items():
        expected = torch.cat(inputs).double().square().mean(0)
        np.testing.assert_allclose(collected.importance(name), expected, rtol=1e-3)
    np.testing.assert_array_equal(collected.sums["blk.1.ffn_gate.weight"], collected.sums["blk.1.ffn_up.weight"])


def test_every_matrix_has_its_columns(f16_gguf: Path, collected: Imatrix) -> None:
    shapes = read_layout(f16_gguf).shapes
    require_fit(collected, shapes)
    assert set(collected.sums) == {name for name, shape in shapes.items() if len(shape) == 2}


def test_an_untied_head_has_a_name_of_its_own(untied_student: Path, pairs: list[Pair]) -> None:
    imatrix = collect_imatrix(*load_checkpoint(untied_student, "float32"), pairs)
    assert "output.weight" in imatrix.sums and "token_embd.weight" not in imatrix.sums


def test_only_as_much_text_as_asked_is_read(loaded: tuple[Any, Any], collected: Imatrix, pairs: list[Pair]) -> None:
    short = collect_imatrix(*loaded, pairs, tokens=300)
    assert 300 <= short.tokens < 400 < collected.tokens


def test_it_is_written_as_llama_imatrix_writes_it(collected: Imatrix, tmp_path: Path) -> None:
    write_imatrix(collected, tmp_path / "imatrix.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    file = open_gguf(tmp_path / "imatrix.gguf")
    assert file.metadata["general.type"] == "imatrix"
    assert file.metadata["imatrix.datasets"] == ["sums"]
    assert file.metadata["imatrix.chunk_size"] == 512 and file.metadata["imatrix.chunk_count"] >= 1
    shapes = {tensor.name: list(tensor.shape) for tensor in file.reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == [128, 1], "columns first, one matrix"
    assert shapes["blk.0.ffn_down.weight.counts"] == [1, 1]


def test_it_comes_back_as_it_was(collected: Imatrix, tmp_path: Path) -> None:
    write_imatrix(collected, tmp_path / "imatrix.gguf")
    again = read_imatrix(tmp_path / "imatrix.gguf")
    assert (again.counts, again.datasets, again.tokens) == (dict(collected.counts), ("sums",), collected.tokens)
    for name, values in collected.sums.items():
        np.testing.assert_array_equal(again.sums[name], values)


def test_too_little_text_is_refused(loaded: tuple[Any, Any], pairs: list[Pair]) -> None:
    with pytest.raises(CogumiError, match=r"too small: \d+ tokens, at least 256"):
        collect_imatrix(*loaded, pairs[:2])


def test_another_file_is_refused(f16_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="is not an importance matrix"):
        read_imatrix(f16_gguf)
    with pytest.raises(CogumiError, match="there is no file"):
        read_imatrix(tmp_path / "absent.gguf")


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_values_that_are_no_squares_are_refused(collected: Imatrix, tmp_path: Path, value: float) -> None:
    spoilt = {**collected.sums, "blk.0.attn_q.weight": np.full(64, value, np.float32)}
    write_imatrix(Imatrix(spoilt, collected.counts), tmp_path / "imatrix.gguf")
    with pytest.raises(CogumiError, match=r"blk.0.attn_q.weight holds values that are no sums of squares"):
        read_imatrix(tmp_path / "imatrix.gguf")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda sums: sums.pop("blk.1.ffn_up.weight"), "has nothing on blk.1.ffn_up.weight"),
        (lambda sums: sums.update({"token_embd.weight": np.ones(32)}), "has 32 columns of token_embd.weight"),
    ],
)
def test_the_matrix_of_another_model_is_refused(
    collected: Imatrix, f16_gguf: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    sums = dict(collected.sums)
    change(sums)
    with pytest.raises(CogumiError, match=problem):
        require_fit(Imatrix(sums, collected.counts), read_layout(f16_gguf).shapes)
