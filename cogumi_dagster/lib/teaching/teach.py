"""Teaching: a mix of teachers answers a domain's tasks.

Each task belongs to one teacher by share, by the hash of its id, so that a rerun asks the same teacher. What a teacher
cannot answer goes to the next of its tier in the mix, then to the next tier, and the report says so.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import judged
from cogumi_dagster.lib.tasks.base import Task, Verdict
from cogumi_dagster.lib.teaching.asking import OVER_BUDGET, Asker, Outcome, Request
from cogumi_dagster.lib.teaching.available import require_teachers
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import InDoubt, Journal, OnDoubt
from cogumi_dagster.lib.teaching.providers import Answer, solve

MARKED = ("empty", "truncated", "refused")
"""Reasons for which an answer is no example of anything."""
REJECTED = "rejected by the verifier"


class VerdictRow(TypedDict):
    passed: bool | None
    reason: str
    score: float


class ResponseRow(TypedDict):
    """A task and its answer, as written to JSONL. ``usd`` is what the answer cost, whenever it was paid."""

    task: dict[str, Any]
    teacher: str
    tier: int
    response: str
    verdict: VerdictRow
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    usd: float
    stand_in: bool


@dataclass(frozen=True)
class TeachingReport:
    """What teaching a domain's tasks came to. Dollars; counts are of tasks unless said otherwise."""

    domain: str
    tasks: int
    rows: int
    unanswered: int
    """Tasks that no teacher of the mix answered."""
    by_teacher: dict[str, int]
    passed: int
    checked: int
    """Rows with a verdict; the others have no verifier."""
    verified_share: float | None
    """``passed / checked``; None when nothing could be checked."""
    new_calls: int
    """Requests sent, retries included."""
    cached_calls: int
    """Answers that the journal already had."""
    usd: float
    """What the new calls cost, with the worst case of those lost."""
    usd_of_rows: float
    run_usd: float
    """What the whole run has spent so far, other domains, judge and cascade included."""
    cap_usd: float
    failures: dict[str, int]
    """Answers that were not good, by ``teacher: reason``."""
    reassigned: dict[str, int]
    """Tasks passed on, by ``from -> to: reason``."""
    unavailable: dict[str, str]
    in_doubt: tuple[InDoubt, ...]
    stand_ins: tuple[str, ...]


