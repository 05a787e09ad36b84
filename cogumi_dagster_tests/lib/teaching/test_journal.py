import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.teaching.catalogue import Teacher
from cogumi_dagster.lib.teaching.journal import Call, Journal, OnDoubt, Ticket, call_key
from cogumi_dagster.lib.teaching.providers import Answer

ANSWER = Answer("four", "stop", 20, 10)
CENT = 10_000


def call(key: str = "k", worst: int = CENT) -> Call:
    return Call(key, "t", "m", "math", f"task-{key}", worst)


def begin(journal: Journal, *calls: Call, cap: int = 100 * CENT, on_doubt: OnDoubt = "retry") -> list[Ticket]:
    return journal.begin(calls, cap_micros=cap, on_doubt=on_doubt)


def killed_with_an_open_intent(path: Path) -> None:
    """Another process writes an intent and dies by SIGKILL before any answer."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cogumi_dagster.lib.teaching.journal import Call, Journal\n"
        "journal = Journal(Path(sys.argv[1]), run='dead')\n"
        f"journal.begin([Call('k', 't', 'm', 'math', 'task-k', {CENT})], cap_micros=10**9, on_doubt='retry')\n"
        "print('sent', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"sent\n"
    with Journal(path) as alive:
        assert alive.in_doubt() == [], "a call of a living process is not in doubt"
        assert begin(alive, call())[0].status == "busy"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_an_answer_is_replayed_and_never_asked_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        ticket = begin(journal, call())[0]
        journal.finish([(ticket.row, ANSWER, 77, 0.5)])
    with Journal(tmp_path / "j.db") as again:
        assert begin(again, call())[0] == Ticket("replayed", answer=ANSWER, micros=77)
        assert again.spent_micros() == 0, "a replay costs this run nothing"


def test_the_intent_is_on_disk_before_the_call(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        begin(journal, call())
        with sqlite3.connect(tmp_path / "j.db") as other:
            assert other.execute("SELECT state, micros FROM calls").fetchall() == [("intent", CENT)]
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        other.close()
        assert journal._file._writer.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_kill_9_between_intent_and_response_leaves_one_call_in_doubt(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    killed_with_an_open_intent(path)
    with Journal(path) as journal:
        (doubt,) = journal.in_doubt()
        assert (doubt.teacher, doubt.task, doubt.worst_usd) == ("t", "task-k", 0.01)
        assert begin(journal, call(), on_doubt="ask")[0].status == "in doubt"
        assert journal.settle("ask") == [doubt]
        assert journal.in_doubt() == [doubt], "ask changes nothing"


def test_retry_pays_again_and_keeps_the_lost_money_in_the_books(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    killed_with_an_open_intent(path)
    with Journal(path) as journal:
        assert len(journal.settle("retry")) == 1
        assert journal.in_doubt() == []
        ticket = begin(journal, call())[0]
        assert ticket.status == "started"
        journal.finish([(ticket.row, ANSWER, 100, 0.5)])
        (line,) = journal.spend()
        assert (line.calls, line.usd, line.doubt_usd) == (1, 0.0001, 0.01)


def test_skip_never_asks_again(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    killed_with_an_open_intent(path)
    with Journal(path) as journal:
        journal.settle("skip")
        assert journal.in_doubt() == []
        assert begin(journal, call(), on_doubt="skip")[0].status == "in doubt"


def test_free_calls_are_repeated_without_asking(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        begin(journal, call(worst=0))
    with Journal(tmp_path / "j.db") as journal:
        assert journal.in_doubt() == []
        assert begin(journal, call(worst=0), cap=0, on_doubt="ask")[0].status == "started"


def test_a_failed_call_is_free_unless_it_may_have_been_billed(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        refused, lost = begin(journal, call("a"), call("b"))
        journal.fail([refused.row], "400")
        journal.fail([lost.row], "timeout", maybe_billed=True)
        assert journal.spent_micros() == CENT
        assert [doubt.task for doubt in journal.in_doubt()] == ["task-b"]


def test_eight_threads_never_exceed_the_cap(tmp_path: Path) -> None:
    """96 calls want a cent each, 45 fit. Each thread has its own journal, so only the database holds the cap."""
    cap, started = 45 * CENT, []
    go = threading.Barrier(8)

    def worker(number: int) -> None:
        with Journal(tmp_path / "j.db", run="r") as journal:
            go.wait()
            for i in range(12):
                ticket = begin(journal, call(f"{number}-{i}"), cap=cap)[0]
                if ticket.status == "started":
                    started.append(ticket.row)
                    if i % 2:  # half come back at half the price, and make room for others
                        journal.finish([(ticket.row, ANSWER, CENT // 2, 0.5)])
                assert journal.spent_micros() <= cap

    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            worker(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(started)) == len(started) >= 45


def test_the_cap_is_shared_by_journals_of_one_run_and_not_by_others(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with Journal(path, run="r") as one, Journal(path, run="r") as two, Journal(path, run="s") as other:
        assert begin(one, call("a"), cap=CENT)[0].status == "started"
        assert begin(two, call("b"), cap=CENT)[0].status == "over budget"
        assert begin(other, call("c"), cap=CENT)[0].status == "started"


def test_the_month_is_shared_by_all_runs_and_forgets_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with Journal(path, run="last") as last:
        begin(last, call("old"))
        with sqlite3.connect(path) as db:  # as if it had been asked last month
            db.execute("UPDATE spent SET scope = 'month 2020-01' WHERE scope LIKE 'month%'")
        db.close()
    with Journal(path, run="r", month_cap_usd=0.02) as one, Journal(path, run="s", month_cap_usd=0.02) as two:
        assert begin(one, call("a"))[0].status == "started"
        ticket = begin(two, call("b"))[0]
        assert ticket.status == "started"
        assert begin(two, call("c"))[0].status == "over the month's budget"
        assert begin(two, call("free", worst=0))[0].status == "started"
        two.finish([(ticket.row, ANSWER, 0, 0.5)])
        assert begin(two, call("c"))[0].status == "started", "what an answer left over makes room"
        assert one.month_micros() == 2 * CENT and two.spent_micros() == CENT


OLD_SCHEMA = """
CREATE TABLE calls (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, state TEXT NOT NULL, owner TEXT NOT NULL,
    run TEXT NOT NULL, teacher TEXT NOT NULL, model TEXT NOT NULL, domain TEXT NOT NULL, task TEXT NOT NULL,
    worst_micros INTEGER NOT NULL, micros INTEGER NOT NULL,
    text TEXT, finish_reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER, error TEXT,
    day TEXT NOT NULL DEFAULT (date('now')), at TEXT NOT NULL DEFAULT (datetime('now'))
);
CREATE UNIQUE INDEX one_live_row_a_key ON calls (key) WHERE state IN ('intent', 'done');
CREATE INDEX calls_by_key ON calls (key);
CREATE INDEX calls_by_run ON calls (run);
INSERT INTO calls (key, state, owner, run, teacher, model, domain, task, worst_micros, micros, text, finish_reason,
                   prompt_tokens, completion_tokens, cached_tokens)
