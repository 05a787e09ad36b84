"""The journal of teacher calls: what was asked, what came back, what it cost.

The promise: a paid answer is never lost once committed, never paid for twice, and the calls whose fate is unknown (the
process died, or the connection broke, between sending and committing) are listed with their worst cost. There are at
most `concurrency` of them. To that end an intent row is durable before a call is sent, with its worst case reserved
against the caps in the same transaction, and the response row is committed before the answer is used.

Shared by threads and processes (see ``journal_file``). Prompts and keys are not stored.
"""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.teaching.catalogue import MICROS, Teacher
from cogumi_dagster.lib.teaching.journal_file import JournalFile
from cogumi_dagster.lib.teaching.providers import Answer, encodable

OnDoubt = Literal["ask", "retry", "skip"]
Status = Literal["started", "replayed", "busy", "over budget", "over the month's budget", "in doubt"]

JOURNAL_FILE = "teacher_calls.sqlite"
"""Its name in a store."""
ANSWER = "text, finish_reason, prompt_tokens, completion_tokens, cached_tokens, micros"
KEYS_A_QUERY = 500
"""Below SQLite's limit on values in a statement (999 in old builds)."""


@dataclass(frozen=True)
class Call:
    """One call to make. ``key`` from ``call_key``; ``worst_micros`` is what it may cost, in micro-dollars."""

    key: str
    teacher: str
    model: str
    domain: str
    task: str
    worst_micros: int


@dataclass(frozen=True)
class Ticket:
    """What the journal says to a call. ``row`` when started; ``answer`` and ``micros`` when replayed."""

    status: Status
    row: int = 0
    answer: Answer | None = None
    micros: int = 0


@dataclass(frozen=True)
class InDoubt:
    """A call that may have been billed and whose answer was never seen."""

    id: int
    teacher: str
    domain: str
    task: str
    at: str
    worst_usd: float


@dataclass(frozen=True)
class Spend:
    """One line of the spend table: a teacher, a domain, a day. ``doubt_usd`` is the worst case of lost calls."""

    teacher: str
    domain: str
    day: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    doubt_usd: float
    seconds: float
    """Mean latency of the answers; 0 where none was measured."""


@dataclass(frozen=True)
class Habit:
    """What a teacher's answers in a domain came to so far: means over ``calls`` answers."""

    calls: int
    prompt_tokens: float
    completion_tokens: float
    cached_share: float
    """Share of the prompt tokens billed at the cached price."""


