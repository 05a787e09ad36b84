"""The whole graph in one job, across all partitions, running only what is not up to date.

One Dagster run has one partition key, so the full pipeline is a job whose op drives child runs: one
for each block of assets and partition. ``cogumi run`` and ``full_pipeline_job`` are the same function.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from cogumi_dagster.defs.artifact import (
    ASKS_KEY,
    CODE_KEY,
    CONFIG_KEY,
    PIPELINE_TAG,
    REPORTS_KEY,
    TASKS_KEY,
    TEACHER_DATA,
    config_of,
    named_teacher_versions,
    report_versions,
    task_versions,
    teacher_versions,
    unjudged,
)
from cogumi_dagster.defs.graph import ASSETS
from cogumi_dagster.defs.partitions import partitions_made
from cogumi_dagster.lib.artifacts import ArtifactStore, Manifest, fingerprint_of
from cogumi_dagster.lib.errors import CogumiError, nearest
from resources.settings import ProfileResource

PROCESS_TAG = "cogumi/process"


@dataclass(frozen=True)
class Node:
    """One asset and partition. ``reason`` is empty where the artifact is up to date."""

    asset: str
    partition: str | None
    reason: str
    seconds: float
    """What its last making took; 0 where there was none."""
    chosen: bool = True
    """Whether it was asked for; the others have no reason either."""
    stale: str = ""
    """Why it is not up to date, where something that has a reason is made from it and it was not asked for."""

    @property
    def label(self) -> str:
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset


@dataclass(frozen=True)
class NodeResult:
    """``verdict``: made, unchanged, failed or skipped (because of an upstream failure)."""

    node: Node
    verdict: str
    seconds: float
    error: str = ""


Watch = Callable[[Node, int, int], None]
"""``watch(node, position, total)``, called before a node's child run starts."""


def _specs() -> dict[str, dg.AssetSpec]:
    """Asset name -> spec, of all that can be materialized, upstream first."""
    found: dict[str, dg.AssetSpec] = {}
    for asset in ASSETS:
        if isinstance(asset, dg.AssetsDefinition) and asset.is_materializable:
            for spec in asset.specs:
                found[spec.key.path[-1]] = spec
    ordered: dict[str, dg.AssetSpec] = {}

    def visit(name: str) -> None:
        if name in found and name not in ordered:
            for dep in found[name].deps:
                visit(dep.asset_key.path[-1])
            ordered[name] = found[name]

    for name in found:
        visit(name)
    return ordered


Keys = dict[str, list[str | None]]
"""The partitions of each asset that count in a run."""
Slot = tuple[str, str | None]
"""An asset and one of its partitions."""


def _keys(
    specs: dict[str, dg.AssetSpec],
    settings: ProfileResource | None = None,
    store: ArtifactStore | None = None,
    asked: str | None = None,
) -> Keys:
    profile = settings.profile if settings else None
    return {name: partitions_made(spec.partitions_def, profile, store, asked) for name, spec in specs.items()}


def _parents(specs: dict[str, dg.AssetSpec], keys: Keys, name: str, partition: str | None) -> Iterator[Slot]:
    """The inputs of a node: the same partition where parent and child share partitions, else all of the parent's."""
    for dep in specs[name].deps:
        parent = dep.asset_key.path[-1]
        if parent in specs:
            shared = partition is not None and specs[parent].partitions_def == specs[name].partitions_def
            for key in [partition] if shared else keys[parent]:
                yield parent, key


