"""The journal's file: SQLite in WAL mode, migrated in place, locked by its owners, written in groups.

``synchronous=FULL``, because WAL with NORMAL may lose the last commits on power loss
(https://www.sqlite.org/pragma.html#pragma_synchronous). A commit then waits for the disk, and a call needs two of
them, so threads that wait at the same time share one transaction.
"""

import fcntl
import os
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cogumi_dagster.lib.errors import CogumiError

T = TypeVar("T")

WAIT_SECONDS = 60.0
"""How long to wait for another process that is writing."""

MIGRATIONS: Sequence[Sequence[str]] = (
    (
        """
CREATE TABLE calls (
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
)""",
        "CREATE UNIQUE INDEX one_live_row_a_key ON calls (key) WHERE state IN ('intent', 'done')",
        "CREATE INDEX calls_by_key ON calls (key)",
        "CREATE INDEX calls_by_run ON calls (run)",
    ),
    (
        "ALTER TABLE calls ADD COLUMN seconds REAL",  # from sending to the answer
        # A sum over all calls for each new one would be quadratic, so the totals are kept beside them.
        "CREATE TABLE spent (scope TEXT PRIMARY KEY, micros INTEGER NOT NULL) WITHOUT ROWID",
        "INSERT INTO spent SELECT 'run ' || run, SUM(micros) FROM calls GROUP BY run",
        "INSERT INTO spent SELECT 'month ' || substr(day, 1, 7), SUM(micros) FROM calls GROUP BY substr(day, 1, 7)",
        """
CREATE TRIGGER spent_by_a_new_call AFTER INSERT ON calls BEGIN
    INSERT INTO spent VALUES ('run ' || NEW.run, NEW.micros)
        ON CONFLICT (scope) DO UPDATE SET micros = micros + excluded.micros;
    INSERT INTO spent VALUES ('month ' || substr(NEW.day, 1, 7), NEW.micros)
        ON CONFLICT (scope) DO UPDATE SET micros = micros + excluded.micros;
END""",
        """
CREATE TRIGGER spent_by_a_changed_call AFTER UPDATE OF micros ON calls BEGIN
    UPDATE spent SET micros = micros + NEW.micros - OLD.micros
        WHERE scope IN ('run ' || NEW.run, 'month ' || substr(NEW.day, 1, 7));
END""",
        "DROP INDEX calls_by_run",
        "CREATE INDEX calls_open ON calls (state) WHERE state IN ('intent', 'doubt')",
    ),
)
"""What leads from each version of the file to the next; a new file takes all steps."""
SCHEMA_VERSION = len(MIGRATIONS)


@dataclass(eq=False)
class _Pending:
    work: Callable[[sqlite3.Connection], Any]
    done: bool = False
    value: Any = None
    error: BaseException | None = None


class JournalFile:
    """One opened file. ``owner`` names this opening; ``lives`` tells whether another one is still open.

    Raises CogumiError when the file is no journal, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = uuid.uuid4().hex
        self._owners = path.with_name(path.name + ".owners")
        self._owners.mkdir(parents=True, exist_ok=True)
        # Held for life: the kernel lets go when the process dies, however it dies. No pid that is reused, no clock.
        self._alive = os.open(self._owners / self.owner, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._waiting: deque[_Pending] = deque()
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            self._writer = self._open()
            self._reader = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:
            self._release()
            raise CogumiError(f"{path} is not a journal of calls: {error}", "move that file away") from None
        except CogumiError:
            self._release()
            raise

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        # SQLite does not wait when two processes switch a new file to WAL at once, so they take turns here.
        with (self._owners / "opening").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA_VERSION:
                db.close()
                raise CogumiError(f"{self.path} is a journal of version {version}", "use the release that wrote it")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if version < SCHEMA_VERSION:
                _migrate(db, version)
        return db

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in a transaction and return its value once it is on the disk.

        What several threads ask for while the disk is busy is committed together; what raises is undone alone.

        Raises:
            CogumiError: the disk is full or broken; nothing of the group was written.
        """
        mine = _Pending(work)
        self._waiting.append(mine)
        with self._writing:
            if not mine.done:
                self._commit_waiting()
        if mine.error is not None:
            raise mine.error
        return mine.value  # type: ignore[no-any-return]

    def _commit_waiting(self) -> None:
        group = [self._waiting.popleft() for _ in range(len(self._waiting))]
        db = self._writer
        try:
            db.execute("BEGIN IMMEDIATE")
            for pending in group:
                db.execute("SAVEPOINT one")
                try:
                    pending.value = pending.work(db)
                except sqlite3.OperationalError:  # SQLite may have undone the whole transaction
                    raise
                except Exception as error:
                    pending.error = error
                    db.execute("ROLLBACK TO one")
                db.execute("RELEASE one")
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            failure: BaseException = error
            if isinstance(error, sqlite3.Error):
                mend = "free some space or mend the disk, and run again: nothing committed is lost"
                failure = CogumiError(f"the journal {self.path} cannot be written: {error}", mend)
            for pending in group:
                pending.error = failure
        finally:
            for pending in group:
                pending.done = True

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Rows of what is committed. Waits for no writer."""
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    def lives(self, owner: str) -> bool:
        """Whether the opening that wrote a row is still open, in any process of this machine."""
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

    def close(self) -> None:
        """Close the file. Calls still open are in doubt from now on."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()
            self._release()

    def _release(self) -> None:
        (self._owners / self.owner).unlink(missing_ok=True)
        os.close(self._alive)


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """One transaction: a kill in between leaves the file as it was."""
    db.execute("BEGIN EXCLUSIVE")
    for step in MIGRATIONS[version:]:
        for statement in step:
            db.execute(statement)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")
