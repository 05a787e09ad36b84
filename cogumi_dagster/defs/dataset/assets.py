"""From sources to the distillation dataset, domain by domain."""

from typing import cast

import dagster as dg

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.dataset import checks
from cogumi_dagster.defs.partitions import domain_partitions
from cogumi_dagster.lib.curation.dataset import DatasetReport, build_dataset
from cogumi_dagster.lib.curation.filters import CurationReport, curate
from cogumi_dagster.lib.curation.judge import QualityReport, score_responses
from cogumi_dagster.lib.curation.sources import SourcesReport, draw_source_examples
from cogumi_dagster.lib.evaluation.humaneval import benchmark_prompts
from cogumi_dagster.lib.jsonl import read_jsonl, write_jsonl
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teacher_data import domain_examples, domain_mix, teacher_data_version
from cogumi_dagster.lib.teaching.available import judges
from cogumi_dagster.lib.teaching.teach import ResponseRow, TeachingReport, teach
from cogumi_dagster.lib.training.student import package_version, token_counter
from resources.settings import ProfileResource

ROWS = "rows.jsonl"


@dg.observable_source_asset(
    name="teacher_data",
    group_name="dataset",
    partitions_def=domain_partitions,
    tags={"dagster/kind/yaml": ""},
    description="What a domain is taught from: its source files or task spec, its teachers' models and prompts, and "
    "the judge's rubric. Its version is their hash; a sensor observes it.",
)
def teacher_data(settings: ProfileResource) -> dg.DataVersionsByPartition:
    return dg.DataVersionsByPartition(
        {d: teacher_data_version(settings.profile, d, settings.sources, settings.catalogue) for d in DOMAINS}
    )


@artifact(
    group="dataset",
    kinds={"python", "jsonl"},
    config=("dataset.examples", "dataset.mix"),
    deps=[teacher_data],
    partitions_def=domain_partitions,
    claims=checks.SOURCE_EXAMPLES,
)
def source_examples(step: Step) -> SourcesReport:
    """Instructions of one domain, drawn from its task families and the user's own files, with difficulty,
    provenance and licence. Broken lines of a file are counted and located; the rest is kept."""
    count = domain_examples(step.profile, step.name)
    tasks, report = draw_source_examples(step.name, step.settings.sources, count, step.profile.seed)
    write_jsonl(step.out / ROWS, (task.to_json() for task in tasks))
    return report


@artifact(
    group="dataset",
    kinds={"llm", "jsonl"},
    config=("teaching",),
    deps=[teacher_data, source_examples],
    partitions_def=domain_partitions,
    claims=checks.TEACHER_RESPONSES,
    retry_policy=dg.RetryPolicy(max_retries=2, delay=20, backoff=dg.Backoff.EXPONENTIAL),
)
def teacher_responses(step: Step) -> TeachingReport:
    """Answers by the domain's mix of teachers, from a journal that never loses or repeats a paid call.
    Offline the teachers are the exact solver and a local model, whose answers stay only where the verifier
    accepts them."""
    teaching = step.profile.teaching
    tasks = [Task.from_json(row) for row in read_jsonl(step.path("source_examples") / ROWS)]
    with step.teachers.journal(step.store.root, step.run_id) as journal, step.teachers.local() as local:
        rows, report = teach(
            tasks,
            step.name,
            {entry.teacher: entry.share for entry in domain_mix(step.profile, step.name)},
            step.teachers.catalogue,
            journal,
            local,
            verify,
            max_tokens=teaching.max_tokens,
            concurrency=teaching.concurrency,
            cap_usd=teaching.max_usd_per_run,
            on_doubt=teaching.on_doubt,
            engine_version=package_version(),
            later=judges(step.profile),
            progress=step.progress,
        )
    write_jsonl(step.out / ROWS, (dict(row) for row in rows))
    return report


@artifact(
    group="dataset",
    kinds={"llm", "jsonl"},
    config=("teaching.judge",),
    deps=[teacher_data, teacher_responses],
    partitions_def=domain_partitions,
    claims=checks.QUALITY_SCORES,
)
def quality_scores(step: Step) -> QualityReport:
    """The judge's rubric for each answer: accuracy 0-3, completeness 0-2, coherence 0-2, helpfulness 0-3.
    Offline the verifier and rules fill it, and the report says so (judge: rules)."""
    teaching = step.profile.teaching
    with step.teachers.journal(step.store.root, step.run_id) as journal, step.teachers.local() as local:
        rows, report = score_responses(
            cast(list[ResponseRow], read_jsonl(step.path("teacher_responses") / ROWS)),
            teaching.judge,
            catalogue=step.teachers.catalogue,
            journal=journal,
            engine=local,
            cap_usd=teaching.max_usd_per_run,
            on_doubt=teaching.on_doubt,
            concurrency=teaching.concurrency,
            engine_version=package_version(),
            progress=step.progress,
        )
    write_jsonl(step.out / ROWS, (dict(row) for row in rows))
    return report


@artifact(
    group="dataset",
    kinds={"python", "jsonl"},
    config=("dataset.filters", "dataset.quality_threshold"),
    deps=[quality_scores, dg.AssetKey("student_model")],
    partitions_def=domain_partitions,
    claims=checks.CURATED_EXAMPLES,
)
def curated_examples(step: Step) -> CurationReport:
    """Answers of quality 7 or more that pass the filters: length in the student's tokens, language, personal
    data, offensive content, licence, repetition, form. Each drop has a reason."""
    dataset = step.profile.dataset
    kept, report = curate(
        read_jsonl(step.path("quality_scores") / ROWS),
        dataset.filters,
        dataset.quality_threshold,
        token_counter(step.path("student_model")),
    )
    write_jsonl(step.out / ROWS, kept)
    return report


@artifact(
    group="dataset",
    kinds={"python", "parquet"},
    config=("dataset",),
    deps=[dg.AssetDep(curated_examples, partition_mapping=dg.AllPartitionMapping())],
    claims=checks.DISTILLATION_DATASET,
)
def distillation_dataset(step: Step) -> DatasetReport:
    """All domains together: deduplicated across domains (MinHash-LSH, verified), decontaminated against the
    benchmarks, balanced to the domain mix, split by content hash; JSONL and Parquet with SHA-256."""
    rows = {domain: read_jsonl(folder / ROWS) for domain, folder in step.paths("curated_examples").items()}
    return build_dataset(
        rows,
        step.out,
        step.profile.dataset,
        benchmark_prompts(),
        step.profile.seed,
        progress=step.progress,
    )


ASSETS = [
    teacher_data, source_examples, teacher_responses, quality_scores, curated_examples, distillation_dataset,
]  # fmt: skip
