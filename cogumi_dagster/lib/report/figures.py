"""The report's plots, each from the stored figures of one or several artifacts."""

from collections.abc import Mapping, Sequence
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactRef
from cogumi_dagster.lib.evaluation import plots
from cogumi_dagster.lib.evaluation.statistics import ReliabilityBin

Reports = Mapping[str, Mapping[str | None, Mapping[str, Any]]]
"""asset -> partition -> the report in its JSON form."""


def reports_of(refs: Sequence[ArtifactRef]) -> dict[str, dict[str | None, Mapping[str, Any]]]:
    found: dict[str, dict[str | None, Mapping[str, Any]]] = {}
    for ref in refs:
        found.setdefault(ref.manifest.asset, {})[ref.manifest.partition] = ref.manifest.metrics.get("report", {})
    return found


def figures(reports: Reports) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot whose figures are there, in the order of the graph."""
    makers = (_training, _compression, _modifiers, _strategy, _reliability, _system)
    return [(caption, svg) for make in makers for caption, svg in make(reports)]


def _training(reports: Reports) -> list[tuple[str, str]]:
    curves = {
        f"{asset.removesuffix('_adapter')}{' ' + key if key else ''}": [(x, y) for x, y in report["curve"]]
        for asset in ("base_adapter", "modifier_adapter", "strategy_adapter")
        for key, report in reports.get(asset, {}).items()
        if report.get("curve")
    }
    if not curves:
        return []
    return [
        ("Training loss of every adapter, by step", plots.line_plot(curves, "Training loss", "step", "loss (nats)"))
    ]


def _compression(reports: Reports) -> list[tuple[str, str]]:
    report = reports.get("compression_frontier", {}).get(None)
    if not report:
        return []
    caption = f"Bytes against perplexity, {report['perplexity_tokens']} held-out tokens; 1.0 is the 16-bit parent"
    return [(caption, frontier_plot(report["rows"]))]


def frontier_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes against perplexity of each quantization; the mix that was made to a budget has a colour of its own."""
    points = [
        plots.Point(
            row["bytes"] / 1e6,
            row["perplexity_ratio"],
            label=row["type"],
            group="made to the budget" if row["type"] == "mixed" else "llama.cpp's own mixes",
        )
        for row in rows
    ]
    return plots.scatter_plot(points, "Compression frontier", "MB", "perplexity / parent")


def _bar(label: str, proportion: Mapping[str, Any]) -> plots.Bar | None:
    if proportion.get("value") is None:
        return None
    return plots.Bar(label, proportion["value"], proportion.get("low"), proportion.get("high"))


def _bars(caption: str, title: str, rows: Sequence[plots.Bar | None], axis: str = "accuracy") -> list[tuple[str, str]]:
    shown = [row for row in rows if row is not None]
    return [(caption, plots.bar_plot(shown, title, axis))] if shown else []


def _modifiers(reports: Reports) -> list[tuple[str, str]]:
    rows: list[plots.Bar | None] = []
    for key, report in reports.get("modifier_evaluation", {}).items():
        rows += [_bar(f"{key}: base", report["base"]), _bar(f"{key}: with modifier", report["modified"])]
    return _bars("Held-out tasks of each modifier's domains, served, 95 % intervals", "Modifiers", rows)


def _strategy(reports: Reports) -> list[tuple[str, str]]:
    found = []
    for key, report in reports.get("strategy_evaluation", {}).items():
        rows = [_bar(stage["stage"], stage["balanced_accuracy"]) for stage in report["stages"]]
        caption = f"Balanced accuracy on {report['problems']} problems"
        if (constant := report.get("constant_balanced_accuracy")) is not None:
            caption += f"; always giving the commonest answer scores {constant:.2g}"
        found += _bars(caption, f"Strategy: {key}", rows, "balanced accuracy")
    return found


def _reliability(reports: Reports) -> list[tuple[str, str]]:
    report = reports.get("router_model", {}).get(None)
    if not report:
        return []
    names = ReliabilityBin.__dataclass_fields__
    bins = [ReliabilityBin(**{name: row[name] for name in names if name in row}) for row in report["reliability"]]
    return [("How often the base is right, against the router's confidence", plots.reliability_plot(bins))]


def _system(reports: Reports) -> list[tuple[str, str]]:
    report = reports.get("system_evaluation", {}).get(None)
    if not report:
        return []
    rows = [_bar(row["system"], row["accuracy"]) for row in report["systems"]]
    return _bars(f"The served system on {report['tasks']} fresh test tasks, 95 % intervals", "Systems", rows)
