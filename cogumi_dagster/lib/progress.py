"""Progress of long work, reported without knowing who listens (terminal, Dagster log, test)."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""``progress(done, total, note)``: units done, units in all, a short note such as ``loss 2.31``."""


def silent(done: int, total: int, note: str = "") -> None:
    """The listener that listens to nothing."""
