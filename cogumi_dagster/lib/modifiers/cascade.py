"""The cascade: cheap teachers answer first, and only what a verifier rejects goes to a better one.

Tier 1 answers with several samples, tier 2 takes what is left, tier 3 the rest. Every accepted row passed its
verifier and carries its tier, teacher and cost. Targets of the tier mix are the specification's.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import judged
from cogumi_dagster.lib.tasks.base import Task, Verdict
from cogumi_dagster.lib.teaching.asking import OVER_BUDGET, Asker, Outcome, Request
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import InDoubt, Journal, OnDoubt
from cogumi_dagster.lib.teaching.providers import solve
from cogumi_dagster.lib.teaching.teach import ResponseRow, chat_messages, response_row, settle_doubts

TIER_TARGETS: Mapping[int, tuple[float, float]] = {1: (0.60, 0.70), 2: (0.20, 0.25), 3: (0.10, 0.15)}
"""Shares of the accepted rows that each tier should answer, by the specification."""

SAMPLE_TEMPERATURE = 0.8
"""Of tier 1's samples. Sampling finds answers that greedy decoding misses: Chen et al. 2021 (arXiv:2107.03374) used
0.8 for pass@100."""


class CascadeRow(ResponseRow):
    """An accepted answer. ``usd`` is its own cost, ``usd_total`` with all rejected attempts at the task."""

    cluster: int
    sample: int
    attempts: int
    usd_total: float


@dataclass(frozen=True)
class TierReport:
    """One tier. ``share`` is of all accepted rows; ``low`` and ``high`` are its target."""

    tier: int
    teachers: tuple[str, ...]
    asked: int
    """Tasks that reached this tier."""
    accepted: int
    share: float | None
    low: float
    high: float
    usd: float


@dataclass(frozen=True)
class CascadeReport:
    """What the cascade came to. Dollars; counts are of tasks."""

    tasks: int
    accepted: int
    verified_share: float | None
    """Accepted of all tasks: every accepted row passed its verifier."""
    tiers: tuple[TierReport, ...]
    missing_tiers: tuple[int, ...]
    note: str
    usd: float
    """What the new calls cost."""
    usd_per_accepted: float | None
    """All that was ever paid for these tasks, rejected attempts included, by accepted row."""
    new_calls: int
    cached_calls: int
    by_cluster: dict[int, dict[str, int]]
    """Tasks and accepted rows by cluster."""
    rejections: dict[str, int]
    """Attempts that were not accepted, by ``teacher: reason``; and the tasks that nobody was asked."""
    unavailable: dict[str, str]
    in_doubt: tuple[InDoubt, ...]
    stand_ins: tuple[str, ...]
    siblings: int = 0
    """Further problems of the failures' kinds, exactly solved, that are taught besides."""
    rehearsed: int = 0
    """Library functions, which no verifier judges (see ``rehearsal``)."""


def run_cascade(
    failures: Sequence[Task],
    clusters: Mapping[str, int],
    catalogue: Catalogue,
    teachers: Sequence[str],
    journal: Journal,
    engine: Callable[[], Engine] | None,
    verify: Callable[[Task, str], Verdict],
    samples_tier1: int = 1,
    *,
    max_tokens: int,
    concurrency: int = 4,
    cap_usd: float = 0.0,
    on_doubt: OnDoubt = "retry",
    engine_version: str = "",
    progress: Progress = silent,
) -> tuple[list[CascadeRow], CascadeReport]:
    """Answer ``failures`` by ``teachers`` (names ordered by tier); ``clusters`` maps task ids to failure clusters.

    One row for each task whose answer its verifier accepted, in the order of ``failures``. A verdict of "not run" is
    no acceptance.

    Raises:
        CogumiError: teachers unknown or not ordered by tier, a task without a cluster, calls in doubt while
            ``on_doubt`` is "ask", or the budget used up, with what is left to do: a later tier is not asked in the
            place of one that could not be paid. Answers stay in the journal.
    """
    known = [catalogue.get(name) for name in teachers]
    if not known or [t.tier for t in known] != sorted(t.tier for t in known):
        order = ", ".join(f"{t.name} ({t.tier})" for t in known) or "none"
        raise CogumiError(f"the cascade's teachers are not ordered by tier: {order}", "order them 1, 2, 3")
    lost = [task.id for task in failures if task.id not in clusters]
    if lost:
        raise CogumiError(f"{len(lost)} task(s) have no cluster: {', '.join(lost[:5])}", "cluster the failures again")
    settle_doubts(journal, on_doubt)
    asker = Asker(
        catalogue,
        journal,
        engine,
        cap_usd=cap_usd,
        on_doubt=on_doubt,
        concurrency=concurrency,
        engine_version=engine_version,
    )
    cascade = _Cascade(asker, clusters, verify, max_tokens, {task.id: task for task in failures})
    cascade.leave_unjudged()
    for teacher in known:
        cascade.ask(teacher, samples_tier1 if teacher.tier == 1 and teacher.provider != "solver" else 1, progress)
        if left := cascade.unpaid - set(cascade.rows):
            raise asker.over_budget(len(left), f"the cascade's {len(failures):,} failed tasks")
    rows = [cascade.rows[name] for name in cascade.tasks if name in cascade.rows]
    return rows, _report(cascade, known, rows)


