from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.compression.ggml import fits
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf
from cogumi_dagster.lib.compression.mix import (
    HEADER_GROWTH,
    Layout,
    candidates,
    choose_types,
    read_layout,
    types_by_class,
)  # fmt: skip
from cogumi_dagster.lib.compression.quantize import KINDS
from cogumi_dagster.lib.compression.sensitivity import Losses
from cogumi_dagster.lib.errors import CogumiError

TYPES = ("F16", "Q8_0", "Q5_0", "Q4_0")


def layout_of(rows: list[int]) -> Layout:
    names = [f"blk.{number}.ffn_up.weight" for number in range(len(rows))]
    shapes = {name: (count, 64) for name, count in zip(names, rows, strict=True)}
    return Layout(dict.fromkeys(names, "F16"), shapes, 320)


def best(layout: Layout, losses: Losses, budget: int) -> float:
    """The least loss of all mixes, tried one by one."""
    mixes = (dict(zip(losses, kinds, strict=True)) for kinds in product(*losses.values()))
    return min(sum(losses[name][kind] for name, kind in mix.items()) for mix in mixes if layout.bytes_as(mix) <= budget)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    st.lists(st.tuples(*[st.floats(1e-7, 1.0)] * 3), min_size=4, max_size=4),
    st.floats(0.0, 1.0),
)
def test_no_other_mix_within_the_budget_is_better(
    rows: list[int], costs: list[tuple[float, float, float]], share: float
) -> None:
    layout = layout_of(rows)
    losses: Losses = {
        name: dict(zip(TYPES, (0.0, *sorted(costs[number])), strict=True)) for number, name in enumerate(layout.shapes)
    }
    smallest, largest = (layout.bytes_as(dict.fromkeys(losses, kind)) for kind in ("Q4_0", "F16"))
    budget = smallest + round(share * (largest - smallest))
    types = choose_types(layout, losses, budget)
    assert set(types) == set(losses)
    assert layout.bytes_as(types) <= budget
    found = sum(losses[name][kind] for name, kind in types.items())
    room = budget - round(1e-5 * budget) - 1  # the solver leaves a few bytes in a million free
    assert found <= (best(layout, losses, max(smallest, room)) if room >= smallest else found) * (1 + 1e-5) + 1e-9


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    layout = layout_of([1_000_000])
    losses: Losses = {name: dict.fromkeys(TYPES, 0.1) for name in layout.shapes}
    least = layout.bytes_as(dict.fromkeys(losses, "Q4_0"))
    with pytest.raises(CogumiError, match=r"20.00 MB cannot be met: .* \(Q4_0\) takes 36.00 MB") as caught:
        choose_types(layout, losses, 20_000_000)
    assert "at least 36.01MB" in caught.value.mend
    assert set(choose_types(layout, losses, least).values()) == {"Q4_0"}, "the smallest itself can be met"


def test_a_large_budget_keeps_every_tensor_as_it_is(f16_gguf: Path) -> None:
    layout = read_layout(f16_gguf)
    losses = {name: dict.fromkeys(kinds, 0.1) | {kinds[0]: 0.0} for name, kinds in candidates(layout, KINDS).items()}
    assert set(choose_types(layout, losses, 10**9).values()) == {"F16"}


def test_candidates_are_the_types_whose_blocks_fit(f16_gguf: Path, wide_gguf: Path) -> None:
    narrow, wide = (candidates(read_layout(path), KINDS) for path in (f16_gguf, wide_gguf))
    assert "Q4_K" in wide["blk.0.ffn_up.weight"] and "Q4_K" not in narrow["blk.0.ffn_up.weight"]
    assert narrow["blk.0.ffn_up.weight"] == ["F16", *(kind for kind in KINDS if fits(kind, 64))]
    assert "output_norm.weight" not in narrow


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_bytes_are_foretold(f16_gguf: Path, type: str, tmp_path: Path) -> None:
    size = quantize_gguf(f16_gguf, tmp_path / "q.gguf", type).bytes
    layout = read_layout(f16_gguf)
    with pytest.raises(CogumiError, match="is quantized already"):
        read_layout(tmp_path / "q.gguf")
    types = {name: "Q8_0" if name == "token_embd.weight" else type for name in candidates(layout, KINDS)}
    assert 0 <= layout.bytes_as(types) - size <= HEADER_GROWTH


def test_a_mix_reads_as_counts_of_each_class() -> None:
    types = {"token_embd.weight": "Q8_0", **{f"blk.{n}.ffn_up.weight": "Q4_0" if n else "Q5_0" for n in range(4)}}
    assert types_by_class(types) == {"token_embd": "Q8_0", "ffn_up": "Q4_0 3, Q5_0"}
