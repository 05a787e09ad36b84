"""What the served base gets wrong on a modifier's training tasks, and what it gets right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import accuracy, answer_tasks, by_family, machine_seconds
from cogumi_dagster.lib.evaluation.statistics import Proportion
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.modifiers.near import NearDuplicates, draw_distinct
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import draw_from, families_of, family_pool, verify
from cogumi_dagster.lib.tasks.base import Task

SUCCESSES = "successes.jsonl"
"""What the base got right, in the failures' artifact."""

MODIFIER_DOMAINS: Mapping[str, tuple[str, ...]] = {
    "code": ("code",),
    "reasoning": ("reasoning", "math"),
    "automation": ("automation",),
}
"""The task domains that each modifier answers for."""


@dataclass(frozen=True)
class FailuresReport:
    """How the base did on its training tasks. ``not_run``: code for which there is no sandbox."""

    tasks: int
    failures: int
    successes: int
    not_run: int
    accuracy: Proportion
    by_family: Mapping[str, Proportion]
    tokens_per_second: float


def families_for(modifier: str) -> list[str]:
    """The families of tasks of a modifier's domains."""
    return [name for domain in MODIFIER_DOMAINS[modifier] for name in families_of(domain)]


def held_out_tasks(modifier: str, count: int, seed: int) -> list[Task]:
    """The tasks (split ``test``) on which a modifier is evaluated, no two with the same solution."""
    return draw_distinct(families_for(modifier), count, seed + 1, "test")


def training_tasks(modifier: str, count: int, seed: int, kept_apart: Sequence[Task]) -> list[Task]:
    """The tasks (split ``train``) that a modifier may learn from: none is a near-duplicate of those ``kept_apart``, on
    which it will be measured. (The base's own lessons are drawn with ``seed``: on these it fails less.)"""
    others = NearDuplicates(kept_apart)
    pools = {name: (1.0, others.past(family_pool(name, seed + 2))) for name in families_for(modifier)}
    return draw_from(pools, count, {"train"})


def find_failures(
    engine: Engine,
    modifier: str,
    out: Path,
    *,
    count: int,
    kept_apart: Sequence[Task] = (),
    min_failures: int,
    seed: int,
    progress: Progress = silent,
) -> FailuresReport:
    """Answer ``count`` training tasks with the base alone; write failures.jsonl and successes.jsonl.

    Raises:
        CogumiError: a family's verifier rejects its own solver, or fewer failures than ``min_failures``.
    """
    tasks = training_tasks(modifier, count, seed, kept_apart)
    for task in tasks:
        if task.solution is not None and verify(task, task.solution).passed is False:
            raise CogumiError(
                f"the verifier of {task.family} rejects its own solution of task {task.id}", "mend the family first"
            )
    answers = answer_tasks(engine, tasks, logprobs=True, progress=progress)
    failures = [answer for answer in answers if answer.verdict.passed is False]
    not_run = sum(answer.verdict.passed is None for answer in answers)
    if len(failures) < min_failures:
        unjudged = f" ({not_run} were not run: there is no sandbox)" if not_run else ""
        raise CogumiError(
            f"the base fails on only {len(failures)} of {len(tasks)} {modifier} tasks, fewer than {min_failures}"
            f"{unjudged}",
            ("install bubblewrap, " if not_run else "")
            + "raise modifiers.training_tasks or lower modifiers.min_failures",
        )
    write_jsonl(out / "failures.jsonl", (answer.to_json() for answer in failures))
    write_jsonl(out / SUCCESSES, (answer.to_json() for answer in answers if answer.passed))
    return FailuresReport(
        tasks=len(tasks),
        failures=len(failures),
        successes=sum(answer.passed for answer in answers),
        not_run=not_run,
        accuracy=accuracy(answers),
        by_family=by_family(answers),
        tokens_per_second=sum(answer.completion.completion_tokens for answer in answers)
        / machine_seconds(engine, answers),
    )
