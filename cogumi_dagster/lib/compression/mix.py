"""Which type each tensor gets: the least predicted loss whose bytes stay within a budget.

A multiple-choice knapsack: one type a tensor, bytes bounded, losses added. HiGHS (through scipy) solves it exactly; for
the 211 matrices of a 135M model in ten types each that takes a fraction of a second.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path

import numpy as np

from cogumi_dagster.lib.compression.ggml import fits, row_bytes
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.sensitivity import Losses, class_of
from cogumi_dagster.lib.errors import CogumiError

ALIGNMENT = 32
HEADER_GROWTH = 1024
"""Bytes set aside for the keys that llama.cpp adds to a header: quantization version, importance matrix (about 300)."""

GAP = 1e-6
"""Share of the best loss by which the solution may miss it."""

TOLERANCE = 2e-6
"""Share of the budget left free: HiGHS takes 0.999999 for one."""

LARGEST = 1e4
"""What the largest loss is scaled to: HiGHS also stops within 1e-6 of the best, and losses are near that in nats."""

INFEASIBLE = 2
SOLVER_SECONDS = 30.0

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """What an unquantized GGUF holds: each tensor's type and (rows, columns), and the bytes of its header."""

    kinds: Mapping[str, str]
    shapes: Shapes
    header: int

    def bytes_as(self, types: Mapping[str, str]) -> int:
        """Bytes of the file with these tensors in these types and the others as they are, at most."""
        return self.header + HEADER_GROWTH + sum(self.tensor_bytes(n, types.get(n, k)) for n, k in self.kinds.items())

    def tensor_bytes(self, name: str, kind: str) -> int:
        *rows, columns = self.shapes[name]
        return -(-prod(rows) * row_bytes(kind, columns) // ALIGNMENT) * ALIGNMENT


def read_layout(gguf: Path) -> Layout:
    """The layout of an F16, BF16 or F32 GGUF.

    Raises:
        CogumiError: not a GGUF, or one that is quantized already.
    """
    reader = open_gguf(gguf).reader
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    quantized = [name for name, kind in kinds.items() if kind not in ("F32", "F16", "BF16")]
    if quantized:
        raise CogumiError(
            f"{gguf} is quantized already: {quantized[0]} is {kinds[quantized[0]]}",
            "start from its 16-bit parent: each rounding adds its error to the last",
        )
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    return Layout(kinds, shapes, int(reader.data_offset))


def candidates(layout: Layout, kinds: Sequence[str]) -> dict[str, list[str]]:
    """Each matrix's own type and those of ``kinds`` whose blocks fit its rows."""
    return {
        name: [layout.kinds[name], *(kind for kind in kinds if fits(kind, shape[1]))]
        for name, shape in layout.shapes.items()
        if len(shape) == 2
    }


def smallest_types(layout: Layout, options: Mapping[str, Iterable[str]], budget: int) -> dict[str, str]:
    """The smallest type of each tensor.

    Raises:
        CogumiError: the budget is below what they take.
    """
    smallest = {name: min(kinds, key=partial(layout.tensor_bytes, name)) for name, kinds in options.items()}
    least = layout.bytes_as(smallest)
    if least > budget:
        used = ", ".join(kind for kind, _ in Counter(smallest.values()).most_common(2))
        raise CogumiError(
            f"a budget of {budget / 1e6:.2f} MB cannot be met: the smallest mix of this model ({used}) takes "
            f"{least / 1e6:.2f} MB",
            f"give at least {ceil(least / 1e4) / 100:.2f}MB, trim the vocabulary, or take a smaller student",
        )
    return smallest


def choose_types(layout: Layout, losses: Losses, budget: int) -> dict[str, str]:
    """tensor -> type, of those in ``losses``: the mix of least predicted loss whose file is at most ``budget`` bytes.

    Raises:
        CogumiError: even the smallest mix is larger; it is named.
    """
    smallest = smallest_types(layout, losses, budget)
    options = [
        (name, kind, layout.tensor_bytes(name, kind), loss) for name in losses for kind, loss in losses[name].items()
    ]
    fixed = layout.bytes_as({}) - sum(layout.tensor_bytes(name, layout.kinds[name]) for name in losses)
    return _solve(options, budget - fixed) or smallest


def _solve(options: Sequence[tuple[str, str, int, float]], room: int) -> dict[str, str]:
    """One type a name: least total loss with total bytes within ``room``; {} where HiGHS's tolerance lets none fit."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = {name: row for row, name in enumerate(dict.fromkeys(name for name, *_ in options))}
    rows, columns = [names[name] for name, *_ in options], np.arange(len(options))
    one_each = csr_array((np.ones(len(options)), (rows, columns)))
    units = csr_array(np.array([[size // ALIGNMENT for _, _, size, _ in options]], np.float64))
    fits_in = int(room * (1 - TOLERANCE)) // ALIGNMENT
    losses = np.array([loss for *_, loss in options])
    result = milp(
        losses * (LARGEST / (losses.max() or 1.0)),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(units, -np.inf, fits_in)],
        options={"mip_rel_gap": GAP, "time_limit": SOLVER_SECONDS},
    )
    if result.x is None and result.status != INFEASIBLE:
        raise CogumiError(f"no mix was found in {SOLVER_SECONDS:g} s: {result.message}", "give another budget")
    chosen = [] if result.x is None else np.flatnonzero(result.x > 0.5).tolist()
    return {options[index][0]: options[index][1] for index in chosen}


def types_by_class(types: Mapping[str, str]) -> dict[str, str]:
    """``{"ffn_down": "Q3_K 12, Q4_K 18", ...}``: how many tensors of each class are in each type."""
    counts: dict[str, Counter[str]] = {}
    for name, kind in types.items():
        counts.setdefault(class_of(name), Counter())[kind] += 1
    return {
        kind: ", ".join(f"{type} {count}" if count > 1 else type for type, count in sorted(counter.items()))
        for kind, counter in counts.items()
    }
