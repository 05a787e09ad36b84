"""``@artifact``: a function from upstream artifacts to a report becomes a Dagster asset.

The decorated function gets a ``Step``, writes files into ``step.out`` and returns a frozen report.
Around it, once for all assets: inputs are resolved from the graph; an artifact whose inputs, config
and code have not changed is reused; the write is atomic; the report becomes metadata; its claims
become asset checks; errors that a retry cannot cure are not retried.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from cogumi_dagster.defs.claims import Claim, evaluate
from cogumi_dagster.defs.metadata import metadata_of
from cogumi_dagster.defs.partitions import partitions_made
from cogumi_dagster.lib.artifacts import ArtifactRef, ArtifactStore, Manifest, fingerprint_of
from cogumi_dagster.lib.errors import CogumiError, out_of_memory
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.modifiers.failures import families_for
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.progress import Progress
from cogumi_dagster.lib.routing.examples import ROUTED_DOMAINS
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.tasks import cannot_judge, families_of, family_version
from cogumi_dagster.lib.teacher_data import teacher_data_version
from cogumi_dagster.lib.teaching.catalogue import load_catalogue, prices_version, teacher_version
from cogumi_dagster.lib.training.memory import give_back_memory
from cogumi_dagster.lib.training.student import package_version
from resources.artifact_store import ArtifactStoreResource
from resources.compute import ComputeResource
from resources.embeddings import EmbeddingsResource
from resources.inference import InferenceResource
from resources.settings import ProfileResource
from resources.teachers import TeachersResource

TEACHER_DATA = "teacher_data"
CONFIG_KEY = "cogumi/config"
ASKS_KEY = "cogumi/asks"
PRICES = "prices"
TASKS_KEY = "cogumi/tasks"
REPORTS_KEY = "cogumi/reports"
TASKS: Mapping[str, Callable[[str | None], Sequence[str]]] = {
    "": lambda partition: [],
    "modifier": lambda partition: families_for(str(partition)),
    "strategy": lambda partition: [part.name for part in strategy_family(str(partition)).each()],
    "routed": lambda partition: [name for domain in ROUTED_DOMAINS for name in families_of(domain)],
}
"""Which families of tasks an asset draws from, by what its ``tasks`` says."""
CODE_KEY = "cogumi/code_version"
OWNERS = ["team:cogumi"]
PIPELINE_TAG = "cogumi/pipeline"
"""The child runs of one pipeline run carry it, and share its budget for teachers."""
ELSEWHERE = "another run is making it"
LOG_EVERY_SECONDS = 15.0

Listener = Callable[[str, str | None, int, int, str], None]
"""``listener(asset, partition, done, total, note)``; total 0 means started or about to, done -1 means ended."""
listeners: list[Listener] = []


@dataclass
class Step:
    """What an asset's body works with: its inputs, its output folder, and the world."""

    profile: Profile
    partition: str | None
    inputs: Mapping[str, Mapping[str | None, ArtifactRef]]
    out: Path
    scratch: Path
    progress: Progress
    run_id: str
    """The pipeline's where this is a child run of one."""
    store: ArtifactStore
    settings: ProfileResource
    compute: ComputeResource
    inference: InferenceResource
    teachers: TeachersResource
    embeddings: EmbeddingsResource

    def path(self, asset: str) -> Path:
        """The folder of an upstream artifact of which there is one."""
        (ref,) = self.inputs[asset].values()
        return ref.path

    def paths(self, asset: str) -> dict[str, Path]:
        """The folders of an upstream artifact by partition."""
        return {str(partition): ref.path for partition, ref in self.inputs[asset].items()}

    def versions(self) -> dict[str, str]:
        return {_label(a, p): ref.version for a, refs in self.inputs.items() for p, ref in refs.items()}

    @property
    def answers(self) -> Path:
        """Where what engines answered is kept, for all steps of the store."""
        return self.store.root / ".answers"

    @property
    def name(self) -> str:
        """The partition, where the asset has one."""
        assert self.partition is not None
        return self.partition


