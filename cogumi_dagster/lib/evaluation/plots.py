"""Small plots as SVG text, without a plotting library. Each is below 15 kB and reads on white and on dark.

The background is transparent and every colour has a middle lightness, so that the same file fits both
themes. Numbers are rounded to a tenth of a pixel; the same input gives the same text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import ReliabilityBin, wilson

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 62, 50

INK = "#7a8291"
"""Text and axes: contrast 3.9 on white and 4.9 on #0d1117."""

COLOURS = ("#3f86d9", "#e0812f", "#2f9e78", "#c65b9a", "#8b72d8", "#a88d1e", "#d9534f", "#4aa3b5")

MAX_POINTS = 160
"""A line is thinned to this many points: more do not show in 560 pixels. Many lines share 900."""

MAX_BARS = 32
MAX_MARKS = 900

TICKS = 5

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Bar:
    """A row of a bar plot; ``low`` and ``high`` are the ends of its interval, if it has one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot. Points of one ``group`` share a colour; a ``label`` is written beside."""

    x: float
    y: float
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class LinePlot:
    """A line plot as part of a report: what ``line_plot`` takes."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def line_plot(series: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str) -> str:
    """Lines over a shared pair of axes. ``x`` and ``y`` are axis titles, with units.

    Raises:
        CogumiError: nothing to draw, or a number that is not finite.
    """
    points = [point for line in series.values() for point in line]
    to_x, to_y, axes = _axes([px for px, _ in points], [py for _, py in points], x, y)
    points_each = min(MAX_POINTS, MAX_MARKS // len(series))
    parts = [axes]
    for index, line in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{to_x(px):.1f},{to_y(py):.1f}" for px, py in _thinned(sorted(line), points_each))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        if len(line) == 1:
            parts.append(_dot(to_x(line[0][0]), to_y(line[0][1]), colour, 4))
    return _svg(title, [*parts, _legend(list(series))])


def scatter_plot(points: Sequence[Point], title: str, x: str, y: str) -> str:
    """Marks with labels. Above 900 points an even sample of those without a label is drawn.

    Raises:
        CogumiError: nothing to draw, or a number that is not finite.
    """
    to_x, to_y, axes = _axes([point.x for point in points], [point.y for point in points], x, y)
    groups = list(dict.fromkeys(point.group for point in points))
    quiet = [point for point in points if not point.label]
    step = math.ceil(len(quiet) / MAX_MARKS) or 1
    parts = [axes]
    for group in groups:
        # A path of zero-length round strokes: 10 bytes a mark, where a circle takes 50.
        marks = "".join(f"M{to_x(p.x):.0f},{to_y(p.y):.0f}h0" for p in quiet[::step] if p.group == group)
        if marks:
            parts.append(
                f'<path d="{marks}" stroke="{_colour(group, groups)}" stroke-width="6" '
                'stroke-linecap="round" opacity=".75"/>'
            )
    loud = [point for point in points if point.label]
    parts += [_dot(to_x(p.x), to_y(p.y), _colour(p.group, groups), 5) for p in loud]
    parts += _labels([(to_x(p.x), to_y(p.y), p.label) for p in loud])
    return _svg(title, [*parts, _legend([group for group in groups if group])])


def bar_plot(rows: Sequence[Bar], title: str, x: str, reference: tuple[str, float] | None = None) -> str:
    """Horizontal bars from zero, with whiskers where a row has an interval.

    ``reference`` draws a dashed line, such as the majority baseline, with its name.

    Raises:
        CogumiError: no rows, more than 32, or a number that is not finite.
    """
    if len(rows) > MAX_BARS:
        raise CogumiError(f"a bar plot of {len(rows)} rows", f"give at most {MAX_BARS}")
    ends = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    ticks = _ticks(_finite([0.0, *ends, *([reference[1]] if reference else [])], bool(rows)))
    left = min(240.0, 22 + 6.6 * max(len(row.label) for row in rows))
    step = 26 if len(rows) <= 12 else 18
    bottom = TOP + step * len(rows)
    to_x = _scale(ticks[0], ticks[-1], left, WIDTH - 64)
    parts = [_grid_x(ticks, to_x, TOP - 4, bottom), _text((left + WIDTH - 64) / 2, bottom + 38, x, "middle", 12)]
    for index, row in enumerate(rows):
        middle = TOP + step * (index + 0.5)
        start, end = sorted((to_x(0.0), to_x(row.value)))
        parts.append(
            f'<rect x="{start:.1f}" y="{middle - step * 0.34:.1f}" width="{end - start:.1f}" '
            f'height="{step * 0.68:.1f}" rx="2" fill="{COLOURS[0]}" opacity=".6"/>'
        )
        tip = end
        if row.low is not None and row.high is not None:
            parts.append(_whisker(to_x(row.low), middle, to_x(row.high), middle))
            tip = max(end, to_x(row.high))
        shown = row.label if len(row.label) <= 33 else row.label[:32] + "…"
        parts.append(_text(left - 8, middle + 4, shown, "end", 12))
        # Shares keep three decimals, so that a column of them lines up.
        number = f"{row.value:.3f}" if ticks[-1] <= 1 and ticks[0] >= -1 else _number(row.value)
        parts.append(_text(tip + 6, middle + 4, number, "start", 11))
    if reference:
        at = to_x(reference[1])
        parts.append(f'<path d="M{at:.1f},{TOP - 8}V{bottom}" {_DASHED} stroke="{COLOURS[1]}"/>')
        parts.append(
            _text(at, TOP - 13, f"{reference[0]} {_number(reference[1])}", "middle", 11).replace(INK, COLOURS[1])
        )
    return _svg(title, parts, height=bottom + 50)


def reliability_plot(bins: Sequence[ReliabilityBin], title: str = "Reliability") -> str:
    """Predicted against observed share, with Wilson intervals. Larger marks hold more rows; the diagonal is perfect.

    Raises:
        CogumiError: no bins.
    """
    _finite([b.predicted for b in bins], bool(bins))
    to_x, to_y, axes = _axes([0.0, 1.0], [0.0, 1.0], "predicted probability", "observed share")
    most = max(b.count for b in bins)
    parts = [axes, f'<path d="M{to_x(0):.1f},{to_y(0):.1f}L{to_x(1):.1f},{to_y(1):.1f}" {_DASHED} stroke="{INK}"/>']
    for b in bins:
        at, (low, high) = to_x(b.predicted), wilson(b.successes, b.count)
        parts.append(_whisker(at, to_y(low), at, to_y(high)))
        parts.append(_dot(at, to_y(b.observed), COLOURS[0], 3 + 4 * math.sqrt(b.count / most)))
    line = " ".join(f"{to_x(b.predicted):.1f},{to_y(b.observed):.1f}" for b in bins)
    parts.insert(2, f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5" opacity=".5"/>')
    rows = sum(b.count for b in bins)
    said = f"{rows} rows in {len(bins)} bins of equal mass, 95 % intervals"
    return _svg(title, [*parts, _text(LEFT, 46, said, "start", 11)])


_DASHED = 'fill="none" stroke-width="1.4" stroke-dasharray="5 4"'


def _svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    shown = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'font-family="system-ui,Segoe UI,Helvetica,Arial,sans-serif"><title>{shown}</title>'
        f'<text x="16" y="25" font-size="15" font-weight="600" fill="{INK}">{shown}</text>{"".join(parts)}</svg>\n'
    )


def _axes(xs: Sequence[float], ys: Sequence[float], x: str, y: str) -> tuple[Scale, Scale, str]:
    """Scales of both directions and the drawn grid, ticks and axis titles."""
    x_ticks, y_ticks = _ticks(_finite(xs, bool(xs))), _ticks(_finite(ys, bool(ys)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    to_x, to_y = _scale(x_ticks[0], x_ticks[-1], LEFT, right), _scale(y_ticks[0], y_ticks[-1], bottom, TOP)
    lines = "".join(f"M{LEFT},{to_y(tick):.1f}H{right}" for tick in y_ticks)
    parts = [
        _grid_x(x_ticks, to_x, TOP, bottom),
        f'<path d="{lines}" stroke="{INK}" stroke-opacity=".22"/>',
        *(_text(LEFT - 8, to_y(tick) + 4, _number(tick), "end", 11) for tick in y_ticks),
        _text((LEFT + right) / 2, HEIGHT - 10, x, "middle", 12),
        f'<text transform="translate(16,{(TOP + bottom) / 2:.0f})rotate(-90)" text-anchor="middle" '
        f'font-size="12" fill="{INK}">{escape(y)}</text>',
    ]
    return to_x, to_y, "".join(parts)


def _grid_x(ticks: Sequence[float], to_x: Scale, top: float, bottom: float) -> str:
    lines = "".join(f"M{to_x(tick):.1f},{top}V{bottom}" for tick in ticks)
    texts = (_text(to_x(tick), bottom + 17, _number(tick), "middle", 11) for tick in ticks)
    return f'<path d="{lines}" stroke="{INK}" stroke-opacity=".14"/>{"".join(texts)}'


def _finite(values: Sequence[float], any_rows: bool) -> Sequence[float]:
    if not any_rows or not values:
        raise CogumiError("a plot of nothing", "give at least one row")
    if not all(math.isfinite(value) for value in values):
        raise CogumiError("a plot of a number that is not finite", "leave undefined values out")
    return values


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that span the values."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * nice for nice in (1, 2, 2.5, 5, 10) if unit * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    if abs(value) >= 1e5:
        unit, letter = (1e9, "G") if abs(value) >= 1e9 else (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _thinned(line: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Every k-th point and the last."""
    step = math.ceil(len(line) / most) or 1
    return [*line[:-1][::step], *line[-1:]]


