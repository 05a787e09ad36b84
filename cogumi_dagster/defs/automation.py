"""Jobs, and what runs by itself when teacher data changes.

A sensor observes ``teacher_data`` and declarative automation carries a change down. Automation can
miss a change (dagster#33586, #24650), so a schedule compares what is recorded with what is there.
"""

import dagster as dg

from cogumi_dagster.defs.artifact import TEACHER_DATA
from cogumi_dagster.defs.graph import GROUPS
from cogumi_dagster.defs.partitions import domain_partitions
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.teacher_data import teacher_data_version
from resources.settings import ProfileResource

DATA_VERSION = "dagster/data_version"
TAUGHT = ("source_examples", "teacher_responses", "quality_scores")
"""What reads teacher data; a run that failed half-way leaves the later ones at the old version."""
HEAVY = {"dagster/max_runtime": 4 * 3600}

TEACHERS_AVAILABLE = dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey(TEACHER_DATA), "teachers_available"))
"""Groups leave out what is only observed, and so its checks."""
GROUP_JOBS = [
    dg.define_asset_job(
        f"{name}_job",
        selection=dg.AssetSelection.groups(name) | TEACHERS_AVAILABLE
        if name == "dataset"
        else dg.AssetSelection.groups(name),
        tags=HEAVY,
        description=f"Materialize the group {name}.",
    )
    for name in GROUPS
]
benchmark_job = dg.define_asset_job(
    "benchmark_job",
    selection=dg.AssetSelection.assets("compression_frontier", "system_evaluation", "model_card"),
    tags=HEAVY,
    description="The benchmarks of the served system and the report, where they are not up to date.",
)
dataset_chain_job = dg.define_asset_job(
    "teacher_data_changed_job",
    selection=dg.AssetSelection.assets("source_examples", "teacher_responses", "quality_scores", "curated_examples"),
    partitions_def=domain_partitions,
    description="One domain's chain, when its teacher data has changed.",
)
JOBS = [*GROUP_JOBS, benchmark_job, dataset_chain_job]


def _present(settings: ProfileResource) -> dict[str, str]:
    """Each domain's teacher data version now; a domain whose sources cannot be read is left out."""
    versions = {}
    for domain in DOMAINS:
        try:
            versions[domain] = teacher_data_version(settings.profile, domain, settings.sources, settings.catalogue)
        except CogumiError:
            continue  # its own asset reports the error with its mend
    return versions


def _observation(domain: str, version: str) -> dg.AssetObservation:
    return dg.AssetObservation(TEACHER_DATA, partition=domain, tags={DATA_VERSION: version})


def observe_teacher_data(instance: dg.DagsterInstance, settings: ProfileResource) -> list[str]:
    """Record what the sensor would, before a run from the command line; the domains that had another version.

    Else the UI's daemon, opened after such a run, takes its first observation for a change and asks for every domain.
    """
    changed = []
    for domain, version in _present(settings).items():
        seen = instance.get_latest_data_version_record(dg.AssetKey(TEACHER_DATA), partition_key=domain)
        observation = seen.asset_observation if seen else None
        if observation is None or observation.tags.get(DATA_VERSION) != version:
            instance.report_runless_asset_event(_observation(domain, version))
            changed.append(domain)
    return changed


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Observes teacher data: reports the new version of each domain whose sources, teachers, prompts or "
    "judge have changed.",
)
def teacher_data_sensor(context: dg.SensorEvaluationContext, settings: ProfileResource) -> dg.SensorResult:
    seen = dict(part.split("=", 1) for part in (context.cursor or "").split(",") if part)
    present = _present(settings)
    changed = {domain: version for domain, version in present.items() if seen.get(domain) != version}
    observations = [_observation(domain, version) for domain, version in changed.items()]
    return dg.SensorResult(
        asset_events=observations, cursor=",".join(f"{d}={v}" for d, v in sorted({**seen, **present}.items()))
    )


@dg.schedule(
    cron_schedule="*/15 * * * *",
    target=dataset_chain_job,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Safety net: re-runs the chain of each domain whose recorded teacher data version is not the present "
    "one. Domains that were never materialized are left to their first run.",
)
def teacher_data_reconciliation_schedule(
    context: dg.ScheduleEvaluationContext, settings: ProfileResource
) -> list[dg.RunRequest]:
    requests = []
    for domain, version in _present(settings).items():
        recorded = {recorded_version(context.instance, asset, domain) for asset in TAUGHT}
        if not recorded - {None, version}:
            continue
        tags = {"cogumi/teacher_data": f"{domain}-{version[:12]}"}
        attempts = context.instance.get_run_records(dg.RunsFilter(tags=tags))
        if all(record.dagster_run.is_finished for record in attempts):
            run_key = f"{domain}-{version[:12]}-{len(attempts)}"  # the count lets a failed run be tried again
            requests.append(dg.RunRequest(run_key=run_key, partition_key=domain, tags=tags))
    return requests


def recorded_version(instance: dg.DagsterInstance, asset: str, domain: str) -> str | None:
    """The teacher data version in the metadata of a domain's latest materialization; None where there is none."""
    event = instance.get_latest_data_version_record(dg.AssetKey(asset), partition_key=domain)
    materialization = event.asset_materialization if event else None
    if materialization is None or TEACHER_DATA not in materialization.metadata:
        return None
    return str(materialization.metadata[TEACHER_DATA].value)


@dg.schedule(
    cron_schedule="0 3 * * *",
    target=benchmark_job,
    description="Nightly benchmarks of what is served.",
)
def nightly_benchmark_schedule() -> dg.RunRequest:
    return dg.RunRequest()


automation_sensor = dg.AutomationConditionSensorDefinition(
    "automation_sensor",
    target=dg.AssetSelection.all(include_sources=True),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
)
SENSORS = [teacher_data_sensor, automation_sensor]
SCHEDULES = [teacher_data_reconciliation_schedule, nightly_benchmark_schedule]
