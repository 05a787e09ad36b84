"""The report: one HTML page that needs nothing else, and the same as Markdown."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cogumi_dagster.lib.artifacts import ArtifactRef
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.report import tables
from cogumi_dagster.lib.report.cells import Table, label
from cogumi_dagster.lib.report.figures import figures, reports_of
from cogumi_dagster.lib.report.one_for_all import one_for_all

HTML, MARKDOWN = "report.html", "report.md"

STEPS = (
    "distillation_dataset", "base_checkpoint", "pruned_checkpoint", "recovered_checkpoint", "awq_checkpoint",
    "w4a16_checkpoint", "gguf_model", "packaged_base", "compression_frontier", "parity_chain", "modifier_evaluation",
    "strategy_evaluation", "router_model", "escalation_detector", "serving_bundle", "system_evaluation",
)  # fmt: skip
"""What the report must hold to be whole."""


@dataclass(frozen=True)
class CardReport:
    """``missing``: steps of the graph that were not there to report on."""

    artifacts: int
    checks: int
    passed: int
    plots: int
    missing: int
    stand_ins: str
    predicted_sizes: int
    """Files whose bytes the planner predicts from shapes alone."""
    worst_size_error: float | None
    """Of those, predicted against actual."""


def write_card(refs: Sequence[ArtifactRef], profile: Profile, out: Path, *, sources: Path | None = None) -> CardReport:
    """Write ``report.html`` and ``report.md`` from the manifests and the student's config.json.

    With the folder of the profile's ``sources``, what training took stands beside what was planned.
    """
    from cogumi_dagster.lib.report.predicted import compare_bytes, compare_training

    out.mkdir(parents=True, exist_ok=True)
    reports = reports_of(refs)
    sizes = compare_bytes(refs, profile)
    planned = [*sizes, *(compare_training(refs, profile, sources) if sources else ())]
    shown = [
        tables.headline(reports),
        *tables.compression_tables(reports),
        *tables.modifier_tables(reports),
        *tables.strategy_tables(reports),
        *tables.system_table(reports),
        *tables.one_for_all_table(one_for_all(refs)),
        *tables.planned_table(planned),
        tables.check_table(refs),
        tables.artifact_table(refs),
    ]
    plots = figures(reports)
    stand_ins = sorted(set(_stand_ins(reports)))
    title = f"Cogumi report: {profile.name} profile, student {profile.student.name}"
    (out / HTML).write_text(_html(title, profile, shown, plots, stand_ins, refs), encoding="utf-8")
    (out / MARKDOWN).write_text(_markdown(title, profile, shown, stand_ins), encoding="utf-8")
    checks = [check for ref in refs for check in ref.manifest.metrics.get("checks", ())]
    return CardReport(
        artifacts=len(refs),
        checks=len(checks),
        passed=sum(bool(check["passed"]) for check in checks),
        plots=len(plots),
        missing=sum(step not in reports for step in STEPS),
        stand_ins=", ".join(stand_ins),
        predicted_sizes=len(sizes),
        worst_size_error=max((abs(row.error) for row in sizes), default=None),
    )


def _stand_ins(reports: tables.Reports) -> Iterator[str]:
    """What stood in for something dearer, as the artifacts say themselves."""
    for asset, partitions in reports.items():
        for report in partitions.values():
            if asset == "student_model" and report.get("stand_in"):
                yield f"student: {report['source']}"
            if asset == "quality_scores" and report.get("stand_in"):
                yield f"judge: {report['judge']}"
            if asset == "teacher_responses":
                yield from (f"teacher: {name}" for name in report.get("stand_ins", ()))
            if asset in ("strategy_journal", "learned_strategy") and report.get("stand_in"):
                yield f"strategy teacher: {report['teacher']}"
            if asset == "cascade_examples" and report.get("siblings"):
                yield "siblings of failures: solver"
            yield from (
                f"cascade teacher: {name}" for name in report.get("stand_ins", ()) if asset == "cascade_examples"
            )


def _html(
    title: str,
    profile: Profile,
    shown: Sequence[Table],
    plots: Sequence[tuple[str, str]],
    stand_ins: Sequence[str],
    refs: Sequence[ArtifactRef],
) -> str:
    head, *rest = [_html_table(table) for table in shown]
    pictures = "".join(f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>" for text, svg in plots)
    stand = f'<p class="note">Stand-ins in this profile: {html.escape(", ".join(stand_ins))}.</p>' if stand_ins else ""
    raw = {label(ref): ref.manifest.metrics.get("report", {}) for ref in refs}
    figures_json = html.escape(json.dumps(raw, indent=1, default=str))
    style = files("cogumi_dagster.lib.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body><main>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(profile.description)} Seed {profile.seed}.</p>{stand}"
        f'{head}<div class="plots">{pictures}</div>{"".join(rest)}'
        f"<details><summary>All figures as JSON</summary><pre>{figures_json}</pre></details></main></body></html>"
    )


def _html_table(table: Table) -> str:
    columns = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(_html_cell(c, v) for c, v in zip(table.columns, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<section><h2>{html.escape(table.title)}</h2><p class="note">{html.escape(table.note)}</p>'
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _html_cell(column: str, value: str) -> str:
    if column == "verdict":
        return f'<td><span class="{html.escape(value)}">{html.escape(value)}</span></td>'
    return f"<td>{html.escape(value)}</td>"


def _markdown(title: str, profile: Profile, shown: Sequence[Table], stand_ins: Sequence[str]) -> str:
    parts = [f"# {title}", f"{profile.description} Seed {profile.seed}."]
    if stand_ins:
        parts.append(f"Stand-ins in this profile: {', '.join(stand_ins)}.")
    for table in shown:
        lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
        lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in table.rows]
        parts += [f"## {table.title}", table.note, "\n".join(f"| {line} |" for line in lines)]
    return "\n\n".join(parts) + "\n"