def _colour(group: str, groups: Sequence[str]) -> str:
    return COLOURS[groups.index(group) % len(COLOURS)]


def _dot(x: float, y: float, colour: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"/>'


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a small cap at each end."""
    caps = "v-4v8" if y1 == y2 else "h-4h8"
    back = f"M{x2:.1f},{y2:.1f}{caps}M{x1:.1f},{y1:.1f}{caps}"
    return f'<path d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}{back}" stroke="{INK}" stroke-width="1.4" fill="none"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> str:
    """Names with their colours under the title, in one row or two. What does not fit is counted."""
    rows: list[list[tuple[float, int]]] = [[]]
    x = 16.0
    for index, name in enumerate(names):
        width = 25 + 5.6 * len(name)
        if x + width > WIDTH - 24 and rows[-1]:
            rows.append([])
            x = 16.0
        rows[-1].append((x, index))
        x += width
    parts = []
    for number, row in enumerate(rows[:2]):
        y = (48 if len(rows) == 1 else 41) + 14 * number
        for x, index in row:
            colour = COLOURS[index % len(COLOURS)]
            parts.append(f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" rx="3" fill="{colour}"/>')
            parts.append(_text(x + 14, y, names[index], "start", 11))
    if hidden := sum(len(row) for row in rows[2:]):
        parts.append(_text(WIDTH - 22, 55, f"+{hidden}", "start", 11))
    return "".join(parts)


def _labels(marks: Sequence[tuple[float, float, str]]) -> list[str]:
    """Labels beside their marks: right, left, above or below, wherever nothing is written yet."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in marks]
    parts = []
    for x, y, label in marks:
        width = 6.4 * len(label)
        places = [(x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 19)]
        boxes = [(left, base - 10, left + width, base + 3) for left, base in places]
        clear = [i for i, box in enumerate(boxes) if _inside(box) and not any(_overlap(box, other) for other in taken)]
        chosen = clear[0] if clear else 0
        taken.append(boxes[chosen])
        parts.append(_text(*places[chosen], label, "start", 11))
    return parts


Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 14
