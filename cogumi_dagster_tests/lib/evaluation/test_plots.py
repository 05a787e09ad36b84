"""Plots are well-formed, small, and put their marks where the numbers are."""

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.plots import Bar, Point, bar_plot, line_plot, reliability_plot, scatter_plot
from cogumi_dagster.lib.evaluation.statistics import ReliabilityBin

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def big_plots() -> list[str]:
    line = [(float(i), math.sin(i / 50)) for i in range(20_000)]
    cloud = [Point(math.sin(i), math.cos(i * 1.7), group=f"cluster {i % 10}") for i in range(5000)]
    return [
        line_plot({f"run {i}": line for i in range(8)}, "Loss", "step", "nats"),
        bar_plot([Bar(f"a rather long name of row {i}", i / 40, i / 50, i / 30) for i in range(32)], "Rows", "share"),
        scatter_plot([*cloud, Point(0, 0, "here", "cluster 1")], "Cloud", "x", "y"),
        reliability_plot([ReliabilityBin(i / 10, i / 10, i, 10) for i in range(10)]),
    ]


def test_every_plot_is_xml_below_15_kb_without_scripts_or_a_background() -> None:
    for svg in big_plots():
        assert len(svg.encode()) < 15_000
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title") is not None
        assert {node.tag.removeprefix(SVG) for node in root.iter()} <= {
            "svg", "title", "text", "path", "polyline", "circle", "rect",
        }  # fmt: skip
        assert "nan" not in svg and "#fff" not in svg and "#000" not in svg


def test_plots_are_the_same_every_time() -> None:
    assert big_plots() == big_plots()


def test_text_is_escaped() -> None:
    svg = bar_plot([Bar("<script>&", 1.0)], 'a < b & "c"', "x")
    assert "<script>" not in svg
    assert 'a < b & "c"' in texts(svg) and "<script>&" in texts(svg)


def test_a_thinned_line_keeps_its_last_point() -> None:
    svg = line_plot({"loss": [(float(i), float(i)) for i in range(1001)]}, "t", "x", "y")
    points = ElementTree.fromstring(svg).find(f"{SVG}polyline").get("points").split()  # type: ignore[union-attr]
    assert len(points) <= 161
    first, last = points[0].split(","), points[-1].split(",")
    assert float(first[0]) < float(last[0]) and float(first[1]) > float(last[1])
    assert (float(last[0]), float(last[1])) == (pytest.approx(534.0, abs=100), pytest.approx(62.0, abs=60))


def test_bars_are_as_long_as_their_values_and_whiskers_show() -> None:
    root = ElementTree.fromstring(bar_plot([Bar("a", 0.2), Bar("b", 0.8, 0.7, 0.9)], "t", "x", ("majority", 0.5)))
    widths = [float(rect.get("width", "0")) for rect in root.iter(f"{SVG}rect")]
    assert widths[1] / widths[0] == pytest.approx(4.0, rel=0.01)
    assert sum("v-4v8" in (path.get("d") or "") for path in root.iter(f"{SVG}path")) == 1
    assert {"0.200", "0.800", "majority 0.5"} <= set(texts(ElementTree.tostring(root).decode()))


def test_reliability_on_the_diagonal_lies_on_the_diagonal() -> None:
    root = ElementTree.fromstring(reliability_plot([ReliabilityBin(p, p, int(p * 20), 20) for p in (0.25, 0.5, 0.75)]))
    dots = [(float(dot.get("cx", "0")), float(dot.get("cy", "0"))) for dot in root.iter(f"{SVG}circle")]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(dots)]
    diagonal = next(path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("stroke-dasharray"))
    x1, y1, x2, y2 = (float(v) for v in diagonal[1:].replace("L", ",").split(","))
    assert slopes == pytest.approx([(y2 - y1) / (x2 - x1)] * 2, rel=0.02)
    assert dots[1] == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2), abs=0.1)


def test_labels_of_near_points_do_not_overlap() -> None:
    root = ElementTree.fromstring(
        scatter_plot([Point(100, 1.0, "Q5_0"), Point(100.1, 1.0, "Q4_K_M"), Point(120, 2, "Q8_0")], "t", "MB", "ppl")
    )
    found = {node.text: node for node in root.iter(f"{SVG}text") if (node.text or "").startswith("Q")}
    assert len(found) == 3
    place = {name: (node.get("x"), node.get("y")) for name, node in found.items()}
    assert place["Q5_0"] != place["Q4_K_M"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_plot({}, "t", "x", "y"),
        lambda: line_plot({"a": []}, "t", "x", "y"),
        lambda: scatter_plot([], "t", "x", "y"),
        lambda: bar_plot([], "t", "x"),
        lambda: reliability_plot([]),
        lambda: line_plot({"a": [(0, math.nan)]}, "t", "x", "y"),
        lambda: bar_plot([Bar("a", math.inf)], "t", "x"),
        lambda: bar_plot([Bar("a", 1.0)] * 33, "t", "x"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CogumiError):
        draw()


def test_one_point_and_constant_values_are_drawn() -> None:
    assert "<circle" in line_plot({"a": [(3, 5)]}, "t", "x", "y")
    assert "polyline" in line_plot({"a": [(1, 5), (2, 5)]}, "t", "x", "y")