def artifact(
    *,
    group: str,
    kinds: set[str],
    config: Sequence[str] = (),
    asks: Sequence[str] = (),
    tasks: str = "",
    reports: bool = False,
    deps: Sequence[Any] = (),
    partitions_def: dg.PartitionsDefinition | None = None,
    claims: Sequence[Claim] = (),
    pool: str | None = None,
    retry_policy: dg.RetryPolicy | None = None,
    code_version: str = "1",
) -> Callable[[Callable[[Step], Any]], dg.AssetsDefinition]:
    """Declare an asset. ``config`` names the profile's sections that the artifact depends on, ``asks`` those
    fields that name teachers: it depends on them, and on the teachers' prompt, model and temperature (``PRICES`` among
    them: on what all teachers cost). ``tasks``, a key of ``TASKS``: it depends on the versions of the families that it
    draws from. ``reports``: it shows the reports of its inputs, which can change where their files do not."""
    config = (*config, *(field for field in asks if field != PRICES))

    def decorate(body: Callable[[Step], Any]) -> dg.AssetsDefinition:
        name = body.__name__

        @dg.asset(
            name=name,
            description=body.__doc__,
            group_name=group,
            kinds=kinds,
            owners=OWNERS,
            deps=list(deps),
            partitions_def=partitions_def,
            check_specs=[claim.spec(name) for claim in claims],
            pool=pool,
            retry_policy=retry_policy,
            code_version=code_version,
            automation_condition=_on_changed_inputs(),
            metadata={
                CONFIG_KEY: dg.MetadataValue.json(list(config)),
                ASKS_KEY: dg.MetadataValue.json(list(asks)),
                TASKS_KEY: tasks,
                REPORTS_KEY: reports,
                CODE_KEY: code_version,
            },
        )
        def materialize(
            context: dg.AssetExecutionContext,
            settings: ProfileResource,
            store: ArtifactStoreResource,
            compute: ComputeResource,
            inference: InferenceResource,
            teachers: TeachersResource,
            embeddings: EmbeddingsResource,
        ) -> dg.MaterializeResult:  # type: ignore[type-arg]
            opened = store.open()
            partition = context.partition_key if context.has_partition_key and partitions_def else None

            def waiting() -> None:
                _announce(name, partition, 0, 0, ELSEWHERE)
                context.log.info(ELSEWHERE)

            with _as_failures(name, settings.profile), opened.making(name, partition, waiting):
                inputs = _inputs(context, opened, settings.profile)
                versions = {_label(a, p): ref.version for a, refs in inputs.items() for p, ref in refs.items()}
                domains = _teacher_partitions(context, settings.profile)
                versions |= teacher_versions(settings, domains)
                versions |= named_teacher_versions(settings, asks) | task_versions(tasks, partition)
                if reports:
                    versions |= report_versions(
                        {_label(a, p): ref.manifest for a, refs in inputs.items() for p, ref in refs.items()}
                    )
                chosen = config_of(settings.profile, config, partition)
                current = opened.current(name, partition)
                judged = fingerprint_of(code_version, chosen, versions)
                versions |= unjudged(tasks, partition, domains)
                fingerprint = fingerprint_of(code_version, chosen, versions)
                if current and current.manifest.fingerprint in (judged, fingerprint):
                    _announce(name, partition, -1, 0, "unchanged")
                    return _result(opened, current, claims, settings.profile, reused=True)
                scratch = opened.root / ".scratch" / f"{name}-{partition or '_'}-{fingerprint[:12]}"
                scratch.mkdir(parents=True, exist_ok=True)
                _announce(name, partition, 0, 0, "")
                with ExitStack() as stack:
                    if pool:
                        stack.enter_context(compute.gpu_lease(opened.root.parent))
                    stack.enter_context(compute.limits())
                    draft = stack.enter_context(
                        opened.write(name, partition, code_version=code_version, config=chosen, inputs=versions)
                    )
                    run_id = context.run.tags.get(PIPELINE_TAG, context.run_id)
                    step = Step(
                        settings.profile, partition, inputs, draft.path, scratch, _progress(context, name, partition),
                        run_id, opened, settings, compute, inference, teachers, embeddings,
                    )  # fmt: skip
                    report = body(step)
                    metrics = report_json(report)
                    draft.metrics = {"report": metrics}
                for stale in scratch.parent.glob(f"{name}-{partition or '_'}-{'[0-9a-f]' * 12}"):
                    shutil.rmtree(stale, ignore_errors=True)  # also of inputs that are no longer wanted
                assert draft.ref is not None
                _announce(name, partition, -1, 0, f"{draft.ref.manifest.seconds:.1f} s")
                return _result(opened, draft.ref, claims, settings.profile, reused=False)

        return materialize

    return decorate


