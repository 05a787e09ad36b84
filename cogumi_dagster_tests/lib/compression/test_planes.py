from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.compression import planes as module
from cogumi_dagster.lib.compression.planes import FLOATS, LAYOUTS, block_bytes, join, plane_bytes, plane_names, split

KINDS = [*FLOATS, *LAYOUTS]
JOINED = ("Q5_0", "Q6_K", "Q3_K")
"""Types without a minimum whose codes are cut into low and high bits."""


def random_blocks(kind: str, blocks: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(blocks * (block_bytes(kind) or 1))


def scaled_blocks(kind: str, blocks: int) -> np.ndarray[Any, Any]:
    """Random blocks whose float16 fields are sane numbers: what any quantizer could have written."""
    rows = np.frombuffer(random_blocks(kind, blocks), np.uint8).reshape(blocks, -1).copy()
    at = 0
    draw = np.random.default_rng(1)
    for name, size in LAYOUTS[kind].fields.items():
        if name in ("d", "m", "dmin"):
            values = draw.uniform(0.01, 0.1, blocks) * (-8 if name == "m" else 1)
            rows[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(blocks, 2)
        at += size
    return rows


def weights(kind: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = dequantize(rows, GGMLQuantizationType[kind])
    return found.reshape(len(rows), -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bytes_survive(kind: str, data: st.DataObject) -> None:
    size = block_bytes(kind) or 1
    blocks = data.draw(st.integers(1, 4))
    some = data.draw(st.binary(min_size=blocks * size, max_size=blocks * size))
    planes = split(kind, some)
    assert [len(plane) for plane in planes] == plane_bytes(kind, len(some))
    assert len(planes) == len(plane_names(kind))
    assert join(kind, [plane.tobytes() for plane in planes], len(some)).tobytes() == some


@pytest.mark.parametrize("kind", KINDS)
def test_any_planes_join_to_something(kind: str) -> None:
    """A package may say anything: planes that no block gives must not crash, and give the size that was asked for."""
    length = 3 * (block_bytes(kind) or 1)
    draw = np.random.default_rng(0)
    for _ in range(20):
        assert len(join(kind, [draw.bytes(size) for size in plane_bytes(kind, length)], length)) == length


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_ggml(kind: str) -> None:
    weights_in_block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert block_bytes(kind) == size
    if kind in LAYOUTS:
        assert LAYOUTS[kind].fields[LAYOUTS[kind].low.field] * 8 // LAYOUTS[kind].low.bits == weights_in_block
        if high := LAYOUTS[kind].high:
            assert LAYOUTS[kind].fields[high.field] * 8 // high.bits == weights_in_block


def test_a_type_without_a_layout_is_said_to_have_none() -> None:
    assert block_bytes("IQ2_XXS") is None


def codes_of(kind: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The codes as they are stored, signed, one for each weight in the order of the weights."""
    stored = LAYOUTS[kind].stored
    found = dict(zip(plane_names(kind), split(kind, rows.tobytes()), strict=True))
    codes = found["codes"]
    if "zeros" in found:
        (codes,) = module._zeros_back(found["zeros"], [codes])
    spread = module._spread(codes.reshape(len(rows), -1), stored).astype(int)
    return np.where(spread >= 1 << (stored.bits - 1), spread - (1 << stored.bits), spread)


@pytest.mark.parametrize("kind", JOINED)
def test_joined_codes_are_the_weights(kind: str) -> None:
    """gguf's own reader says what a code is worth: within a group, the weight is a multiple of it."""
    rows = scaled_blocks(kind, 64)
    group = 32 if kind == "Q5_0" else 16
    values, codes = weights(kind, rows).reshape(-1, group), codes_of(kind, rows).reshape(-1, group)
    steps = (values * codes).sum(1) / np.maximum(1, (codes * codes).sum(1))
    assert np.allclose(values, steps[:, None] * codes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"])
def test_code_0_is_the_weight_nearest_to_zero(kind: str) -> None:
    rows = scaled_blocks(kind, 256)
    values, codes = weights(kind, rows), codes_of(kind, rows)
    group = {"Q2_K": 16}.get(kind, 32)
    seen = 0
    for value, code in zip(values.reshape(-1, group), codes.reshape(-1, group), strict=True):
        if value.min() < 0 < value.max() and (code == 0).any():  # zero lies between what this group can say
            seen += 1
            assert np.abs(value[code == 0]).max() <= np.abs(value).min() + 1e-4
    assert seen > 20


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_pruned_weights_have_code_0_in_every_block(kind: str) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.02, (512, 32)).astype(np.float32)
    values[draw.random(values.shape) < 0.5] = 0.0
    rows = quantize(values, GGMLQuantizationType[kind])
    codes = codes_of(kind, rows)
    assert (codes[values == 0] == 0).mean() > 0.97, "the quantizer's scale is rounded to float16 after it is used"
    low, high = LAYOUTS[kind].fields["d"] + LAYOUTS[kind].fields["m"], len(rows[0])
    plain = np.bincount(rows[:, low:high].reshape(-1), minlength=256)
    assert plain.max() / plain.sum() < 0.3, "as they are stored, no code stands out"


def test_floats_that_are_zero_cost_a_bit() -> None:
    values = np.array([0.0, 1.5, 0.0, -2.25, 0.0], np.float16)
    zeros, top, low = split("F16", values.tobytes())
    assert zeros.tolist() == [0b10101000]
    assert top.tolist() == [0x3E, 0xC0, 0, 0, 0]
    assert low.tolist() == [0x00, 0x80, 0, 0, 0]


def test_rare_zeros_stay_in_their_places() -> None:
    values = np.array([0.0, 1.5, 2.5, -2.25, 3.0, 1.0, 1.0, 1.0], np.float16)
    zeros, top, _ = split("F16", values.tobytes())
    assert zeros.tolist() == [0] and top[0] == 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1"])
def test_pruned_codes_come_last(kind: str) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.02, (64, 32)).astype(np.float32)
    values[draw.random(values.shape) < 0.6] = 0.0
    zeros, codes, *_ = split(kind, quantize(values, GGMLQuantizationType[kind]).tobytes())
    assert 0.55 < np.unpackbits(zeros).mean() < 0.7
    assert not codes[-int(np.unpackbits(zeros).sum()) :].any() and codes[: len(codes) // 4].all()
