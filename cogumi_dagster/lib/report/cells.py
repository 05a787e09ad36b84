"""How a report shows its figures: a table, and what stands in a cell."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactRef


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: Any) -> str:
    """A figure as people read it."""
    if value is None:
        return "not evaluated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 10):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def proportion(value: Mapping[str, Any] | None) -> str:
    """``0.71 (17 of 24; 0.51 to 0.85)``."""
    if not value or value.get("value") is None:
        return "not evaluated"
    of = f"{value['successes']} of {value['count']}" if "successes" in value else f"n = {value['count']}"
    if value.get("low") is None:
        return f"{value['value']:.3f} ({of})"
    return f"{value['value']:.3f} ({of}; {value['low']:.2f} to {value['high']:.2f})"


def share(value: float | None) -> str:
    return number(None) if value is None else f"{value:.1%}"


def right(value: Mapping[str, Any] | None) -> str:
    """``17 of 24``."""
    return f"{value['successes']} of {value['count']}" if value else ""


def label(ref: ArtifactRef) -> str:
    manifest = ref.manifest
    return f"{manifest.asset}[{manifest.partition}]" if manifest.partition else manifest.asset


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
