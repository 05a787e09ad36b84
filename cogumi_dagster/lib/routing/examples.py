"""What the router learns from: base and modifier on the same held-out tasks, with token log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import Answered, accuracy, answer_tasks
from cogumi_dagster.lib.evaluation.statistics import Proportion
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.modifiers.failures import MODIFIER_DOMAINS
from cogumi_dagster.lib.modifiers.near import draw_distinct
from cogumi_dagster.lib.progress import Progress, in_parts, silent
from cogumi_dagster.lib.serving.answering import SERVED_TOKENS
from cogumi_dagster.lib.tasks import families_of
from cogumi_dagster.lib.tasks.base import Split, Task

ROUTED_DOMAINS = ("code", "reasoning", "math", "automation", "science", "conversation", "creative")
MODIFIER_OF: Mapping[str, str] = {domain: name for name, domains in MODIFIER_DOMAINS.items() for domain in domains}


@dataclass(frozen=True)
class DomainRow:
    domain: str
    modifier: str
    tasks: int
    base: float
    modified: float
    oracle: float


@dataclass(frozen=True)
class RoutingExamplesReport:
    """Label balance: how often the base is right, and how often asking the modifier would pay."""

    rows: int
    split: str
    base_right: Proportion
    modifier_right: Proportion
    modifier_repairs: Proportion
    not_run: int
    domains: tuple[DomainRow, ...]


def router_tasks(count: int, seed: int) -> list[Task]:
    """What the router learns from and is calibrated on: tasks (split ``validation``) that no modifier has learned."""
    return _routed_tasks(count, seed + 3, "validation")


def system_tasks(count: int, seed: int) -> list[Task]:
    """What the served system is measured on: fresh tasks (split ``test``)."""
    return _routed_tasks(count, seed + 29, "test")


def _routed_tasks(count: int, seed: int, split: Split) -> list[Task]:
    """Tasks of one split, all routed domains in equal parts; no two of a domain have the same solution."""
    tasks: list[Task] = []
    for index, domain in enumerate(ROUTED_DOMAINS):
        wanted = count // len(ROUTED_DOMAINS) + (index < count % len(ROUTED_DOMAINS))
        tasks += draw_distinct(families_of(domain), wanted, seed, split)
    return tasks


def collect_examples(
    engine: Engine, out: Path, *, count: int, seed: int, progress: Progress = silent
) -> RoutingExamplesReport:
    """Answer with the base, and with the modifier of the task's domain where there is one; write examples.jsonl.

    Raises:
        CogumiError: no task could be judged.
    """
    rows, base, modified = collect_rows(engine, router_tasks(count, seed), progress)
    if not rows:
        raise CogumiError("no task could be judged", "install bubblewrap for the code tasks, or raise routing.examples")
    write_jsonl(out / "examples.jsonl", rows)
    pairs = [(b, modified.get(b.task.id)) for b in base if b.verdict.passed is not None]
    other = [m for _, m in pairs if m is not None]
    repairs = [m for b, m in pairs if m is not None and not b.passed]
    return RoutingExamplesReport(
        rows=len(rows),
        split="validation",
        base_right=accuracy([b for b, _ in pairs]),
        modifier_right=accuracy(other),
        modifier_repairs=accuracy(repairs),
        not_run=len(base) - len(rows),
        domains=tuple(_domain_row(domain, pairs) for domain in ROUTED_DOMAINS),
    )


def collect_rows(
    engine: Engine, tasks: Sequence[Task], progress: Progress = silent
) -> tuple[list[dict[str, Any]], list[Answered], dict[str, Answered]]:
    """(rows for ``routing``, base answers, the modifiers' answers by task id). Answers have the room that the server
    gives: it does not know a task's family, and what was cut off looks otherwise to the router."""
    groups = {name: [t for t in tasks if MODIFIER_OF.get(t.domain) == name] for name in engine.adapters}
    part = in_parts(progress, len(tasks) + sum(map(len, groups.values())))
    base = answer_tasks(engine, tasks, logprobs=True, room=SERVED_TOKENS, progress=part(len(tasks)))
    modified: dict[str, Answered] = {}
    for name, group in groups.items():
        answers = answer_tasks(engine, group, adapter=name, room=SERVED_TOKENS, progress=part(len(group)))
        modified |= {answer.task.id: answer for answer in answers}
    rows = []
    for answer in base:
        other = modified.get(answer.task.id)
        if answer.verdict.passed is None or (other is not None and other.verdict.passed is None):
            continue
        responsible = MODIFIER_OF.get(answer.task.domain) if other is not None else None
        rows.append(
            {
                "task_id": answer.task.id,
                "domain": answer.task.domain,
                "family": answer.task.family,
                "modifier": responsible,
                "prompt": answer.task.prompt,
                "split": answer.task.split,
                "base": _side(answer),
                "modifiers": {responsible: _side(other)} if responsible and other else {},
            }
        )
    return rows, base, modified


def _side(answer: Answered) -> dict[str, Any]:
    completion = answer.completion
    return {
        "text": completion.text,
        "passed": answer.passed,
        "logprobs": [round(value, 4) for value in completion.logprobs],
        "completion_tokens": completion.completion_tokens,
    }


def _domain_row(domain: str, pairs: Sequence[tuple[Answered, Answered | None]]) -> DomainRow:
    here = [(b, m) for b, m in pairs if b.task.domain == domain]
    count = max(1, len(here))
    return DomainRow(
        domain=domain,
        modifier=MODIFIER_OF.get(domain, "none"),
        tasks=len(here),
        base=sum(b.passed for b, _ in here) / count,
        modified=sum((m or b).passed for b, m in here) / count,
        oracle=sum(b.passed or (m is not None and m.passed) for b, m in here) / count,
    )
