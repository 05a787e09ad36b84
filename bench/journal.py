"""The journal under fire: paid calls to a loopback server that misbehaves, and a caller that is killed.

    python bench/journal.py [--calls 10000] [--concurrency 64] [--faults 0.05] [--kills 3] [--json OUT]

The first part asks so many questions, spoils a share of the replies (429 with and without Retry-After, 500, resets,
truncated and slow bodies, malformed JSON), kills the caller with SIGKILL so many times, runs it again to the end, and
compares the journal with what the server did. The second part lets 32 callers in 4 processes share a cap of $0.45.
Exits with 1 where a promise was broken. Prints a table and, with --json, writes the same figures.
"""

import argparse
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cogumi_dagster_tests" / "lib" / "teaching"))
from wire_server import COMPLETION_TOKENS, PROMPT_TOKENS, WireServer, answer_to, wired

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.tasks.base import Task, Verdict
from cogumi_dagster.lib.teaching import asking
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.teach import teach

KEY = "COGUMI_BENCH_KEY"
OVER_BUDGET_STATUS = 3
CALLERS, PROCESSES, CAP_USD = 32, 4, 0.45


def teacher(url: str, concurrency: int, price: float = 1.0) -> Teacher:
    return Teacher(
        name="wire",
        provider="openai",
        model="m",
        tier=2,
        base_url=f"{url}/v1",
        api_key_env=KEY,
        usd_per_million_input=price,
        usd_per_million_output=price,
        requests_per_minute=100_000_000,
        concurrency=concurrency,
    )


def questions(count: int, first: int = 0) -> list[Task]:
    return [Task("math", "wire", "easy", f"Question {number}?") for number in range(first, first + count)]


def call(given: dict[str, Any]) -> None:
    """The caller's process: asks its questions through ``teach``, as the asset does."""
    logging.disable(logging.WARNING)  # a line for each fault
    asking.FIRST_WAIT_SECONDS = given["first_wait"]
    who = teacher(given["url"], given["concurrency"], given["price"])
    with Journal(Path(given["journal"]), run="bench") as journal:
        try:
            teach(
                questions(given["calls"], given["first"]),
                "math",
                {"wire": 1.0},
                Catalogue(path="bench", teachers={"wire": who}),
                journal,
                None,
                lambda task, response: Verdict(None, "not checked"),
                max_tokens=64,
                concurrency=given["concurrency"],
                cap_usd=given["cap_usd"],
                on_doubt="retry",
            )
        except CogumiError as error:
            print(error.problem, flush=True)
            sys.exit(OVER_BUDGET_STATUS)


