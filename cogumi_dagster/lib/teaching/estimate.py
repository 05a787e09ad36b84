"""What the dataset's teachers will be asked and what it will cost, from a sample, before anything is sent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.curation.judge import JUDGE_PROMPT, JUDGE_TOKENS
from cogumi_dagster.lib.curation.sources import draw_source_examples
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teacher_data import domain_examples, domain_mix
from cogumi_dagster.lib.teaching.available import judges
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher, prompt_tokens_about
from cogumi_dagster.lib.teaching.journal import Habit, Journal, call_key
from cogumi_dagster.lib.teaching.teach import assigned_teacher, chat_messages

SAMPLE = 1000
"""Tasks drawn a domain. The mean prompt of a thousand is known to a few per cent."""

LONGEST = "the longest"
"""The basis of a row without history: every answer is as long as it may be."""


@dataclass(frozen=True)
class PlannedCalls:
    """One teacher's calls in one domain. Counts are of the whole draw, scaled up from the sample."""

    domain: str
    """Of modifiers their name, of strategies their family."""
    teacher: str
    step: str
    """``answers``, or ``scores`` for the judge; for others see ``planning.teachers``."""
    tasks: int
    known: int
    """Answers that the journal has: they cost nothing again."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    """None where the price is unknown."""
    worst_usd: float | None
    """What the caps reserve: as many prompt tokens as bytes, and every answer as long as it may be."""
    minutes: float
    """At least, by the limit of requests per minute; 0 for teachers on this machine."""
    basis: str
    """Where the length of the answers is from."""


@dataclass(frozen=True)
class DatasetPlan:
    """All calls, in the order of the domains."""

    rows: tuple[PlannedCalls, ...]
    sampled: int
    """Tasks drawn to estimate from."""
    tasks: int
    calls: int
    usd: float | None
    worst_usd: float | None
    max_usd_per_run: float
    max_usd_per_month: float | None
    month_usd: float
    """Spent in this calendar month (UTC) so far."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_dataset(
    profile: Profile, sources: Path, catalogue: Catalogue, journal: Journal | None, *, engine_version: str = ""
) -> DatasetPlan:
    """Estimate calls, tokens and dollars by domain and teacher, less what the journal has. Sends nothing.

    Prompts are counted in the sample at four bytes a token; answers are as long as that teacher's were so far in that
    domain, else as long as ``teaching.max_tokens`` allows.

    Raises CogumiError for sources, teachers or shares that a run would refuse too.
    """
    habits = journal.habits() if journal else {}
    rows: list[PlannedCalls] = []
    sampled = total = 0
    for domain in profile.teaching.mix:
        wanted = domain_examples(profile, domain)
        tasks, _ = draw_source_examples(domain, sources, min(wanted, SAMPLE), profile.seed)
        count = wanted if len(tasks) >= SAMPLE else len(tasks)
        sampled, total = sampled + len(tasks), total + count
        domain_rows = _answers(profile, catalogue, journal, habits, domain, tasks, count, engine_version)
        for judge in judges(profile):
            domain_rows.append(_scores(profile, catalogue.get(judge), habits, domain, tasks, domain_rows))
        rows += domain_rows
    return DatasetPlan(
        tuple(rows),
        sampled,
        total,
        sum(row.calls for row in rows),
        sum_known([row.usd for row in rows]),
        sum_known([row.worst_usd for row in rows]),
        profile.teaching.max_usd_per_run,
        profile.teaching.max_usd_per_month,
        journal.month_micros() / MICROS if journal else 0.0,
    )


def _answers(
    profile: Profile,
    catalogue: Catalogue,
    journal: Journal | None,
    habits: dict[tuple[str, str], Habit],
    domain: str,
    tasks: Sequence[Task],
    count: int,
    engine_version: str,
) -> list[PlannedCalls]:
    shares = {entry.teacher: entry.share for entry in domain_mix(profile, domain)}
    room = profile.teaching.max_tokens
    rows = []
    for name, share in shares.items():
        teacher = catalogue.get(name)
        mine = [chat_messages(teacher, task.prompt) for task in tasks if assigned_teacher(task, shares) == name]
        keys = [
            call_key(
                teacher,
                messages,
                max_tokens=room,
                temperature=teacher.temperature,
                sample=0,
                engine_version=engine_version,
            )
            for messages in mine
        ]
        known = journal.replay(keys) if journal else {}
        fresh = [m for m, key in zip(mine, keys, strict=True) if key not in known]
        scale = count / len(tasks) if tasks else 0.0
        if share > 0:
            rows.append(
                planned_calls(teacher, domain, "answers", len(mine), fresh, scale, room, habits.get((name, domain)))
            )
    return rows


def _scores(
    profile: Profile,
    judge: Teacher,
    habits: dict[tuple[str, str], Habit],
    domain: str,
    tasks: Sequence[Task],
    answers: Sequence[PlannedCalls],
) -> PlannedCalls:
    """The judge reads every answer; its prompt holds the rubric, the task and the answer."""
    count = sum(row.tasks for row in answers)
    habit = habits.get((judge.name, domain))
    teaches = any(row.teacher == judge.name for row in answers)
    calls = sum(row.calls for row in answers) if teaches or habit is None else max(0, count - habit.calls)
    fresh = sum(row.calls for row in answers)
    room = profile.teaching.max_tokens  # of the answer that is read; thinking is billed and not shown
    length = min(room, sum(row.completion_tokens for row in answers) / fresh) if fresh else room
    read = "x" * round(4 * length)
    sample = [
        (Message(role="system", content=JUDGE_PROMPT), Message(role="user", content=task.prompt + read))
        for task in tasks[: max(1, min(len(tasks), calls))]
    ]
    scale = calls / len(sample) if sample else 0.0
    row = planned_calls(
        judge, domain, "scores", len(sample), sample if calls else [], scale, JUDGE_TOKENS, None if teaches else habit
    )
    return PlannedCalls(**{**asdict(row), "tasks": count, "known": count - row.calls})


def planned_calls(
    teacher: Teacher,
    domain: str,
    step: str,
    tasks: int,
    fresh: Sequence[Sequence[Message]],
    scale: float,
    room: int,
    habit: Habit | None,
) -> PlannedCalls:
    """The row of ``fresh`` calls, ``scale`` times over; ``room`` is what an answer may have of tokens."""
    calls = round(len(fresh) * scale)
    solver = teacher.provider == "solver"
    prompt = 0 if solver else round(sum(map(prompt_tokens_about, fresh)) * scale)
    length = habit.completion_tokens if habit else float(room + teacher.reasoning_tokens)
    completion = 0 if solver else round(length * calls)
    cached = round(prompt * habit.cached_share) if habit else 0
    usd = worst = None
    if teacher.priced:
        usd = teacher.cost_micros(prompt, completion, cached) / MICROS
        worst = sum(teacher.worst_case_micros(messages, room) for messages in fresh) * scale / MICROS
    basis = f"mean of {habit.calls:,} answers" if habit else LONGEST
    return PlannedCalls(
        domain=domain,
        teacher=teacher.name,
        step=step,
        tasks=round(tasks * scale),
        known=round(tasks * scale) - calls,
        calls=calls,
        prompt_tokens=prompt,
        completion_tokens=completion,
        usd=usd,
        worst_usd=worst,
        minutes=calls / teacher.requests_per_minute if teacher.paid else 0.0,
        basis="exact" if solver else basis,
    )


def sum_known(figures: Sequence[float | None]) -> float | None:
    """Their sum; None where one is unknown."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None
