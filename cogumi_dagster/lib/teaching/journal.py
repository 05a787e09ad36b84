"""The journal of teacher calls: what was asked, what came back, what it cost.

The promise: a paid answer is never lost once committed, never paid for twice, and the calls whose fate is unknown (the
process died, or the connection broke, between sending and committing) are listed with their worst cost. There are at
most `concurrency` of them. To that end an intent row is durable before a call is sent, with its worst case reserved
against the cap in the same transaction, and the response row is committed before the answer is used.

SQLite in WAL mode, shared by threads and processes. ``synchronous=FULL``, because WAL with NORMAL may lose the last
commits on power loss (https://www.sqlite.org/pragma.html#pragma_synchronous). Prompts and keys are not stored.
"""

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.teaching.catalogue import MICROS, Teacher
from cogumi_dagster.lib.teaching.providers import Answer

OnDoubt = Literal["ask", "retry", "skip"]
Status = Literal["started", "replayed", "busy", "over budget", "in doubt"]

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,                -- sha256 of all that decides the answer, and the sample's index
    state TEXT NOT NULL CHECK (state IN ('intent', 'done', 'failed', 'doubt', 'written off', 'skipped')),
    owner TEXT NOT NULL,              -- the journal object that sent it; its lock file tells whether it lives
    run TEXT NOT NULL,                -- the scope of the cap
    teacher TEXT NOT NULL, model TEXT NOT NULL, domain TEXT NOT NULL, task TEXT NOT NULL,
    worst_micros INTEGER NOT NULL,
    micros INTEGER NOT NULL,          -- counted against the cap: the worst case until the response is known
    text TEXT, finish_reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER,
    error TEXT,
    day TEXT NOT NULL DEFAULT (date('now')), at TEXT NOT NULL DEFAULT (datetime('now'))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_live_row_a_key ON calls (key) WHERE state IN ('intent', 'done');
