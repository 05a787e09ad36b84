"""The benchmark of the journal, short: a misbehaving server, a caller killed twice, a shared cap."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench" / "journal.py"


def test_after_kills_and_faults_nothing_is_lost_and_repeats_are_declared(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    small = {"calls": 300, "concurrency": 16, "latency": 0.05, "faults": 0.15, "kills": 2, "first-wait": 0.05}
    options = [f"--{name}={value}" for name, value in small.items()]
    done = subprocess.run(
        [sys.executable, str(BENCH), *options, "--json", str(out)], capture_output=True, text=True, timeout=300
    )
    figures = json.loads(out.read_text())
    killed, capped = figures["killed"], figures["capped"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert killed["right_answers"] == killed["distinct_answers"] == killed["rows_done"] == 300
    assert killed["lost"] == killed["committed_and_lost"] == killed["repeats_not_declared"] == 0
    assert killed["repeats"] <= killed["declared_in_doubt"]
    assert len(killed["faults"]) >= 6, "the server did misbehave"
    assert len(killed["in_doubt_at_kills"]) == 2 and 1 <= max(killed["in_doubt_at_kills"]) <= 16
    assert killed["all_doubts_have_id_and_worst_cost"]
    assert 0 < capped["spent_usd"] <= capped["most_reserved_usd"] <= capped["cap_usd"] == 0.45
    assert capped["billed_calls"] < capped["wanted_calls"] and "left to do" in capped["stopped_with"]
