"""A report as Dagster metadata: numbers to plot over time, tables, and small SVGs that render inline."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from cogumi_dagster.lib.evaluation import plots
from cogumi_dagster.lib.report.figures import frontier_plot

MAX_ROWS = 20


def metadata_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Each top-level figure of a report's JSON form as the metadata value that shows it best."""
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == "curve" and value:
            shown["loss"] = svg(sparkline([float(y) for _, y in value]))
            shown["loss_curve"] = svg(plots.line_plot({"loss": [(x, y) for x, y in value]}, "Loss", "step", "loss"))
        elif name == "curves":
            for title, line in value.items():
                if line:
                    shown[f"{title.replace(' ', '_')}_curve"] = svg(
                        plots.line_plot({title: [(x, y) for x, y in line]}, title.capitalize(), "step", title)
                    )
        elif name == "rows" and _is_table(value) and "perplexity_ratio" in value[0]:
            shown["frontier"] = svg(frontier_plot(value))
            shown[name] = dg.MetadataValue.md(table(value))
        elif name == "points" and value:
            shown["map"] = svg(
                plots.scatter_plot(
                    [plots.Point(x, y, group=str(label)) for x, y, label in value],
                    "Failures by pattern",
                    "PC 1",
                    "PC 2",
                )
            )
        elif _is_proportion(value):
            shown[name] = _proportion(value)
        elif isinstance(value, Mapping) and {"title", "x", "y", "series"} == set(value):
            shown[name] = svg(plots.line_plot(value["series"], value["title"], value["x"], value["y"]))
        elif isinstance(value, bool | int | float | str):
            shown[name] = value
        elif _is_table(value):
            shown[name] = dg.MetadataValue.md(table(value))
        elif isinstance(value, Mapping) and 0 < len(value) <= MAX_ROWS and all(map(_is_figure, value.values())):
            shown[name] = dg.MetadataValue.md(table([{"": key, "value": part} for key, part in value.items()]))
        elif isinstance(value, Mapping | list | tuple) and value:
            shown[name] = dg.MetadataValue.json(json.loads(json.dumps(value, default=str)))
    return shown


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or _is_proportion(value)


def _is_proportion(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high", "count"} <= set(value)


def _proportion(value: Mapping[str, Any]) -> str:
    if value["value"] is None:
        return f"not evaluated ({value['count']} cases)"
    of = f"{value['successes']} of {value['count']}" if "successes" in value else f"{value['count']} cases"
    return f"{value['value']:.3f} ({of}; 95 %: {value['low'] or 0:.3f} to {value['high'] or 0:.3f})"


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    columns = list(rows[0])
    lines = [" | ".join(column.replace("_", " ") for column in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(column)) for column in columns) for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        lines.append(f"and {len(rows) - MAX_ROWS:,} more" + " |" * (len(columns) - 1))
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    if _is_proportion(value):
        return _proportion(value)
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "; ".join(map(cell, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {cell(part)}" for name, part in value.items()) or "–"
    return str(value).replace("|", "\\|").replace("\n", " ")


def sparkline(values: Sequence[float], points: int = 24) -> str:
    """A line small enough to be drawn in the table itself: the UI folds Markdown of 1,000 characters or more."""
    picked = [values[round(i * (len(values) - 1) / max(1, points - 1))] for i in range(min(points, len(values)))]
    low, high = min(picked), max(picked)
    step, span = 200 / max(1, len(picked) - 1), (high - low) or 1.0
    line = " ".join(f"{40 + i * step:.0f},{44 - 36 * (value - low) / span:.0f}" for i, value in enumerate(picked))
    ends = f'<text x="0" y="28">{picked[0]:.2f}</text><text x="246" y="28">{picked[-1]:.2f}</text>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="290" height="50" '
        'font-size="12" font-family="sans-serif" fill="#7a8291">'
        f'{ends}<polyline points="{line}" fill="none" stroke="#3f86d9" stroke-width="2"/></svg>'
    )


def svg(text: str) -> dg.MarkdownMetadataValue:
    """An SVG that the UI renders inline."""
    return dg.MetadataValue.md(f"![plot](data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()})")