def plan(
    settings: ProfileResource, store: ArtifactStore, select: Sequence[str] = (), partition: str | None = None
) -> list[Node]:
    """All nodes in the order of making, with why each has to be made (or not).

    Raises:
        CogumiError: an unknown asset or partition, or a teacher that the catalogue does not have.
    """
    specs = _specs()
    keys = _keys(specs, settings, store, partition)
    chosen = _chosen(specs, keys, select, partition)
    current = {(name, key): store.recorded(name, key) for name in specs for key in keys[name]}
    versions = {slot: manifest.data_version for slot, manifest in current.items() if manifest}
    order = [(name, key) for name in _blocks_in_order(specs) for key in keys[name]]

    def reasons(asked: set[Slot]) -> dict[Slot, str]:
        found: dict[Slot, str] = {}
        for slot in order:
            found[slot] = _reason(specs, keys, settings, slot, current, versions, found) if slot in asked else ""
        return found

    wanted = reasons(chosen)
    used = {parent for slot in order if wanted[slot] for parent in _upstream(specs, keys, *slot)} - chosen
    try:
        everything = reasons(chosen | used) if used else wanted
    except CogumiError:  # of an input that is used as it is, nothing needs to be right but its artifact
        everything = wanted
    nodes = []
    for slot in order:
        manifest = current[slot]
        seconds = manifest.seconds if manifest else 0.0
        stale = everything[slot] if manifest and slot in used else ""
        nodes.append(Node(*slot, wanted[slot], seconds, slot in chosen, stale))
    return nodes


def _chosen(specs: dict[str, dg.AssetSpec], keys: Keys, select: Sequence[str], partition: str | None) -> set[Slot]:
    """Which nodes were asked for: the assets of ``select`` (all, where there are none), of one partition if given.

    ``+NAME`` is an asset with all that is upstream of it, ``NAME+`` with all that is downstream (with a partition: what
    has that partition). With a partition, an asset that has none is meant only where it is named, or upstream.
    """
    named = dict.fromkeys(part.strip("+") for part in select)
    for name in named:
        if name not in keys:
            raise CogumiError(f"there is no asset {name!r}", nearest(name, keys))
    slots = {(name, key) for name in named or keys for key in keys[name]}
    if partition is not None:
        known = {key for _, key in slots if key is not None}
        if partition not in known:
            defined = [specs[name].partitions_def for name in named or specs]
            offered = {key for one in defined if one is not None for key in one.get_partition_keys()}
            raise CogumiError(
                f"there is no partition {partition!r} of {', '.join(named) or 'any asset'}", nearest(partition, offered)
            )
        slots = {(name, key) for name, key in slots if key == partition or (key is None and name in named)}
    found = set(slots)
    with_upstream = {part.strip("+") for part in select if part.startswith("+")}
    for name, key in slots:
        if name in with_upstream:
            found |= _upstream(specs, keys, name, key)
    with_downstream = {part.strip("+") for part in select if part.endswith("+")}
    starts = {slot for slot in slots if slot[0] in with_downstream}
    if starts:
        others = {(name, key) for name in specs for key in keys[name] if partition in (None, key)}
        found |= {other for other in others if starts & _upstream(specs, keys, *other)}
    return found


def _upstream(specs: dict[str, dg.AssetSpec], keys: Keys, name: str, partition: str | None) -> set[Slot]:
    found: set[Slot] = set()
    waiting = [(name, partition)]
    while waiting:
        parents = set(_parents(specs, keys, *waiting.pop())) - found
        waiting += parents
        found |= parents
    return found