VALUES ('k', 'done', 'o', 'r', 't', 'm', 'math', 'task-k', 10000, 300, 'four', 'stop', 20, 10, 0),
       ('l', 'intent', 'o', 'r', 't', 'm', 'math', 'task-l', 10000, 10000, NULL, NULL, NULL, NULL, NULL);
PRAGMA user_version=1;
"""


def test_a_journal_of_the_first_version_is_carried_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    db = sqlite3.connect(path)
    db.executescript(OLD_SCHEMA)
    db.close()
    for _ in range(2):
        with Journal(path, run="r") as journal:
            assert begin(journal, call())[0] == Ticket("replayed", answer=ANSWER, micros=300)
            assert journal.spent_micros() == journal.month_micros() == 10_300
            assert [doubt.task for doubt in journal.in_doubt()] == ["task-l"]


def test_a_journal_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal._file._writer.execute("PRAGMA user_version=99")
    with pytest.raises(CogumiError, match="version 99"):
        Journal(tmp_path / "j.db")


def test_threads_share_commits_and_a_failure_undoes_its_own_work_only(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        file, commits, results = journal._file, [], {}
        file._writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
        file._writing.acquire()  # the disk is busy

        def worker(number: int) -> None:
            try:
                calls = [call(f"{number}-0"), call(f"{number}-1") if number else call("7-0")]
                results[number] = begin(journal, *calls) if number else file.write(breaks)
            except ValueError as error:
                results[number] = error

        def breaks(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM calls")
            raise ValueError("mine")

        threads = [threading.Thread(target=worker, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        while len(file._waiting) < 8:
            pass
        file._writing.release()
        for thread in threads:
            thread.join()
        assert len(commits) == 1 and isinstance(results[0], ValueError)
        assert sorted(n for n, tickets in results.items() if n and tickets[0].status == "started") == list(range(1, 8))
        assert len(journal._file.read("SELECT id FROM calls")) == 14


def test_a_full_disk_is_one_sentence_and_nothing_is_used(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        ticket = begin(journal, call())[0]
        pages = journal._file._writer.execute("PRAGMA page_count").fetchone()[0]
        journal._file._writer.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(CogumiError, match=r"cannot be written.*full"):
            journal.finish([(ticket.row, Answer("x" * 100_000, "stop", 1, 1), 1, 0.5)])
        assert journal.replay(["k"]) == {}
        journal._file._writer.execute("PRAGMA max_page_count=100000")
        journal.finish([(ticket.row, ANSWER, 1, 0.5)])
        assert journal.replay(["k"])["k"].answer == ANSWER


def test_latency_and_finish_reason_are_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        for key, finish, seconds in (("a", "stop", 1.0), ("b", "length", 2.0)):
            ticket = begin(journal, call(key))[0]
            journal.finish([(ticket.row, Answer("four", finish, 20, 10, 5), 1, seconds)])
        rows = journal._file.read("SELECT finish_reason, seconds FROM calls ORDER BY id")
        assert rows == [("stop", 1.0), ("length", 2.0)]
        assert journal.spend()[0].seconds == 1.5
        habit = journal.habits()["t", "math"]
        assert (habit.calls, habit.prompt_tokens, habit.completion_tokens, habit.cached_share) == (2, 20, 10, 0.25)


def test_one_transaction_reserves_for_all_its_calls(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        statuses = [t.status for t in begin(journal, *(call(str(i)) for i in range(5)), cap=3 * CENT)]
        assert statuses == ["started"] * 3 + ["over budget"] * 2


def test_lone_surrogates_are_stored(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        ticket = begin(journal, call())[0]
        answer = Answer("bad \ud800 half", "stop", 1, 1)
        journal.finish([(ticket.row, answer, 1, 0.5)])
        replayed = journal.replay(["k"])["k"].answer
        assert replayed is not None and replayed.text == answer.text == "bad ? half"


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.db").write_bytes(b"not a database, but long enough to be read as one" * 50)
    with pytest.raises(CogumiError, match="not a journal"):
        Journal(tmp_path / "j.db")


def test_the_key_covers_everything_that_decides_the_answer() -> None:
    teacher = Teacher(name="t", provider="local", model="m", tier=1)
    messages = [Message(role="user", content="2+2?")]

    def key(teacher: Teacher = teacher, messages: list[Message] = messages, **changes: object) -> str:
        how = {"max_tokens": 9, "temperature": 0.5, "sample": 0, "engine_version": "g"} | changes
        return call_key(teacher, messages, **how)  # type: ignore[arg-type]

    keys = {
        key(), key(sample=1), key(temperature=0.6), key(max_tokens=10), key(engine_version="h"),
        key(messages=[Message(role="system", content="s"), *messages]),
        key(teacher.model_copy(update={"model": "n"})),
    }  # fmt: skip
    assert len(keys) == 7
    assert key(teacher.model_copy(update={"name": "u", "usd_per_million_input": 1.0})) == key()
