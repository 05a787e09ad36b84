"""How long a run will still take: from what steps took before, this machine's pace, and the step's own progress."""

import pytest

from cogumi_dagster.commands import terminal
from cogumi_dagster.commands.terminal import RunProgress
from cogumi_dagster.defs.pipeline import Node


def test_the_estimate_follows_the_machine_and_the_step_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    lines: list[str] = []
    monkeypatch.setattr(RunProgress, "_line", lambda self, text: lines.append(text))
    nodes = [Node("a", None, "not made yet", 100.0), Node("b", "math", "not made yet", 50.0), Node("c", None, "", 9.0)]
    progress = RunProgress(nodes, "no such profile")
    progress("a", None, 0, 0, "")
    assert progress._left() == terminal.duration(150)
    now = 100.0
    progress("a", None, 1, 4, "a quarter")
    assert lines[-1].endswith(f"a quarter ({terminal.duration(3 * 100 + 50)} left in all)")
    now = 200.0
    progress("a", None, -1, 0, "200.0 s")
    assert progress._left() == terminal.duration(100), "this machine takes twice the time"
    progress("b", "math", 0, 0, "")
    now = 210.0
    progress("b", "math", 1, 2, "half")
    assert progress._left() == terminal.duration(10)
    progress("b", "math", -1, 0, "unchanged")
    assert progress._left() == terminal.duration(0) and "[2/2]" in lines[-1].replace("\\", "")


def test_steps_that_were_never_timed_make_the_estimate_a_lower_bound() -> None:
    nodes = [
        Node("a", None, "not made yet", 100.0),
        Node("b", None, "not made yet", 0.0),
        Node("c", None, "not made yet", 0.0),
    ]
    assert RunProgress(nodes, "no such profile")._left() == f"{terminal.duration(100)} and 2 untimed steps"
    assert RunProgress(nodes[1:2], "no such profile")._left() == "1 untimed step"


def test_the_beginning_of_a_step_says_little_of_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    progress = RunProgress([Node("a", None, "not made yet", 1000.0)], "no such profile")
    progress("a", None, 0, 0, "")
    now = 100.0  # a model was loaded first
    progress("a", None, 1, 500, "")
    assert 990 < _seconds(progress) < 1500, "by its own pace it would be 50,000"
    now = 400.0
    progress("a", None, 100, 500, "")
    assert _seconds(progress) == 1600


def _seconds(progress: RunProgress) -> float:
    minutes, seconds = progress._left().replace(" min", "").replace(" s", "").split()
    return 60 * int(minutes) + int(seconds)