@contextmanager
def _as_failures(name: str, profile: Profile) -> Iterator[None]:
    """What goes wrong in a step, in Dagster's terms: nothing that another try cannot cure is tried again."""
    try:
        yield
    except CogumiError as error:
        raise dg.Failure(description=str(error), allow_retries=error.retryable) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise dg.Failure(
            description=f"{name} needs more than compute.memory_gb = {profile.compute.memory_gb:g} GB\n"
            "  mend: raise it in the profile, or lower the batch or calibration sizes",
            allow_retries=False,
        ) from error
    finally:
        give_back_memory()  # one process makes one artifact after the other


def _on_changed_inputs() -> dg.AutomationCondition:  # type: ignore[type-arg]
    """``eager``, but not for a re-materialization with the same data version (dagster#25439), not past a
    failed blocking check of an input, and not for what was never made: the first run is the user's to start
    (else the first observation in a new installation would ask every teacher). A missing strategy holds nothing
    back: a profile makes only some of them."""
    condition = dg.AutomationCondition
    changed = condition.any_deps_match(condition.data_version_changed() | condition.will_be_requested())
    failed = condition.any_deps_match(condition.any_checks_match(condition.check_failed(), blocking_only=True))
    missing = condition.any_deps_match(condition.missing() & ~condition.will_be_requested())
    made = missing.ignore(dg.AssetSelection.assets("strategy_evaluation")).with_label("any_deps_missing")
    eager = condition.eager().replace("any_deps_updated", changed.with_label("any_deps_updated"))
    eager = eager.replace("any_deps_missing", made)
    return eager & ~failed & ~condition.missing()


def config_of(profile: Profile, sections: Sequence[str], partition: str | None = None) -> dict[str, Any]:
    """The named sections of a profile (``compression.pruning``) as JSON; the seed is always part of it. Of a mapping by
    partition (``modifiers.rank``) only the partition's own entry: another's changes nothing here."""
    chosen: dict[str, Any] = {"seed": profile.seed}
    for section in sections:
        value: Any = profile
        for part in section.split("."):
            value = getattr(value, part)
        if partition is not None and isinstance(value, Mapping):
            value = {name: own for name, own in value.items() if name == partition}
        chosen[section] = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return chosen


def teacher_versions(settings: ProfileResource, domains: Sequence[str]) -> dict[str, str]:
    """The version of ``teacher_data`` for each domain, as if it were an input artifact."""
    return {
        _label(TEACHER_DATA, domain): teacher_data_version(
            settings.profile, domain, settings.sources, settings.catalogue
        )
        for domain in domains
    }


def named_teacher_versions(settings: ProfileResource, fields: Sequence[str]) -> dict[str, str]:
    """The version of each teacher that these fields of the profile name, as if it were an input artifact; of all
    prices, where ``PRICES`` is among them."""
    if not fields:
        return {}
    known = load_catalogue(settings.catalogue)
    naming = [field for field in fields if field != PRICES]
    chosen = config_of(settings.profile, naming)
    named = [chosen[field] for field in naming]
    names = [name for value in named for name in ([value] if isinstance(value, str) else value)]
    versions = {_label("teacher", name): teacher_version(known.get(name), package_version()) for name in names}
    return versions | ({_label("teacher", PRICES): prices_version(known.prices())} if PRICES in fields else {})


