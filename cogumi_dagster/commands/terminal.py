"""Progress and tables in the terminal."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from cogumi_dagster.lib.progress import Progress
from cogumi_dagster.lib.report.cells import Table

if TYPE_CHECKING:  # serving imports this module without Dagster
    from cogumi_dagster.defs.pipeline import Node

console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
NOTE_EVERY_SECONDS = 20.0
TRUSTED_SHARE = 0.2
"""From here on a step's own pace alone says how long it takes."""
EXPECTED = Path(__file__).resolve().parent.parent.parent / "resources" / "expected_seconds.json"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def estimate(seconds: float, unknown: int) -> str:
    """A duration, or what is known of it."""
    if not unknown:
        return duration(seconds)
    steps = f"{unknown} untimed step{'s' if unknown > 1 else ''}"
    return f"{duration(seconds)} and {steps}" if seconds else steps


class RunProgress:
    """Listens to the steps of a run: a line for each asset, how far it is, and how long the rest will take.

    The estimate starts from what each artifact took last time (or took the authors), and is scaled by how this machine
    has done so far; the step at work counts by its own progress. Where nothing is known of a step, it is a lower bound.
    """

    def __init__(self, nodes: "Sequence[Node]", profile: str) -> None:
        self.todo = [node for node in nodes if node.reason]
        expected: Mapping[str, Mapping[str, float]] = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
        known = expected.get(profile, {})
        self.expected = {n.label: n.seconds or known.get(n.asset, 0.0) for n in self.todo}
        """Seconds; 0 where nothing is known."""
        self.waiting = dict.fromkeys(node.label for node in self.todo)
        self.started = time.monotonic()
        self.step_started = self.last_note = self.started
        self.label = ""
        self.share = 0.0
        self.spent_expected = self.spent_actual = 0.0
        self.done = 0

    def __call__(self, asset: str, partition: str | None, done: int, total: int, note: str) -> None:
        label = f"{asset}[{partition}]" if partition else asset
        shown = escape(label)
        now = time.monotonic()
        if done < 0:
            self._ended(label, now, note)
        elif total == 0:
            self.label, self.share, self.step_started, self.last_note = label, 0.0, now, now
            self._line(f"{self._place()} {shown} {note and note + ' '}...")
        else:
            self.share = done / total
            if now - self.last_note > NOTE_EVERY_SECONDS:
                self.last_note = now
                self._line(f"{self._place()} {shown}: {done} of {total}, {note} ({self._left()} left in all)")

    def _ended(self, label: str, now: float, note: str) -> None:
        if label in self.waiting:
            del self.waiting[label]
            self.done += 1
        if note != "unchanged" and self.expected.get(label):
            self.spent_expected += self.expected[label]
            self.spent_actual += now - self.step_started
        self._line(f"{self._place(0)} [green]{escape(label)}[/] {note} ({self._left()} left in all)")

    def _place(self, ahead: int = 1) -> str:
        total = len(self.todo)
        return f"[dim]\\[{min(total, self.done + ahead):>{len(str(total))}}/{total}][/]"

    def _left(self) -> str:
        pace = self.spent_actual / self.spent_expected if self.spent_expected > 10 else 1.0
        waiting = [self.expected[label] for label in self.waiting if label != self.label or not self.share]
        rest = pace * sum(waiting)
        if self.label in self.waiting and self.share:
            measured = (time.monotonic() - self.step_started) / self.share
            known = self.expected[self.label] * pace
            trust = min(1.0, self.share / TRUSTED_SHARE) if known else 1.0  # a step's start is no measure of the rest
            rest += (trust * measured + (1 - trust) * known) * (1 - self.share)
        return estimate(rest, waiting.count(0))

    def _line(self, text: str) -> None:
        console.print(text)
        sys.stdout.flush()


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A line on a terminal that says how far a stage is; silent elsewhere."""
    with Console(stderr=True).status(what) as status:

        def update(done: int, total: int, note: str = "") -> None:
            status.update(f"{what}: {note} {done:,}" + (f" of {total:,}" if total else ""))

        yield update


def print_table(table: Table, *, hide: Sequence[str] = ()) -> None:
    """One of the report's tables, in the terminal."""
    colours = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    shown = [i for i, column in enumerate(table.columns) if column not in hide]
    rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index in shown:
        rich.add_column(table.columns[index], overflow="fold", header_style="dim", no_wrap=index < 2)
    for row in table.rows:
        rich.add_row(*(colours.get(row[i], row[i].replace("[", "\\[")) for i in shown))
    console.print()
    console.print(rich)
