"""``run``, ``demo``, ``plan``, ``status``, ``verify``, ``report`` and ``dev``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from rich.markup import escape

from cogumi_dagster.commands.terminal import RunProgress, console, duration, estimate, print_table
from cogumi_dagster.defs import artifact
from cogumi_dagster.defs.automation import observe_teacher_data
from cogumi_dagster.defs.pipeline import Node, NodeResult, plan, reconcile, run_nodes
from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.report.card import HTML
from cogumi_dagster.lib.report.cells import size
from cogumi_dagster.lib.report.tables import artifact_table, check_table
from resources.settings import ProfileResource


def _open() -> tuple[dg.Definitions, ProfileResource, ArtifactStore]:
    from cogumi_dagster.definitions import defs

    resources = defs.resources or {}
    return defs, resources["settings"], resources["store"].open()


def run_graph(select: Sequence[str], partition: str | None) -> int:
    """Make what is not up to date; 0 where nothing failed."""
    definitions, settings, store = _open()
    nodes = plan(settings, store, select, partition)
    todo = [node for node in nodes if node.reason]
    instance = dg.DagsterInstance.get()
    observe_teacher_data(instance, settings)
    if not todo:
        asked = sum(node.chosen for node in nodes)
        which = f"all {asked} artifacts" if asked == len(nodes) else f"the {asked} artifacts that were asked for"
        console.print(f"Nothing to do: {which} are up to date, in {store.root}.")
        return 0
    for run_id in reconcile(instance):
        console.print(f"[dim]settled the run {run_id[:8]}, which a crash had left running[/]")
    console.print(f"Profile {settings.profile.name}: {len(todo)} of {len(nodes)} artifacts to make, in {store.root}")
    _say_what_is_stale(nodes, partition)
    progress = RunProgress(nodes, settings.profile.name)
    artifact.listeners.append(progress)
    started = time.monotonic()
    try:
        results = run_nodes(definitions, instance, nodes)
    finally:
        artifact.listeners.remove(progress)
    fresh = sum(node.chosen and not node.reason for node in nodes)
    return _summary(results, fresh, time.monotonic() - started)


def _say_what_is_stale(nodes: Sequence[Node], partition: str | None) -> None:
    """Inputs of what is to be made that are not up to date themselves, and were not asked for."""
    stale = [node for node in nodes if node.stale]
    if not stale:
        return
    console.print(f"[yellow]{len(stale)} input(s) of these are out of date and are used as they are:[/]")
    for node in stale:
        console.print(escape(f"  {node.label}: {node.stale}"))
    last = [node.asset for node in nodes if node.reason][-1]
    asked = f"--select +{last}" + (f" --partition {partition}" if partition else "")
    console.print(f"mend: a + in front of an asset's name makes its inputs too, such as [bold]{escape(asked)}[/]")


def _summary(results: Sequence[NodeResult], fresh: int, seconds: float) -> int:
    counts = {
        verdict: sum(r.verdict == verdict for r in results) for verdict in ("made", "unchanged", "failed", "skipped")
    }
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(f"\n{shown}; {fresh} were up to date. {duration(seconds)}.")
    for result in results:
        if result.verdict == "failed":
            console.print(f"[bold red]failed:[/] {escape(result.node.label)}: {escape(result.error)}")
        elif result.verdict == "skipped":
            console.print(f"[yellow]skipped:[/] {escape(result.node.label)}: {escape(result.error)}")
    if counts["failed"] or counts["skipped"]:
        console.print("Nothing that was finished is lost: mend the cause and run the same command again.")
    return 1 if counts["failed"] or counts["skipped"] else 0


QUESTIONS = (
    "What is 17 + 25? Add the numbers step by step and end with a line `Answer: <number>`.",
    "Write one Python expression that gives the squares of the even numbers in the list xs.",
    "Tell me in two sentences why the sky is blue.",
)


def run_demo() -> int:
    """The pipeline, its tables, and three questions through the server."""
    status = run_graph((), None)
    _, settings, store = _open()
    refs = store.artifacts()
    print_table(artifact_table(refs))
    print_table(check_table(refs), hide=("what it says",))
    if status:
        return status
    console.print(f"\nReport: [bold]{report_path()}[/]")
    from cogumi_dagster.commands.model import ask_the_server

    ask_the_server(store, settings.profile, QUESTIONS)
    console.print(
        "\nNext: [bold].venv/bin/cogumi chat -p quick[/] to talk to it, [bold]make dev[/] for the Dagster UI."
    )
    return 0


def show_plan(as_json: bool, select: Sequence[str] = (), partition: str | None = None) -> None:
    """What a run would make and why."""
    _, settings, store = _open()
    nodes = plan(settings, store, select, partition)
    if as_json:
        rows = [
            {"asset": n.asset, "partition": n.partition, "reason": n.reason, "stale": n.stale, "seconds": n.seconds}
            for n in nodes
        ]
        print(json.dumps(rows, indent=1))
        return
    progress = RunProgress(nodes, settings.profile.name)
    for node in nodes:
        if node.reason:
            seconds = progress.expected[node.label]
            took = f" [dim](about {duration(seconds)})[/]" if seconds else ""
            console.print(escape(f"{node.label:44} {node.reason}") + took)
    times = list(progress.expected.values())
    time = f", about {estimate(sum(times), times.count(0))}" if sum(times) else ""
    console.print(f"{len(times)} of {len(nodes)} artifacts to make{time}.")
    _say_what_is_stale(nodes, partition)


def show_status(as_json: bool) -> None:
    """Every artifact and check."""
    _, settings, store = _open()
    refs = store.artifacts()
    if as_json:
        rows = [
            {
                "asset": ref.manifest.asset,
                "partition": ref.manifest.partition,
                "version": ref.version,
                "bytes": ref.manifest.bytes,
                "seconds": ref.manifest.seconds,
                "checks": ref.manifest.metrics.get("checks", []),
                "report": ref.manifest.metrics.get("report", {}),
            }
            for ref in refs
        ]
        print(json.dumps(rows, indent=1, default=str))
        return
    if not refs:
        raise CogumiError(f"nothing has been materialized in {store.root}", f"cogumi run -p {settings.profile.name}")
    print_table(artifact_table(refs))
    print_table(check_table(refs), hide=("what it says",))
    due = [node for node in plan(settings, store) if node.reason]
    console.print(f"\n{len(due)} artifact(s) to make." if due else "\nEverything is up to date.")


def verify_store() -> int:
    """Re-hash everything; 1 where something has changed."""
    _, _, store = _open()
    damaged = 0
    for row in store.verify():
        name = f"{row.asset}[{row.partition}]" if row.partition else row.asset
        damaged += bool(row.problem)
        verdict = f"[red]{escape(row.problem)}[/]" if row.problem else "[green]intact[/]"
        console.print(f"{escape(f'{name:44}')} {size(row.bytes):>12}  {verdict}")
    if damaged:
        console.print(f"\n{damaged} damaged. mend: delete the folder that is named, and run cogumi run again")
    return 1 if damaged else 0


def report_path() -> Path:
    _, _, store = _open()
    return store.get("model_card").path / HTML


def open_ui(port: int) -> None:
    """``dagster dev`` on our workspace, with crashed runs settled first."""
    home = Path(os.environ["DAGSTER_HOME"])
    instance = dg.DagsterInstance.get()
    for run_id in reconcile(instance):
        console.print(f"[dim]settled the run {run_id[:8]}, which a crash had left running[/]")
    instance.dispose()
    console.print(f"Dagster UI on http://127.0.0.1:{port}, history in {home}")
    workspace = Path(__file__).resolve().parents[2] / "workspace.yaml"
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(workspace), "-p", str(port), "-h", "127.0.0.1"]
    raise SystemExit(subprocess.call(command))