def call_key(
    teacher: Teacher,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    temperature: float | None,
    sample: int,
    engine_version: str = "",
) -> str:
    """The identity of a call. ``messages`` include the system prompt; ``engine_version`` names local weights."""
    parts = {
        **teacher.wire(),
        "engine": engine_version if teacher.provider == "local" else "",
        "messages": [[message["role"], message["content"]] for message in messages],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "sample": sample,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Journal:
    """A journal file. ``run`` is the scope of a run's cap: processes that share a run share its budget.

    ``month_cap_usd`` caps what all runs of this file spend in a calendar month (UTC); None for no such cap.

    Raises CogumiError when the file is no journal, or of a later version.
    """

    def __init__(self, path: Path, run: str = "", *, month_cap_usd: float | None = None) -> None:
        self.path = path
        self._file = JournalFile(path)
        self.run = run or self._file.owner
        self.month_cap_usd = month_cap_usd

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Intents still open are in doubt from now on."""
        self._file.close()

    def replay(self, keys: Sequence[str]) -> dict[str, Ticket]:
        """The committed answers to calls, by key; a key without one is left out."""
        found: dict[str, Ticket] = {}
        for start in range(0, len(keys), KEYS_A_QUERY):
            some = keys[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(some))
            rows = self._file.read(f"SELECT key, {ANSWER} FROM calls WHERE state = 'done' AND key IN ({marks})", some)
            found |= {row[0]: _replayed(row[1:]) for row in rows}
        return found

    def begin(self, calls: Sequence[Call], *, cap_micros: int, on_doubt: OnDoubt) -> list[Ticket]:
        """Reserve the calls' worst cases and write their intents, all in one durable transaction.

        A call is ``started`` (send it now), ``replayed``, ``busy`` (a live process has sent it), ``over budget``, or
        ``in doubt`` and not to be sent again under this policy. Free calls are never in doubt: repeating them costs
        nothing.
        """
        return self._file.write(lambda db: [self._begin(db, call, cap_micros, on_doubt) for call in calls])

    def _begin(self, db: sqlite3.Connection, call: Call, cap_micros: int, on_doubt: OnDoubt) -> Ticket:
        row = db.execute(f"SELECT {ANSWER} FROM calls WHERE key = ? AND state = 'done'", (call.key,)).fetchone()
        if row is not None:
            return _replayed(row)
        if blocked := self._blocked(db, call, on_doubt):
            return blocked
        if call.worst_micros:
            spent = dict(
                db.execute(
                    "SELECT substr(scope, 1, 1), micros FROM spent"
                    " WHERE scope IN ('run ' || ?, 'month ' || strftime('%Y-%m', 'now'))",
                    (self.run,),
                )
            )
            if spent.get("r", 0) + call.worst_micros > cap_micros:
                return Ticket("over budget")
            if self.month_cap_usd is not None and spent.get("m", 0) + call.worst_micros > self.month_cap_usd * MICROS:
                return Ticket("over the month's budget")
        return Ticket("started", row=self._intend(db, call))

    def _blocked(self, db: sqlite3.Connection, call: Call, on_doubt: OnDoubt) -> Ticket | None:
        rows = db.execute(
            "SELECT id, state, owner FROM calls WHERE key = ? AND state IN ('intent', 'doubt', 'skipped')", (call.key,)
        ).fetchall()
        for row, state, owner in rows:
            if state == "intent" and self._file.lives(str(owner)):
                return Ticket("busy")
            if call.worst_micros and on_doubt != "retry":
                return Ticket("in doubt")
            db.execute("UPDATE calls SET state = 'written off' WHERE id = ?", (row,))
        return None

    def _intend(self, db: sqlite3.Connection, call: Call) -> int:
        shown = (call.key, self._file.owner, self.run, call.teacher, call.model, call.domain, call.task)
        worst = call.worst_micros
        cursor = db.execute(
            "INSERT INTO calls (key, state, owner, run, teacher, model, domain, task, worst_micros, micros)"
            " VALUES (?, 'intent', ?, ?, ?, ?, ?, ?, ?, ?)",
            (*shown, worst, worst),
        )
        return int(cursor.lastrowid or 0)

    def finish(self, answers: Sequence[tuple[int, Answer, int, float]]) -> None:
        """Commit (row, answer, micro-dollars, seconds) of started calls. Only then may the answers be used."""
        rows = [
            (
                micros,
                a.text,
                a.finish_reason,
                a.prompt_tokens,
                a.completion_tokens,
                a.cached_tokens,
                seconds,
                row,
            )
            for row, a, micros, seconds in answers
        ]
        self._file.write(
            lambda db: db.executemany(
                "UPDATE calls SET state = 'done', micros = ?, text = ?, finish_reason = ?, prompt_tokens = ?,"
                " completion_tokens = ?, cached_tokens = ?, seconds = ? WHERE id = ?",
                rows,
            )
        )

    def fail(self, rows: Sequence[int], error: str, *, maybe_billed: bool = False) -> None:
        """Close started calls that gave no answer: free of charge, or in doubt at their worst cost."""
        charge = "state = 'doubt'" if maybe_billed else "state = 'failed', micros = 0"
        values = [(encodable(error), row) for row in rows]
        self._file.write(lambda db: db.executemany(f"UPDATE calls SET {charge}, error = ? WHERE id = ?", values))

    def in_doubt(self) -> list[InDoubt]:
        """Calls left open by a dead process or a broken connection, oldest first. Free calls are left out."""
        rows = self._file.read(
            "SELECT id, teacher, domain, task, at, worst_micros, state, owner FROM calls"
            " WHERE state IN ('intent', 'doubt') AND worst_micros > 0 ORDER BY id"
        )
        return [
            InDoubt(row, teacher, domain, task, at, worst / MICROS)
            for row, teacher, domain, task, at, worst, state, owner in rows
            if state == "doubt" or not self._file.lives(owner)
        ]

    def settle(self, policy: OnDoubt) -> list[InDoubt]:
        """Decide about the calls in doubt; returns them.

        ``retry`` counts them as lost money and lets them be asked again; ``skip`` counts them too and leaves them
        out; ``ask`` changes nothing, for a person to decide.
        """
        doubts = self.in_doubt()
        if policy != "ask" and doubts:
            state = "written off" if policy == "retry" else "skipped"
            values = [(state, doubt.id) for doubt in doubts]
            self._file.write(
                lambda db: db.executemany(
                    "UPDATE calls SET state = ? WHERE id = ? AND state IN ('intent', 'doubt')", values
                )
            )
        return doubts

    def open_elsewhere(self) -> bool:
        """Whether another living journal of this file has a paid call open, whose rest may come back."""
        query = "SELECT DISTINCT owner FROM calls WHERE state = 'intent' AND micros > 0 AND owner != ?"
        return any(self._file.lives(owner) for (owner,) in self._file.read(query, (self._file.owner,)))

    def spent_micros(self) -> int:
        """Micro-dollars counted against this run's cap: answers, and the worst case of what is open or lost."""
        return self._spent("'run ' || ?", (self.run,))

    def month_micros(self) -> int:
        """The same for this calendar month (UTC) and all runs."""
        return self._spent("'month ' || strftime('%Y-%m', 'now')", ())

    def _spent(self, scope: str, values: Sequence[str]) -> int:
        rows = self._file.read(f"SELECT micros FROM spent WHERE scope = {scope}", values)
        return int(rows[0][0]) if rows else 0

    def spend(self) -> list[Spend]:
        """The whole journal's spend by teacher, domain and day (UTC)."""
        rows = self._file.read(
            "SELECT teacher, domain, day, SUM(state = 'done'), COALESCE(SUM(prompt_tokens), 0),"
            " COALESCE(SUM(completion_tokens), 0), SUM(micros * (state = 'done')), SUM(micros * (state != 'done')),"
            " COALESCE(AVG(seconds), 0) FROM calls GROUP BY teacher, domain, day ORDER BY day, teacher, domain"
        )
        return [
            Spend(teacher, domain, day, calls, prompt, completion, micros / MICROS, doubt / MICROS, seconds)
            for teacher, domain, day, calls, prompt, completion, micros, doubt, seconds in rows
        ]

    def habits(self) -> dict[tuple[str, str], Habit]:
        """(teacher, domain) -> the means over the answers so far."""
        rows = self._file.read(
            "SELECT teacher, domain, COUNT(*), AVG(prompt_tokens), AVG(completion_tokens),"
            " 1.0 * SUM(cached_tokens) / MAX(1, SUM(prompt_tokens))"
            " FROM calls WHERE state = 'done' GROUP BY teacher, domain"
        )
        return {(teacher, domain): Habit(*means) for teacher, domain, *means in rows}


def _replayed(row: Sequence[Any]) -> Ticket:
    return Ticket("replayed", answer=Answer(*row[:5]), micros=int(row[5]))