CREATE INDEX IF NOT EXISTS calls_by_key ON calls (key);
CREATE INDEX IF NOT EXISTS calls_by_run ON calls (run);
"""


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
    """A journal file. ``run`` is the scope of the cap: processes that share a run share its budget.

    Raises CogumiError when the file is no journal, or of another version.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self.path = path
        self.owner = uuid.uuid4().hex
        self.run = run or self.owner
        self._lock = threading.RLock()
        self._owners = path.with_name(path.name + ".owners")
        self._owners.mkdir(parents=True, exist_ok=True)
        # Held for life: the kernel lets go when the process dies, however it dies. No pid that is reused, no clock.
        self._alive = os.open(self._owners / self.owner, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            self._release()
            raise CogumiError(f"{path} is not a journal of calls: {error}", "move that file away") from None
        except CogumiError:
            self._release()
            raise

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
        # SQLite does not wait when two processes switch a new file to WAL at once, so they take turns here.
        with (self._owners / "opening").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, SCHEMA_VERSION):
                db.close()
                raise CogumiError(f"{self.path} is a journal of version {version}", "use the release that wrote it")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(SCHEMA)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        return db

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Intents still open are in doubt from now on."""
        with self._lock:
            self._db.close()
            self._release()

    def _release(self) -> None:
        (self._owners / self.owner).unlink(missing_ok=True)
        os.close(self._alive)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def replay(self, key: str) -> Ticket | None:
        """The committed answer to a call, if there is one."""
        with self._lock:
            found = self._db.execute(
                "SELECT text, finish_reason, prompt_tokens, completion_tokens, cached_tokens, micros"
                " FROM calls WHERE key = ? AND state = 'done'",
                (key,),
            ).fetchone()
        return None if found is None else Ticket("replayed", answer=Answer(*found[:5]), micros=int(found[5]))

    def begin(self, calls: Sequence[Call], *, cap_micros: int, on_doubt: OnDoubt) -> list[Ticket]:
        """Reserve the calls' worst cases and write their intents, all in one durable transaction.

        A call is ``started`` (send it now), ``replayed``, ``busy`` (a live process has sent it), ``over budget``, or
        ``in doubt`` and not to be sent again under this policy. Free calls are never in doubt: repeating them costs
        nothing.
        """
        with self._transaction() as db:
            spent = int(
                db.execute("SELECT COALESCE(SUM(micros), 0) FROM calls WHERE run = ?", (self.run,)).fetchone()[0]
            )
            tickets = []
            for call in calls:
                ticket = self.replay(call.key) or self._blocked(db, call, on_doubt)
                if ticket is None and call.worst_micros and spent + call.worst_micros > cap_micros:
                    ticket = Ticket("over budget")
                if ticket is None:
                    ticket = Ticket("started", row=self._intend(db, call))
                    spent += call.worst_micros
                tickets.append(ticket)
        return tickets

    def _blocked(self, db: sqlite3.Connection, call: Call, on_doubt: OnDoubt) -> Ticket | None:
        rows = db.execute(
            "SELECT id, state, owner FROM calls WHERE key = ? AND state IN ('intent', 'doubt', 'skipped')", (call.key,)
        ).fetchall()
        for row, state, owner in rows:
            if state == "intent" and self._lives(str(owner)):
                return Ticket("busy")
            if call.worst_micros and on_doubt != "retry":
                return Ticket("in doubt")
            db.execute("UPDATE calls SET state = 'written off' WHERE id = ?", (row,))
        return None

    def _intend(self, db: sqlite3.Connection, call: Call) -> int:
        shown = (call.key, self.owner, self.run, call.teacher, call.model, call.domain, call.task)
        worst = call.worst_micros
        cursor = db.execute(
            "INSERT INTO calls (key, state, owner, run, teacher, model, domain, task, worst_micros, micros)"
            " VALUES (?, 'intent', ?, ?, ?, ?, ?, ?, ?, ?)",
            (*shown, worst, worst),
        )
        return int(cursor.lastrowid or 0)

    def finish(self, answers: Sequence[tuple[int, Answer, int]]) -> None:
        """Commit (row, answer, micro-dollars) of started calls. Only then may the answers be used."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE calls SET state = 'done', micros = ?, text = ?, finish_reason = ?, prompt_tokens = ?,"
                " completion_tokens = ?, cached_tokens = ? WHERE id = ?",
                [
                    (
                        micros,
                        _storable(a.text),
                        a.finish_reason,
                        a.prompt_tokens,
                        a.completion_tokens,
                        a.cached_tokens,
                        row,
                    )
                    for row, a, micros in answers
                ],
            )

    def fail(self, rows: Sequence[int], error: str, *, maybe_billed: bool = False) -> None:
        """Close started calls that gave no answer: free of charge, or in doubt at their worst cost."""
        charge = "state = 'doubt'" if maybe_billed else "state = 'failed', micros = 0"
        with self._transaction() as db:
            db.executemany(
                f"UPDATE calls SET {charge}, error = ? WHERE id = ?", [(_storable(error), row) for row in rows]
            )

    def in_doubt(self) -> list[InDoubt]:
        """Calls left open by a dead process or a broken connection, oldest first. Free calls are left out."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, teacher, domain, task, at, worst_micros, state, owner FROM calls"
                " WHERE state IN ('intent', 'doubt') AND worst_micros > 0 ORDER BY id"
            ).fetchall()
        return [
            InDoubt(row, teacher, domain, task, at, worst / MICROS)
            for row, teacher, domain, task, at, worst, state, owner in rows
            if state == "doubt" or not self._lives(owner)
        ]

    def settle(self, policy: OnDoubt) -> list[InDoubt]:
        """Decide about the calls in doubt; returns them.

        ``retry`` counts them as lost money and lets them be asked again; ``skip`` counts them too and leaves them
        out; ``ask`` changes nothing, for a person to decide.
        """
        doubts = self.in_doubt()
        if policy != "ask":
            state = "written off" if policy == "retry" else "skipped"
            with self._transaction() as db:
                db.executemany(
                    "UPDATE calls SET state = ? WHERE id = ? AND state IN ('intent', 'doubt')",
                    [(state, doubt.id) for doubt in doubts],
                )
        return doubts

    def spent_micros(self) -> int:
        """Micro-dollars counted against this run's cap: answers, and the worst case of what is open or lost."""
        with self._lock:
            query = "SELECT COALESCE(SUM(micros), 0) FROM calls WHERE run = ?"
            return int(self._db.execute(query, (self.run,)).fetchone()[0])

    def spend(self) -> list[Spend]:
        """The whole journal's spend by teacher, domain and day (UTC)."""
        with self._lock:
            rows = self._db.execute(
                "SELECT teacher, domain, day, SUM(state = 'done'), COALESCE(SUM(prompt_tokens), 0),"
                " COALESCE(SUM(completion_tokens), 0), SUM(micros * (state = 'done')), SUM(micros * (state != 'done'))"
                " FROM calls GROUP BY teacher, domain, day ORDER BY day, teacher, domain"
            ).fetchall()
        return [
            Spend(teacher, domain, day, calls, prompt, completion, micros / MICROS, doubt / MICROS)
            for teacher, domain, day, calls, prompt, completion, micros, doubt in rows
        ]

    def _lives(self, owner: str) -> bool:
        """Whether the journal object that wrote a row is still open, in any process of this machine."""
        if owner == self.owner:
            return True
        try:
            probe = os.open(self._owners / owner, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(probe)
        (self._owners / owner).unlink(missing_ok=True)
        return False


def _storable(text: str) -> str:
    """SQLite stores UTF-8 only; a model can write half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")