@dataclass
class _Cascade:
    """A cascade under way."""

    asker: Asker
    clusters: Mapping[str, int]
    verify: Callable[[Task, str], Verdict]
    max_tokens: int
    tasks: dict[str, Task]
    rows: dict[str, CascadeRow] = field(default_factory=dict)
    paid: Counter[str] = field(default_factory=Counter)
    """Micro-dollars by task, rejected attempts included."""
    tier_paid: Counter[int] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    reached: dict[int, set[str]] = field(default_factory=dict)
    rejections: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    unjudged: Collection[str] = ()
    unpaid: set[str] = field(default_factory=set)
    """Tasks that a teacher was not asked because the budget was used up."""

    def leave_unjudged(self) -> None:
        """Ask nobody what nothing can judge: families of which not even the solver's answer gets a verdict."""
        first = {task.family: task for task in reversed(self.tasks.values()) if task.solution is not None}
        unjudged = {name for name, task in first.items() if self.verify(task, str(task.solution)).passed is None}
        self.unjudged = {name for name, task in self.tasks.items() if task.family in unjudged}
        if self.unjudged:
            self.rejections["nobody asked: cannot be judged"] += len(self.unjudged)

    def ask(self, teacher: Teacher, samples: int, progress: Progress) -> None:
        """Have one teacher try what is still open, as often as ``samples``."""
        for sample in range(samples):
            todo = [task for name, task in self.tasks.items() if not (name in self.rows or name in self.unjudged)]
            if not todo:
                return
            if not self.asker.why_not(teacher.name):
                self.reached.setdefault(teacher.tier, set()).update(task.id for task in todo)
            for task, outcome in zip(todo, self._outcomes(teacher, todo, samples, sample, progress), strict=True):
                self._take(teacher, task, outcome, sample)
            progress(len(self.rows), len(self.tasks), f"{teacher.name}, sample {sample + 1} of {samples}")

    def _outcomes(
        self, teacher: Teacher, todo: list[Task], samples: int, sample: int, progress: Progress
    ) -> list[Outcome]:
        if teacher.provider == "solver":
            return [Outcome(answer, failure="" if answer else "no solution") for answer in map(solve, todo)]
        requests = [Request(chat_messages(teacher, task.prompt), task.id, task.domain) for task in todo]
        # The base failed these tasks greedily, so tier 1 samples even when it may try only once.
        heat = SAMPLE_TEMPERATURE if teacher.tier == 1 else None
        return self.asker.ask_many(
            teacher.name, requests, max_tokens=self.max_tokens, temperature=heat, sample=sample, progress=progress
        )

    def _take(self, teacher: Teacher, task: Task, outcome: Outcome, sample: int) -> None:
        if outcome.answer is None:
            self.rejections[f"{teacher.name}: {outcome.failure}"] += 1
            if outcome.failure in OVER_BUDGET:
                self.unpaid.add(task.id)
            return
        self.cached += outcome.cached
        self.attempts[task.id] += 1
        self.paid[task.id] += outcome.micros
        self.tier_paid[teacher.tier] += outcome.micros
        verdict = judged(task, outcome.answer, self.verify)
        if verdict.passed is not True:
            marked = (
                verdict.reason if verdict.reason in ("empty", "truncated", "refused") else "rejected by the verifier"
            )
            self.rejections[f"{teacher.name}: {'not checked' if verdict.passed is None else marked}"] += 1
            return
        self.rows[task.id] = CascadeRow(
            **response_row(task, teacher, outcome, verdict),
            cluster=self.clusters[task.id],
            sample=sample,
            attempts=self.attempts[task.id],
            usd_total=self.paid[task.id] / MICROS,
        )


def _report(cascade: _Cascade, teachers: Sequence[Teacher], rows: Sequence[CascadeRow]) -> CascadeReport:
    accepted = Counter(row["tier"] for row in rows)
    tiers = []
    for tier, (low, high) in TIER_TARGETS.items():
        answered = {row["teacher"] for row in rows}  # before it went down, it may be
        names = tuple(
            t.name for t in teachers if t.tier == tier and (t.name not in cascade.asker.down or t.name in answered)
        )
        reached = len(cascade.reached.get(tier, ()))
        share = accepted[tier] / len(rows) if rows else None
        usd = cascade.tier_paid[tier] / MICROS
        tiers.append(TierReport(tier, names, reached, accepted[tier], share, low, high, usd))
    missing = tuple(tier.tier for tier in tiers if not tier.teachers)
    stand_ins = tuple(t.name for t in teachers if t.stand_in)
    by_cluster: dict[int, dict[str, int]] = {}
    for name in cascade.tasks:
        counts = by_cluster.setdefault(cascade.clusters[name], {"tasks": 0, "accepted": 0})
        counts["tasks"] += 1
        counts["accepted"] += name in cascade.rows
    return CascadeReport(
        tasks=len(cascade.tasks),
        accepted=len(rows),
        verified_share=len(rows) / len(cascade.tasks) if cascade.tasks else None,
        tiers=tuple(tiers),
        missing_tiers=missing,
        note=_note(missing, stand_ins),
        usd=cascade.asker.new_micros / MICROS,
        usd_per_accepted=sum(cascade.paid.values()) / MICROS / len(rows) if rows else None,
        new_calls=cascade.asker.new_calls,
        cached_calls=cascade.cached,
        by_cluster=dict(sorted(by_cluster.items())),
        rejections=dict(cascade.rejections),
        unavailable={t.name: cascade.asker.down[t.name] for t in teachers if t.name in cascade.asker.down},
        in_doubt=tuple(cascade.asker.journal.in_doubt()),
        stand_ins=stand_ins,
    )


def _note(missing: Sequence[int], stand_ins: Sequence[str]) -> str:
    """What a reader of the tier mix must know."""
    present = " and ".join(str(tier) for tier in TIER_TARGETS if tier not in missing) or "none"
    parts = []
    if missing:
        gone = " and ".join(str(tier) for tier in missing)
        parts.append(f"tiers present: {present}; without tier {gone} the targets of the mix do not apply")
    if stand_ins:
        parts.append(f"stand-ins: {', '.join(stand_ins)}")
    return "; ".join(parts)