def _reason(
    specs: dict[str, dg.AssetSpec],
    keys: Keys,
    settings: ProfileResource,
    slot: Slot,
    current: dict[Slot, Manifest | None],
    versions: dict[Slot, str],
    reasons: Mapping[Slot, str],
) -> str:
    name, key = slot
    parents = list(_parents(specs, keys, name, key))
    metadata = specs[name].metadata
    # first of all: a teacher that the catalogue does not have is an error now, and not after hours
    teachers = named_teacher_versions(settings, metadata[ASKS_KEY].value)
    domains = [str(key)] if any(dep.asset_key.path[-1] == TEACHER_DATA for dep in specs[name].deps) else []
    teachers |= teacher_versions(settings, domains)
    given = teachers | task_versions(metadata[TASKS_KEY], key)
    manifest = current[slot]
    if manifest is None:
        return "not made yet"
    upstream = [parent for parent in parents if reasons.get(parent)]
    if upstream:
        return f"after {upstream[0][0]}" + (f" and {len(upstream) - 1} more" if len(upstream) > 1 else "")
    named = {f"{p}[{k}]" if k else p: (p, k) for p, k in parents}
    inputs = {label: versions.get(slot, "") for label, slot in named.items()} | given
    if metadata[REPORTS_KEY]:
        inputs |= report_versions({label: made for label, slot in named.items() if (made := current[slot])})
    config = config_of(settings.profile, metadata[CONFIG_KEY].value, key)
    lacking = unjudged(metadata[TASKS_KEY], key, domains)
    if manifest.fingerprint in (
        fingerprint_of(str(metadata[CODE_KEY]), config, one) for one in (inputs, inputs | lacking)
    ):
        refused = [c["check"] for c in manifest.metrics.get("checks", ()) if c["blocking"] and not c["passed"]]
        return f"its check {refused[0]} failed" if refused else ""
    if manifest.code_version != str(metadata[CODE_KEY]):
        return "its code has changed"
    changed = sorted(n for n in {*inputs, *manifest.inputs} if inputs.get(n) != manifest.inputs.get(n))
    return f"{changed[0]} has changed" if changed else "its configuration has changed"


def _blocks_in_order(specs: dict[str, dg.AssetSpec]) -> list[str]:
    """A topological order that stays within one partitions definition as long as it can."""
    remaining, order = dict(specs), []
    last: Any = None
    while remaining:
        ready = [n for n in remaining if not any(d.asset_key.path[-1] in remaining for d in remaining[n].deps)]
        same = [name for name in ready if remaining[name].partitions_def == last]
        name = (same or ready)[0]
        last = remaining.pop(name).partitions_def
        order.append(name)
    return order


def run_nodes(
    definitions: dg.Definitions,
    instance: dg.DagsterInstance,
    nodes: Sequence[Node],
    *,
    watch: Watch = lambda node, position, total: None,
    tags: dict[str, str] | None = None,
) -> list[NodeResult]:
    """Materialize every node that has a reason, block by block; what depends on a failure is skipped."""
    specs, todo = _specs(), [node for node in nodes if node.reason]
    keys = _keys(specs)
    tags = {PIPELINE_TAG: uuid.uuid4().hex, **(tags or {})}
    job = definitions.resolve_implicit_global_asset_job_def()
    results: list[NodeResult] = []
    bad: set[Slot] = set()
    for block in _blocks(specs, todo):
        runnable = []
        for node in block:
            if any(parent in bad for parent in _parents(specs, keys, node.asset, node.partition)):
                bad.add((node.asset, node.partition))
                results.append(NodeResult(node, "skipped", 0.0, "an input failed"))
            else:
                runnable.append(node)
        if not runnable:
            continue
        watch(runnable[0], len(results) + 1, len(todo))
        outcome = _run_block(job, instance, runnable, tags)
        for node in runnable:
            result = outcome[node.asset]
            results.append(result)
            if result.verdict in ("failed", "skipped"):
                bad.add((node.asset, node.partition))
    return results


def _blocks(specs: dict[str, dg.AssetSpec], nodes: Sequence[Node]) -> list[list[Node]]:
    """Adjacent assets of one partitions definition, once for each partition."""
    groups: list[list[Node]] = []
    for node in nodes:
        definition = specs[node.asset].partitions_def
        if groups and specs[groups[-1][-1].asset].partitions_def == definition:
            groups[-1].append(node)
        else:
            groups.append([node])
    return [
        [node for node in group if node.partition == key]
        for group in groups
        for key in dict.fromkeys(node.partition for node in group)
    ]


