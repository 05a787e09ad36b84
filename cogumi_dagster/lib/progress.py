"""Progress of long work, reported without knowing who listens (terminal, Dagster log, test)."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""``progress(done, total, note)``: units done, units in all, a short note such as ``loss 2.31``."""


def in_parts(progress: Progress, total: int) -> Callable[[int], Progress]:
    """``part(size)`` gives the listener of the next ``size`` of ``total`` units."""
    begun = 0

    def part(size: int) -> Progress:
        nonlocal begun
        start, begun = begun, begun + size
        return lambda done, _, note: progress(start + done, total, note)

    return part


def silent(done: int, total: int, note: str = "") -> None:
    """The listener that listens to nothing."""
