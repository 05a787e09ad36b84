from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogumi_dagster.lib.compression import sensitivity
from cogumi_dagster.lib.compression.gguf_layout import unpermute
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.mix import candidates, read_layout
from cogumi_dagster.lib.compression.sensitivity import (
    Curvature,
    KlMeter,
    class_of,
    fit_scales,
    measure_curvature,
    predict_losses,
    scaled,
)  # fmt: skip
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import load_checkpoint

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded(student: Path) -> Loaded:
    return load_checkpoint(student, "float32")


@pytest.fixture(scope="module")
def curvature(loaded: Loaded, pairs: list[Pair]) -> dict[str, Curvature]:
    return measure_curvature(*loaded, pairs)


@pytest.fixture(scope="module")
def meter(loaded: Loaded, pairs: list[Pair]) -> KlMeter:
    return KlMeter(*loaded, pairs, tokens=2000)


@pytest.fixture(scope="module")
def weights(f16_gguf: Path) -> dict[str, Any]:
    return {name: values for name, _, values in open_gguf(f16_gguf).tensors() if values.ndim == 2}


MATRICES = ["blk.0.attn_q.weight", "blk.1.attn_v.weight", "blk.0.ffn_up.weight", "blk.1.ffn_down.weight",
            "token_embd.weight"]  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_the_cost_of_small_noise_is_foretold(
    name: str, curvature: dict[str, Curvature], meter: KlMeter, weights: dict[str, Any]
) -> None:
    draw = np.random.default_rng(1)
    predicted = measured = 0.0
    for _ in range(4):
        noise = 0.02 * weights[name].std() * draw.normal(size=weights[name].shape).astype(np.float32)
        predicted += curvature[name].loss(noise)
        measured += meter.measure({name: weights[name] + noise})
    assert 0.3 < measured / predicted < 6.0, "that much is left for the factor of its class"


def test_columns_without_input_cost_nothing() -> None:
    one = Curvature(((np.array([1.0, 2.0]), np.array([0.0, 3.0])),))
    assert one.loss(np.array([[5.0, 0.0], [5.0, 0.0]])) == 0.0
    assert one.loss(np.array([[0.0, 1.0], [0.0, 1.0]])) == 0.5 * (1 * 3 + 2 * 3)


def test_a_sample_of_rows_stands_for_all() -> None:
    draw = np.random.default_rng(0)
    heavy = np.where(np.arange(2000) % 100 == 0, 50.0, 0.1) * draw.random(2000)
    whole = Curvature(((heavy, draw.random(64)), (draw.random(2000), draw.random(64))))
    change = draw.normal(size=(2000, 64))
    indices, part = whole.sampled(256)
    assert len(indices) <= 256 and set(np.argsort(heavy)[-5:]) <= set(indices), "what matters most is there"
    assert part.loss(change[indices]) == pytest.approx(whole.loss(change), rel=0.1)
    assert whole.sampled(2000)[1] is whole


def test_a_tied_embedding_is_weighed_as_head_and_as_table(
    curvature: dict[str, Curvature], untied_student: Path, pairs: list[Pair]
) -> None:
    assert len(curvature["token_embd.weight"].terms) == 2 and "output.weight" not in curvature
    untied = measure_curvature(*load_checkpoint(untied_student, "float32"), pairs)
    assert len(untied["token_embd.weight"].terms) == len(untied["output.weight"].terms) == 1


def test_rows_stand_in_the_order_of_the_file(
    loaded: Loaded, curvature: dict[str, Curvature], pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "permute", lambda rows, heads: rows)
    ((plain, _),) = measure_curvature(*loaded, pairs)["blk.0.attn_q.weight"].terms
    ((rows, _),) = curvature["blk.0.attn_q.weight"].terms
    np.testing.assert_allclose(unpermute(rows, loaded[0].config.num_attention_heads), plain, rtol=1e-5)
    assert not np.allclose(rows, plain)


def test_a_measurement_leaves_the_model_as_it_was(meter: KlMeter, weights: dict[str, Any], loaded: Loaded) -> None:
    model, _ = loaded
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert meter.measure({}) == pytest.approx(0.0, abs=1e-9)
    assert meter.measure(weights) < 1e-4, "the F16 file says what the model says: heads are unpermuted"
    assert meter.measure({name: 1.5 * weights[name] for name in MATRICES[:1]}) > 1e-3
    assert meter.measure({}) == pytest.approx(0.0, abs=1e-9)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_more_bits_cost_less_and_a_class_is_scaled_by_what_was_measured(
    f16_gguf: Path, curvature: dict[str, Curvature], meter: KlMeter
) -> None:
    options = candidates(read_layout(f16_gguf), ("Q8_0", "Q5_0", "Q4_0"))
    losses = predict_losses(f16_gguf, curvature, options, None)
    for name, by_kind in losses.items():
        assert list(by_kind) == ["F16", "Q8_0", "Q5_0", "Q4_0"]
        assert 0.0 == by_kind["F16"] < by_kind["Q8_0"] < by_kind["Q5_0"] < by_kind["Q4_0"], name
    scales = fit_scales(meter, f16_gguf, losses, None)
    assert set(scales) == {class_of(name) for name in losses}
    fitted = scaled(losses, scales)
    ups = {n: v for n, _, v in open_gguf(f16_gguf).tensors() if class_of(n) == "ffn_up"}
    stored = {n: sensitivity.stored_as(v, "Q4_0", None) for n, v in ups.items()}
    assert sum(fitted[n]["Q4_0"] for n in ups) == pytest.approx(meter.measure(stored), rel=1e-4)