def report_versions(inputs: Mapping[str, Manifest]) -> dict[str, str]:
    """The version of what each input reports, as if it were an input artifact of its own."""
    return {
        f"report of {name}": hashlib.sha256(
            json.dumps(manifest.metrics.get("report"), sort_keys=True).encode()
        ).hexdigest()
        for name, manifest in inputs.items()
    }


def task_versions(tasks: str, partition: str | None) -> dict[str, str]:
    """The version of each family of tasks that an asset draws from, as if it were an input artifact."""
    return {_label("tasks", name): family_version(name) for name in TASKS[tasks](partition)}


def unjudged(tasks: str, partition: str | None, domains: Sequence[str]) -> dict[str, str]:
    """An input more where answers are run to judge them and there is no sandbox: with one, what was made so is out of
    date, and not the other way round."""
    names = {*TASKS[tasks](partition), *(name for domain in domains for name in families_of(domain))}
    return {"sandbox": "none"} if cannot_judge(names) else {}


def _label(asset: str, partition: str | None) -> str:
    return f"{asset}[{partition}]" if partition else asset


def _dependencies(
    context: dg.AssetExecutionContext, profile: Profile, store: ArtifactStore | None = None
) -> Iterator[tuple[str, list[str | None]]]:
    """(asset, partitions) of each input, as the graph's partition mappings say.

    Of all strategies together, those that the profile names and those that were made besides.
    """
    for name in context.op_def.ins:
        key = context.asset_key_for_input(name)
        try:
            found = sorted(context.asset_partition_keys_for_input(name))
            known = partitions_made(context.asset_partitions_def_for_input(name), profile, store)
            partitions: list[str | None] = [key for key in found if key in known or len(found) == 1]
        except dg.DagsterInvariantViolationError:
            partitions = [None]
        except Exception as error:
            if "no asset partitions" not in str(error):
                raise
            partitions = [None]
        yield key.path[-1], partitions


def _inputs(
    context: dg.AssetExecutionContext, store: ArtifactStore, profile: Profile
) -> dict[str, dict[str | None, ArtifactRef]]:
    return {
        asset: {partition: store.get(asset, partition) for partition in partitions}
        for asset, partitions in _dependencies(context, profile, store)
        if asset != TEACHER_DATA
    }


def _teacher_partitions(context: dg.AssetExecutionContext, profile: Profile) -> list[str]:
    inputs = _dependencies(context, profile)
    return [str(partition) for asset, partitions in inputs if asset == TEACHER_DATA for partition in partitions]


def _progress(context: dg.AssetExecutionContext, name: str, partition: str | None) -> Progress:
    started = last = time.monotonic()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last
        _announce(name, partition, done, total, note)
        now = time.monotonic()
        if now - last > LOG_EVERY_SECONDS and done:
            left = (now - started) / done * (total - done)
            context.log.info(f"{done} of {total} ({note}), about {left:.0f} s left")
            last = now

    return report


def _announce(name: str, partition: str | None, done: int, total: int, note: str) -> None:
    for listener in listeners:
        listener(name, partition, done, total, note)


def _result(
    store: ArtifactStore, ref: ArtifactRef, claims: Sequence[Claim], profile: Profile, *, reused: bool
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """What Dagster records. Claims are evaluated each time: the thresholds may have changed since."""
    manifest = ref.manifest
    report = manifest.metrics.get("report", {})
    verdicts = [evaluate(claim, report, profile.thresholds) for claim in claims]
    store.annotate(ref, checks=[asdict(verdict) for verdict in verdicts])
    metadata = {
        **metadata_of(report),
        "bytes": manifest.bytes,
        "files": len(manifest.files),
        "seconds": round(manifest.seconds, 2),
        "path": dg.MetadataValue.path(str(ref.path)),
        "reused": reused,
    }
    taught = [version for name, version in manifest.inputs.items() if name.startswith(f"{TEACHER_DATA}[")]
    if taught:
        metadata[TEACHER_DATA] = taught[0]
    if isinstance(report.get("rows"), int):
        metadata["dagster/row_count"] = report["rows"]
    return dg.MaterializeResult(
        metadata=metadata,
        data_version=dg.DataVersion(manifest.data_version),
        check_results=[verdict.result() for verdict in verdicts],
    )