def _run_block(
    job: dg.JobDefinition, instance: dg.DagsterInstance, nodes: Sequence[Node], tags: dict[str, str]
) -> dict[str, NodeResult]:
    started = time.perf_counter()
    result = job.execute_in_process(
        instance=instance,
        partition_key=nodes[0].partition,
        asset_selection=[dg.AssetKey(node.asset) for node in nodes],
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        tags={PROCESS_TAG: process_mark(os.getpid()) or "", **tags},
        raise_on_error=False,
    )
    made: dict[str, tuple[bool, float]] = {}
    for event in result.get_asset_materialization_events():
        metadata = event.materialization.metadata
        key = event.materialization.asset_key.path[-1]
        made[key] = (bool(metadata["reused"].value), float(metadata["seconds"].value))  # type: ignore[arg-type]
    errors = {str(event.step_key): _message(event) for event in result.all_events if event.is_step_failure}
    refused = {
        check.asset_key.path[-1]: f"its check {check.check_name} failed: {check.description}"
        for check in result.get_asset_check_evaluations()
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    }
    rows: dict[str, NodeResult] = {}
    for node in nodes:
        if node.asset in made:
            reused, seconds = made[node.asset]
            if node.asset in refused:
                rows[node.asset] = NodeResult(node, "failed", seconds, refused[node.asset])
            else:
                rows[node.asset] = NodeResult(node, "unchanged" if reused else "made", 0.0 if reused else seconds)
        elif node.asset in errors:
            rows[node.asset] = NodeResult(node, "failed", time.perf_counter() - started, errors[node.asset])
        else:
            rows[node.asset] = NodeResult(node, "skipped", 0.0, "an input failed")
    return rows


def _message(event: dg.DagsterEvent) -> str:
    failure = event.step_failure_data
    if failure.user_failure_data and failure.user_failure_data.description:
        return str(failure.user_failure_data.description)
    error = failure.error
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error else "see the run's log"


def reconcile(instance: dg.DagsterInstance) -> list[str]:
    """Fail the runs that a crash left running, and free their slots; return their ids.

    A run of ours carries its process; it is dead when that process is gone.
    """
    statuses = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    dead = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=statuses)):
        run = record.dagster_run
        mark = run.tags.get(PROCESS_TAG)
        alive = _daemon_alive(instance) if mark is None else process_mark(int(mark.partition("-")[0] or 0)) == mark
        if not alive:
            instance.report_run_failed(run, "its process was killed; found at start-up")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            dead.append(run.run_id)
    return dead


def process_mark(pid: int) -> str | None:
    """A process's id and start time, or None where it is gone. Ids return, in a container at each start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{pid}-{fields[19]}"  # field 22 of proc(5), counted from the state behind the name


def _daemon_alive(instance: dg.DagsterInstance) -> bool:
    """Whether a Dagster daemon has reported within a minute: its runs are then its own business."""
    beats = instance.get_daemon_heartbeats().values()
    return any(time.time() - beat.timestamp < 60 for beat in beats)


@dg.op(description="Plans what is not up to date and runs it, block by block, in child runs of their own.")
def run_full_pipeline(context: dg.OpExecutionContext) -> None:
    from cogumi_dagster.definitions import defs

    resources = defs.resources or {}
    settings, store = resources["settings"], resources["store"].open()
    nodes = plan(settings, store)
    due = [node for node in nodes if node.reason]
    context.log.info(f"{len(due)} of {len(nodes)} artifacts are not up to date")
    results = run_nodes(
        defs,
        context.instance,
        nodes,
        watch=lambda node, position, total: context.log.info(f"{position} of {total}: {node.label} ({node.reason})"),
        tags={PIPELINE_TAG: context.run_id},
    )
    failed = [result for result in results if result.verdict == "failed"]
    if failed:
        lines = "\n".join(f"{result.node.label}: {result.error}" for result in failed)
        raise dg.Failure(description=f"{len(failed)} artifact(s) failed:\n{lines}", allow_retries=False)


@dg.job(
    description="Every asset of the graph in all partitions, running only what is not up to date.",
    executor_def=dg.in_process_executor,
    tags={"dagster/max_runtime": 12 * 3600},
)
def full_pipeline_job() -> None:
    run_full_pipeline()
