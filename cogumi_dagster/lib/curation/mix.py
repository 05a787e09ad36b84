"""Choose rows so that domains and difficulties come close to their targets while most of the data stays."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Cell = tuple[str, str]
"""(domain, difficulty)."""

KEEP_AT_LEAST = 0.5
"""The targets are worth up to half of the rows, never most of them."""
CLOSE = 0.02
"""Total variation, domains and difficulties added, at which the mix is as asked and nothing more is dropped."""
GAIN = 0.01
"""Nor are rows dropped for less than this: of the mixes about as near as the nearest, the largest is taken."""


@dataclass(frozen=True)
class MixRow:
    """One domain or difficulty: its target share, its actual share and their difference, and its rows."""

    name: str
    target: float
    actual: float
    deviation: float
    rows: int
    available: int


def choose_counts(
    available: Mapping[Cell, int], domains: Mapping[str, float], difficulties: Mapping[str, float]
) -> dict[Cell, int]:
    """How many rows to take from each cell.

    Drops one row at a time from the cell most over its targets (domain and difficulty together), at most half of
    them, and goes back to the largest selection that is close, or about as close as any.
    """
    cells = {cell: count for cell, count in sorted(available.items()) if count}
    if not cells:
        return {}
    axes = (domains, difficulties)
    have: list[Counter[str]] = [Counter(), Counter()]
    for cell, count in cells.items():
        for axis, name in zip(have, cell, strict=True):
            axis[name] += count
    size = total = sum(cells.values())

    def excess(cell: Cell) -> float:
        return sum(axis[name] / size - want.get(name, 0.0) for axis, want, name in zip(have, axes, cell, strict=True))

    path: list[Cell] = []
    distances = [_distance(have, axes)]
    while distances[-1] > CLOSE and size - 1 >= total * KEEP_AT_LEAST:
        worst = max((cell for cell, count in cells.items() if count), key=excess)
        cells[worst] -= 1
        for axis, name in zip(have, worst, strict=True):
            axis[name] -= 1
        size -= 1
        path.append(worst)
        distances.append(_distance(have, axes))
    near_enough = max(CLOSE, min(distances) + GAIN)
    stop = next(step for step, value in enumerate(distances) if value <= near_enough)
    for cell in path[stop:]:
        cells[cell] += 1
    return cells


def _distance(have: Sequence[Mapping[str, int]], axes: Sequence[Mapping[str, float]]) -> float:
    """Total variation from both targets, added: 0 is exact, 2 is all wrong."""
    apart = 0.0
    for axis, want in zip(have, axes, strict=True):
        size = sum(axis.values())
        apart += sum(abs(axis.get(name, 0) / size - want.get(name, 0.0)) for name in {*axis, *want}) / 2
    return apart


def mix_table(
    rows: Mapping[str, int], available: Mapping[str, int], targets: Mapping[str, float]
) -> tuple[MixRow, ...]:
    """Target against actual, one row for each name."""
    total = max(1, sum(rows.values()))
    shares = {name: rows.get(name, 0) / total for name in targets}
    return tuple(
        MixRow(
            name=name,
            target=target,
            actual=round(shares[name], 4),
            deviation=round(shares[name] - target, 4),
            rows=rows.get(name, 0),
            available=available.get(name, 0),
        )
        for name, target in targets.items()
    )