def start(url: str, journal: Path, **given: Any) -> subprocess.Popen[str]:
    settings = {
        "url": url,
        "journal": str(journal),
        "first": 0,
        "first_wait": 1.0,
        "price": 1.0,
        "cap_usd": 1e6,
    } | given
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(settings)]
    environment = {**os.environ, KEY: "no-key-at-all", "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def rows_of(journal: Path) -> list[tuple[int, str, str, str | None]]:
    """(id, state, task, text) of every call."""
    db = sqlite3.connect(journal)
    try:
        return db.execute("SELECT id, state, task, text FROM calls").fetchall()
    finally:
        db.close()


def killed_and_rerun(
    calls: int, concurrency: int, latency: float, faults: float, kills: int, first_wait: float, folder: Path
) -> dict[str, Any]:
    server = WireServer(latency)
    server.keep = False
    server.misbehave(faults, retry_after=str(first_wait))
    journal = folder / "journal.sqlite"
    given = {"calls": calls, "concurrency": concurrency, "first_wait": first_wait}
    doubts_at_kills, lost_commits, seconds, starting = [], 0, 0.0, 0.0
    before: dict[int, str | None] = {}
    for number in range(kills + 1):
        started = time.perf_counter()
        arrived = server.arrived
        child = start(server.url, journal, **given)
        while server.arrived == arrived and child.poll() is None:
            time.sleep(0.005)
        starting += time.perf_counter() - started
        if number < kills:
            enough = calls * (number + 1) // (kills + 1)
            while server.work < enough and child.poll() is None:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
        child.communicate()
        seconds += time.perf_counter() - started
        committed = {row: text for row, state, _, text in rows_of(journal) if state == "done"}
        lost_commits += sum(committed.get(row) != text for row, text in before.items())
        before = committed
        with Journal(journal) as opened:
            doubts_at_kills.append([asdict(doubt) for doubt in opened.in_doubt()])
    server.close()
    rows = rows_of(journal)
    prompts = {task.id: task.prompt for task in questions(calls)}
    answers = {task: text for _, state, task, text in rows if state == "done"}
    declared = Counter(task for _, state, task, _ in rows if state in ("doubt", "written off", "skipped"))
    repeats = {task: server.billed[prompt] - 1 for task, prompt in prompts.items() if server.billed[prompt] > 1}
    states = Counter(state for _, state, _, _ in rows)
    ideal = calls * latency / concurrency
    result = {
        "calls": calls,
        "concurrency": concurrency,
        "latency_s": latency,
        "kills": kills,
        "exit_status": child.returncode,
        "answers": len(answers),
        "distinct_answers": len(set(answers.values())),
        "right_answers": sum(answers.get(task) == answer_to(prompt) for task, prompt in prompts.items()),
        "lost": calls - len(answers),
        "committed_and_lost": lost_commits,
        "rows_done": states["done"],
        "faults": dict(sorted(server.faults.items())),
        "billed_by_the_server": sum(server.billed.values()),
        "repeats": sum(repeats.values()),
        "declared_in_doubt": sum(declared.values()),
        "repeats_not_declared": sum(max(0, more - declared[task]) for task, more in repeats.items()),
        "in_doubt_at_kills": [len(doubts) for doubts in doubts_at_kills[:-1]],
        "in_doubt_at_the_end": len(doubts_at_kills[-1]),
        "all_doubts_have_id_and_worst_cost": all(d["id"] and d["worst_usd"] > 0 for ds in doubts_at_kills for d in ds),
        "most_open": server.most_open,
        "seconds": seconds,
        "of_which_starting_python": starting,
        "ideal_seconds": ideal,
        "of_ideal": seconds / ideal if ideal else None,
    }
    result["kept"] = (
        result["exit_status"] == 0
        and result["right_answers"] == result["distinct_answers"] == result["rows_done"] == calls
        and not result["lost"]
        and not lost_commits
        and not result["repeats_not_declared"]
        and max([0, *result["in_doubt_at_kills"]]) <= concurrency
        and result["all_doubts_have_id_and_worst_cost"]
        and server.most_open <= concurrency
    )
    return result


def under_a_cap(latency: float, folder: Path) -> dict[str, Any]:
    """Four processes of eight callers want four times what the cap holds; the server knows what they spent."""
    price = 200.0  # dollars a million tokens, so that a call costs a sixth of a cent
    server = WireServer(latency)
    server.keep = False
    server.default = lambda path, body: wired(path, str(body["messages"][-1]["content"]))
    journal = folder / "cap.sqlite"
    each = PROMPT_TOKENS + COMPLETION_TOKENS
    wanted = round(4 * CAP_USD / (each * price / MICROS) / PROCESSES)
    started = time.perf_counter()
    children = [
        start(
            server.url, journal, calls=wanted, first=number * wanted, concurrency=CALLERS // PROCESSES, price=price,
            cap_usd=CAP_USD,
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    most_reserved = 0
    while any(child.poll() is None for child in children):
        time.sleep(0.02)
        if journal.is_file():
            most_reserved = max(most_reserved, _reserved(journal))
    said = [child.communicate()[0].strip() for child in children]
    seconds = time.perf_counter() - started
    server.close()
    spent = sum(server.billed.values()) * each * price / MICROS
    result = {
        "callers": CALLERS,
        "processes": PROCESSES,
        "cap_usd": CAP_USD,
        "wanted_calls": wanted * PROCESSES,
        "billed_calls": sum(server.billed.values()),
        "spent_usd": spent,
        "most_reserved_usd": most_reserved / MICROS,
        "most_open": server.most_open,
        "stopped_with": said[0],
        "seconds": seconds,
    }
    statuses = {child.returncode for child in children}
    result["kept"] = spent <= CAP_USD and most_reserved <= CAP_USD * MICROS and statuses == {OVER_BUDGET_STATUS}
    return result


def _reserved(journal: Path) -> int:
    db = sqlite3.connect(journal, timeout=60)
    try:
        return int(db.execute("SELECT COALESCE(SUM(micros), 0) FROM calls").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.5, help="the server's, in seconds (default 0.5)")
    parser.add_argument("--faults", type=float, default=0.05, help="share of spoiled replies (default 0.05)")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--first-wait", type=float, default=1.0, help="first backoff and Retry-After, in seconds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        call(json.loads(given.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        killed = killed_and_rerun(
            given.calls, given.concurrency, given.latency, given.faults, given.kills, given.first_wait, Path(folder)
        )
        capped = under_a_cap(min(given.latency, 0.1), Path(folder))
    for title, figures in (("killed and rerun", killed), ("32 callers under one cap", capped)):
        print(f"{title}: every promise {'kept' if figures['kept'] else 'NOT KEPT'}")
        for name, value in figures.items():
            print(f"  {name.replace('_', ' '):34} {f'{value:.4g}' if isinstance(value, float) else value}")
    if given.json:
        given.json.write_text(json.dumps({"killed": killed, "capped": capped}, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if killed["kept"] and capped["kept"] else 1)


if __name__ == "__main__":
    main()
