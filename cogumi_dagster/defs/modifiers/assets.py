"""Modifiers: what the served base gets wrong, patterned, taught, trained, packaged and gated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.base.assets import base_checkpoint
from cogumi_dagster.defs.compression.assets import gguf_model
from cogumi_dagster.defs.modifiers import checks
from cogumi_dagster.defs.partitions import modifier_partitions
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.jsonl import read_jsonl, write_jsonl
from cogumi_dagster.lib.modifiers.cascade import CascadeReport, run_cascade
from cogumi_dagster.lib.modifiers.evaluate import GATE_FILE, ModifierReport, evaluate_modifier
from cogumi_dagster.lib.modifiers.failures import SUCCESSES, FailuresReport, families_for, find_failures, held_out_tasks
from cogumi_dagster.lib.modifiers.package import ADAPTER_FILE, ModifierPackageReport, package_modifier
from cogumi_dagster.lib.modifiers.patterns import PatternsReport, find_patterns
from cogumi_dagster.lib.modifiers.rehearsal import rehearsal_lessons
from cogumi_dagster.lib.modifiers.siblings import sibling_lessons
from cogumi_dagster.lib.modifiers.train import (
    REHEARSAL,
    ROWS,
    SIBLINGS,
    answered_rows,
    modifier_pairs,
    replayed_rows,
    split_lessons,
    taught,
    train_on_served_weights,
)
from cogumi_dagster.lib.progress import in_parts
from cogumi_dagster.lib.routing.examples import router_tasks, system_tasks
from cogumi_dagster.lib.tasks import family_version, verify
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import TrainingReport
from cogumi_dagster.lib.training.student import package_version


@artifact(
    group="modifiers",
    kinds={"gguf", "jsonl"},
    config=(
        "modifiers.training_tasks", "modifiers.held_out_tasks", "modifiers.min_failures", "routing.examples",
        "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    tasks="modifier",
    deps=[gguf_model],
    partitions_def=modifier_partitions,
    claims=checks.DOMAIN_FAILURES,
    code_version="6",
    pool="gpu",
)  # fmt: skip
def domain_failures(step: Step) -> FailuresReport:
    """The served base's wrong answers on the modifier's training tasks, each with the verifier's reason and the
    token log-probabilities; its right answers beside them, for replay."""
    modifiers = step.profile.modifiers
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE, kept=step.answers) as engine:
        return find_failures(
            engine,
            step.name,
            step.out,
            count=modifiers.training_tasks,
            kept_apart=_kept_apart(step),
            min_failures=modifiers.min_failures,
            seed=step.profile.seed,
            progress=step.progress,
        )


def _kept_apart(step: Step) -> list[Task]:
    """What a modifier may learn no near-duplicate of: the tasks on which it, the router and the system are measured."""
    profile = step.profile
    return [
        *held_out_tasks(step.name, profile.modifiers.held_out_tasks, profile.seed),
        *router_tasks(profile.routing.examples, profile.seed),
        *system_tasks(profile.routing.examples, profile.seed),
    ]


@artifact(
    group="modifiers",
    kinds={"scikitlearn", "jsonl"},
    config=("modifiers.clusters",),
    deps=[domain_failures],
    partitions_def=modifier_partitions,
    claims=checks.FAILURE_PATTERNS,
    code_version="3",
)
def failure_patterns(step: Step) -> PatternsReport:
    """Failures embedded and clustered, the number of clusters chosen by silhouette, each with a name."""
    return find_patterns(
        read_jsonl(step.path("domain_failures") / "failures.jsonl"),
        step.embeddings.embed,
        step.out,
        clusters=step.profile.modifiers.clusters,
        seed=step.profile.seed,
    )


@artifact(
    group="modifiers",
    kinds={"llm", "jsonl"},
    config=(
        "modifiers.tier1_samples", "modifiers.siblings", "modifiers.rehearsal", "modifiers.held_out_tasks",
        "routing.examples", "teaching.max_tokens",
    ),
    asks=("modifiers.cascade",),
    tasks="modifier",
    deps=[domain_failures, failure_patterns],
    partitions_def=modifier_partitions,
    claims=checks.CASCADE_EXAMPLES,
    code_version="5",
    retry_policy=dg.RetryPolicy(max_retries=2, delay=20, backoff=dg.Backoff.EXPONENTIAL),
)  # fmt: skip
def cascade_examples(step: Step) -> CascadeReport:
    """Answers to the failed tasks from a cascade of teachers, cheap ones first, each accepted by its verifier, further
    solved problems of their kinds, and for code library functions to rehearse. Offline the tiers are the local model
    (1) and the exact solver (3)."""
    teaching, modifiers = step.profile.teaching, step.profile.modifiers
    tasks = [Task.from_json(row["task"]) for row in read_jsonl(step.path("domain_failures") / "failures.jsonl")]
    clusters = {r["task_id"]: r["cluster"] for r in read_jsonl(step.path("failure_patterns") / "assignments.jsonl")}
    each = modifiers.siblings.get(step.name, 0)  # type: ignore[call-overload]
    part = in_parts(step.progress, (1 + each) * len(tasks))
    with step.teachers.journal(step.store.root, step.run_id) as journal, step.teachers.local() as local:
        rows, report = run_cascade(
            tasks,
            clusters,
            step.teachers.catalogue,
            modifiers.cascade,
            journal,
            local,
            verify,
            modifiers.tier1_samples,
            max_tokens=teaching.max_tokens,
            concurrency=teaching.concurrency,
            cap_usd=teaching.max_usd_per_run,
            on_doubt=teaching.on_doubt,
            engine_version=package_version(),
            progress=part(len(tasks)),
        )
    write_jsonl(step.out / ROWS, (dict(row) for row in rows))
    siblings = sibling_lessons(
        tasks,
        clusters,
        each,
        known={task.id for task in tasks} | {row["task"]["id"] for row in _successes(step)},
        held_out=_kept_apart(step),
        seed=step.profile.seed,
        progress=part(each * len(tasks)),
    )
    if siblings:
        write_jsonl(step.out / SIBLINGS, siblings)
    count = modifiers.rehearsal.get(step.name, 0)  # type: ignore[call-overload]
    rehearsed = rehearsal_lessons(count, step.profile.seed)
    if rehearsed:
        write_jsonl(step.out / REHEARSAL, rehearsed)
    return replace(report, siblings=len(siblings), rehearsed=len(rehearsed))


def _successes(step: Step) -> list[dict[str, Any]]:
    return read_jsonl(step.path("domain_failures") / SUCCESSES)


def _answered(step: Step) -> list[dict[str, Any]]:
    return answered_rows(step.path("cascade_examples"))


def _replayed(step: Step) -> list[dict[str, Any]]:
    return replayed_rows(step.path("domain_failures"), step.path("cascade_examples"))


def _lessons(step: Step) -> list[Pair]:
    return modifier_pairs(
        _answered(step),
        _replayed(step),
        step.profile.modifiers.replay_share,
        step.profile.seed,
    )


@artifact(
    group="modifiers",
    kinds={"pytorch", "peft"},
    config=("modifiers.training", "modifiers.rank", "modifiers.replay_share", "compute.device"),
    deps=[cascade_examples, domain_failures, gguf_model, base_checkpoint],
    partitions_def=modifier_partitions,
    claims=checks.MODIFIER_ADAPTER,
    code_version="4",
    pool="gpu",
)
def modifier_adapter(step: Step) -> TrainingReport:
    """A LoRA trained on the weights that are served (the GGUF, dequantized), on what the base got wrong, with
    a replay of what it got right."""
    rank = step.profile.modifiers.rank[step.name]  # type: ignore[index]
    return train_on_served_weights(
        step.path("gguf_model") / MODEL_FILE,
        step.path("base_checkpoint"),
        _lessons(step),
        step.out,
        step.profile.modifiers.training.of_rank(rank),
        scratch=step.scratch,
        device=step.compute.device,
        processes=step.profile.compute.processes,
        seed=step.profile.seed,
        balance=True,
        progress=step.progress,
        section="modifiers.training",
    )


@artifact(
    group="modifiers",
    kinds={"gguf", "zstd"},
    config=(
        "modifiers.prune_shares", "modifiers.prune_keeps", "modifiers.training.max_length", "compression.zstd_level",
        "compression.dictionary_kb",
    ),
    deps=[modifier_adapter, gguf_model, base_checkpoint, cascade_examples, domain_failures],
    partitions_def=modifier_partitions,
    claims=checks.PACKAGED_MODIFIER,
    tasks="modifier",
    code_version="9",
)  # fmt: skip
def packaged_modifier(step: Step) -> ModifierPackageReport:
    """The modifier as a GGUF adapter, pruned as far as its quality holds and packed, with the hashes of the base,
    tokenizer and chat template that it fits."""
    compression = step.profile.compression
    lessons, validation = split_lessons(_lessons(step), step.profile.seed)
    return package_modifier(
        step.path("modifier_adapter"),
        step.path("gguf_model") / MODEL_FILE,
        step.path("base_checkpoint"),
        lessons,
        validation,
        step.out,
        families={name: family_version(name) for name in families_for(step.name)},
        max_length=step.profile.modifiers.training.max_length,
        prune_shares=step.profile.modifiers.prune_shares,
        prune_keeps=step.profile.modifiers.prune_keeps,
        level=compression.zstd_level,
        dictionary_kb=compression.dictionary_kb,
        progress=step.progress,
    )


@artifact(
    group="modifiers",
    kinds={"gguf"},
    config=(
        "modifiers.held_out_tasks", "modifiers.noise_seeds", "modifiers.cross_domain_tasks", "humaneval_problems",
        "serving.max_answer_tokens", "serving.context", "taught_tokens",
    ),
    tasks="routed",
    deps=[packaged_modifier, cascade_examples, domain_failures, gguf_model],
    partitions_def=modifier_partitions,
    claims=checks.MODIFIER_EVALUATION,
    code_version="12",
    pool="gpu",
)  # fmt: skip
def modifier_evaluation(step: Step) -> ModifierReport:
    """Base against base + modifier on held-out tasks, served: what was repaired, what was kept, and the double
    gate."""
    modifiers = step.profile.modifiers
    adapters = {step.name: step.path("packaged_modifier") / ADAPTER_FILE}
    with step.inference.engine(step.path("gguf_model") / MODEL_FILE, adapters, step.answers) as engine:
        return evaluate_modifier(
            engine,
            step.name,
            step.out,
            count=modifiers.held_out_tasks,
            noise_seeds=modifiers.noise_seeds,
            cross_domain_tasks=modifiers.cross_domain_tasks,
            humaneval=step.profile.humaneval_problems,
            lessons=taught(_answered(step), _replayed(step)),
            seed=step.profile.seed,
            progress=step.progress,
        )


def gates_passed(step: Step) -> dict[str, bool]:
    """Whether each modifier's evaluation opened its gate."""
    folders = step.paths("modifier_evaluation")
    return {name: json.loads((folder / GATE_FILE).read_text())["passed"] for name, folder in folders.items()}


def shipped_adapters(step: Step) -> dict[str, Path]:
    """The packaged modifiers that are served: those that passed their gate, or all where the profile says so."""
    shipped = [name for name, passed in gates_passed(step).items() if passed or step.profile.modifiers.ship == "all"]
    folders = step.paths("packaged_modifier")
    return {name: folders[name] / ADAPTER_FILE for name in shipped}


ASSETS = [
    domain_failures, failure_patterns, cascade_examples, modifier_adapter, packaged_modifier, modifier_evaluation,
]  # fmt: skip