def teach(
    tasks: Sequence[Task],
    domain: str,
    shares: Mapping[str, float],
    catalogue: Catalogue,
    journal: Journal,
    engine: Callable[[], Engine] | None,
    verify: Callable[[Task, str], Verdict],
    *,
    max_tokens: int,
    concurrency: int = 4,
    cap_usd: float = 0.0,
    on_doubt: OnDoubt = "retry",
    engine_version: str = "",
    later: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[list[ResponseRow], TeachingReport]:
    """Have ``tasks`` answered by the teachers of ``shares`` (name to share, summing to 1).

    At most one row a task, in the order of ``tasks``. ``engine`` is called only if the local teacher is asked;
    ``engine_version`` names its weights, so that other weights are asked anew. ``later`` names teachers whom a later
    step will ask (the judge). Answers that are empty, cut off or refused are counted and never become rows; the local
    teacher's answers stay only where the verifier accepts them, or where there is none.

    Raises:
        CogumiError: an unknown teacher, shares that do not sum to 1, calls in doubt while ``on_doubt`` is "ask"; a paid
            teacher with questions to answer (or one of ``later``) that its provider does not offer, before anything is
            spent; the budget used up, with what is left to do. Answers stay in the journal.
    """
    names = _checked_shares(shares, catalogue)
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
    work = _Work(asker, names, domain, verify, max_tokens)
    pending = {task.id: assigned_teacher(task, shares) for task in tasks}
    by_id = {task.id: task for task in tasks}
    if due := work.paid_questions(pending, by_id):
        require_teachers([*due, *(name for name in later if catalogue.get(name).paid)], catalogue, engine)
    while pending:
        pending = work.round(pending, by_id, lambda note: progress(len(work.rows), len(by_id), note))
    rows = [work.rows[name] for name in by_id if name in work.rows]
    if left := work.unpaid - set(work.rows):
        raise asker.over_budget(len(left), f"the domain {domain}'s {len(by_id):,} tasks")
    return rows, _report(work, domain, by_id, rows)


def settle_doubts(journal: Journal, policy: OnDoubt) -> None:
    """Settle the calls that earlier runs left in doubt; under "ask", stop and list them.

    Raises:
        CogumiError: there are some and the policy is "ask".
    """
    doubts = journal.settle(policy)
    if doubts and policy == "ask":
        worst = sum(doubt.worst_usd for doubt in doubts)
        shown = ", ".join(f"#{d.id} {d.teacher} task {d.task} (at most ${d.worst_usd:.6f})" for d in doubts[:8])
        raise CogumiError(
            f"{len(doubts)} call(s) may have been billed without an answer, at most ${worst:.6f} in all: {shown}",
            "set teaching.on_doubt to retry (ask again, maybe pay twice) or skip (never ask those again)",
        )


def chat_messages(teacher: Teacher, prompt: str) -> tuple[Message, ...]:
    """A prompt under the teacher's system prompt."""
    user = Message(role="user", content=prompt)
    return (Message(role="system", content=teacher.system_prompt), user) if teacher.system_prompt else (user,)


@dataclass
class _Work:
    """One domain under way."""

    asker: Asker
    names: list[str]
    domain: str
    verify: Callable[[Task, str], Verdict]
    max_tokens: int
    rows: dict[str, ResponseRow] = field(default_factory=dict)
    tried: dict[str, set[str]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    reassigned: Counter[str] = field(default_factory=Counter)
    unpaid: set[str] = field(default_factory=set)
    """Tasks that were over budget at a teacher."""
    cached: int = 0

    def paid_questions(self, pending: Mapping[str, str], by_id: Mapping[str, Task]) -> list[str]:
        """The paid teachers with tasks that the journal has no answer to."""
        due = []
        for name in self.names:
            teacher = self.asker.catalogue.get(name)
            mine = [by_id[task] for task, whose in pending.items() if whose == name]
            if teacher.paid and (not teacher.priced or self._unanswered(teacher, mine)):
                due.append(name)
        return due

    def _unanswered(self, teacher: Teacher, tasks: Sequence[Task]) -> int:
        requests = self._requests(teacher, tasks)
        return self.asker.unanswered(teacher.name, requests, max_tokens=self.max_tokens)

    def _requests(self, teacher: Teacher, tasks: Sequence[Task]) -> list[Request]:
        return [Request(chat_messages(teacher, task.prompt), task.id, self.domain) for task in tasks]

    def round(
        self, pending: Mapping[str, str], by_id: Mapping[str, Task], progress: Callable[[str], None]
    ) -> dict[str, str]:
        """Ask each pending task's teacher; return the tasks to pass on, with the next teacher.

        One teacher after the other, so that never more than ``concurrency`` calls are open.
        """
        onward: dict[str, str] = {}
        for name in self.names:
            mine = [by_id[task] for task, teacher in pending.items() if teacher == name]
            for task, outcome in zip(mine, self._ask(name, mine, progress), strict=True):
                reason = self._keep(name, task, outcome)
                if reason:
                    if reason in OVER_BUDGET:
                        self.unpaid.add(task.id)
                    self.failures[f"{name}: {reason}"] += 1
                    self._pass_on(name, task, reason, onward)
            progress(name)
        return onward

    def _ask(self, name: str, tasks: list[Task], progress: Callable[[str], None]) -> list[Outcome]:
        teacher = self.asker.catalogue.get(name)
        if teacher.provider == "solver":
            solved = (solve(task) for task in tasks)
            return [Outcome(answer, failure="" if answer else "no solution") for answer in solved]

        def on_call(done: int, total: int, note: str = "") -> None:
            progress(f"{note} {done}/{total}")

        requests = self._requests(teacher, tasks)
        return self.asker.ask_many(name, requests, max_tokens=self.max_tokens, progress=on_call)

    def _keep(self, name: str, task: Task, outcome: Outcome) -> str:
        """Make the row of an answer that is kept; return why the task must be passed on, else nothing."""
        if outcome.answer is None:
            return outcome.failure
        self.cached += outcome.cached
        teacher = self.asker.catalogue.get(name)
        verdict = judged(task, outcome.answer, self.verify)
        if verdict.reason in MARKED:
            return verdict.reason
        if verdict.passed is False and not teacher.paid:
            return REJECTED
        self.rows[task.id] = response_row(task, teacher, outcome, verdict)
        return ""

    def _pass_on(self, name: str, task: Task, reason: str, onward: dict[str, str]) -> None:
        """To the solver if an answer was bad or too dear, else to the next of the same tier, then of the next."""
        tried = self.tried.setdefault(task.id, set())
        tried.add(name)
        at = self.names.index(name)
        others = self.names[at + 1 :] + self.names[:at]
        tier = self.asker.catalogue.get(name).tier
        solver_first = reason in (*MARKED, REJECTED, *OVER_BUDGET)

        def order(other: str) -> tuple[bool, bool, int]:
            teacher = self.asker.catalogue.get(other)
            lower = teacher.tier < tier
            return solver_first and teacher.provider != "solver", lower, abs(teacher.tier - tier)

        following = min((other for other in others if other not in tried), key=order, default=None)
        if following is not None:
            self.reassigned[f"{name} -> {following}: {reason}"] += 1
            onward[task.id] = following


def response_row(task: Task, teacher: Teacher, outcome: Outcome, verdict: Verdict) -> ResponseRow:
    """The row of an answer."""
    answer = outcome.answer or Answer("", "error", 0, 0)
    return ResponseRow(
        task=task.to_json(),
        teacher=teacher.name,
        tier=teacher.tier,
        response=answer.text,
        verdict=VerdictRow(passed=verdict.passed, reason=verdict.reason, score=verdict.score),
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        usd=outcome.micros / MICROS,
        stand_in=teacher.stand_in,
    )


def _checked_shares(shares: Mapping[str, float], catalogue: Catalogue) -> list[str]:
    names = [name for name, share in shares.items() if share > 0]
    for name in names:
        catalogue.get(name)
    total = sum(shares[name] for name in names)
    if abs(total - 1.0) > 0.01:
        raise CogumiError(f"the teachers' shares sum to {total:.3g}, not 1", "mend `teaching.mix` in the profile")
    return names


def assigned_teacher(task: Task, shares: Mapping[str, float]) -> str:
    """The task's teacher: shares laid end to end, the task's hash is a point on them."""
    point = int.from_bytes(hashlib.sha256(f"teacher\n{task.id}".encode()).digest()[:8], "big") / 2**64
    names = [name for name, share in shares.items() if share > 0]
    upto = 0.0
    for name in names:
        upto += shares[name]
        if point < upto:
            return name
    return names[-1]


def _report(work: _Work, domain: str, tasks: Mapping[str, Task], rows: list[ResponseRow]) -> TeachingReport:
    checked = [row for row in rows if row["verdict"]["passed"] is not None]
    passed = sum(row["verdict"]["passed"] is True for row in checked)
    return TeachingReport(
        domain=domain,
        tasks=len(tasks),
        rows=len(rows),
        unanswered=len(tasks) - len(rows),
        by_teacher=dict(Counter(row["teacher"] for row in rows)),
        passed=passed,
        checked=len(checked),
        verified_share=passed / len(checked) if checked else None,
        new_calls=work.asker.new_calls,
        cached_calls=work.cached,
        usd=work.asker.new_micros / MICROS,
        usd_of_rows=sum(row["usd"] for row in rows),
        run_usd=work.asker.journal.spent_micros() / MICROS,
        cap_usd=work.asker.cap_usd,
        failures=dict(work.failures),
        reassigned=dict(work.reassigned),
        unavailable={name: why for name, why in work.asker.down.items() if name in work.names},
        in_doubt=tuple(work.asker.journal.in_doubt()),
        stand_ins=tuple(name for name in work.names if work.asker.catalogue.get(name).stand_in),
    )
