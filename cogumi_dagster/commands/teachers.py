"""``ledger`` and ``plan dataset``: what the teachers cost, and what they will cost."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cogumi_dagster.commands.terminal import console, print_table
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.report.cells import Table, number
from cogumi_dagster.lib.teaching.catalogue import MICROS
from cogumi_dagster.lib.teaching.estimate import PlannedCalls
from cogumi_dagster.lib.teaching.journal import JOURNAL_FILE, Journal, Spend
from cogumi_dagster.lib.training.student import package_version

POLICIES = ("retry", "skip")
SHOWN = 64
"""Calls in doubt in the table; ``--json`` has all."""


def show_ledger(settle: str, as_json: bool) -> None:
    """Spend by teacher, domain and day; the calls in doubt, after settling them where asked."""
    if settle not in ("", *POLICIES):
        raise CogumiError(f"--settle is {settle!r}", nearest(settle, POLICIES))
    with _journal() as journal:
        if journal is None:
            raise CogumiError("no teacher has been asked yet", "materialize teacher_responses first")
        settled = journal.settle("retry" if settle == "retry" else "skip") if settle else []
        rows, doubts, month = journal.spend(), journal.in_doubt(), journal.month_micros() / MICROS
    if as_json:
        data = {
            "spend": [asdict(row) for row in rows],
            "totals": {name: _totals(rows, key) for name, key in KEYS.items()},
            "usd": sum(row.usd for row in rows),
            "doubt_usd": sum(row.doubt_usd for row in rows),
            "month_usd": month,
            "in_doubt": [asdict(doubt) for doubt in doubts],
            "settled": [asdict(doubt) for doubt in settled],
        }
        print(json.dumps(data, indent=1))
        return
    figures = ("answers", "prompt tokens", "completion tokens", "mean s", "usd", "lost, at most")
    print_table(Table("Teachers' calls", "", ("teacher", "domain", "day", *figures), tuple(map(_line, rows))))
    for name, key in KEYS.items():
        shown = tuple(
            (value, number(t["calls"]), f"{t['usd']:.4f}", f"{t['doubt_usd']:.4f}")
            for value, t in _totals(rows, key).items()
        )
        print_table(Table(f"By {name}", "", (name, "answers", "usd", "lost, at most"), shown))
    total, lost = sum(row.usd for row in rows), sum(row.doubt_usd for row in rows)
    console.print(f"\n${total:.4f} in all, and at most ${lost:.4f} lost or open; this month ${month:.4f}.")
    if settled:
        console.print(f"{len(settled)} call(s) in doubt settled: {settle}.")
    if doubts:
        lines = tuple((f"#{d.id}", d.teacher, d.domain, d.task, d.at, f"{d.worst_usd:.6f}") for d in doubts[:SHOWN])
        print_table(Table("In doubt", "", ("id", "teacher", "domain", "task", "sent (UTC)", "usd, at most"), lines))
        worst = sum(doubt.worst_usd for doubt in doubts)
        console.print(
            f"\n{len(doubts)} call(s) may have been billed and their answers never seen, at most ${worst:.6f}.\n"
            "Settle them with --settle retry (ask again, maybe pay twice) or --settle skip (never ask those again)."
        )


KEYS: dict[str, Callable[[Spend], str]] = {
    "teacher": lambda row: row.teacher,
    "domain": lambda row: row.domain,
    "day": lambda row: row.day,
}


def _totals(rows: Sequence[Spend], key: Callable[[Spend], str]) -> dict[str, dict[str, float]]:
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "usd": 0.0, "doubt_usd": 0.0})
    for row in rows:
        total = totals[key(row)]
        total["calls"] += row.calls
        total["usd"] += row.usd
        total["doubt_usd"] += row.doubt_usd
    return dict(sorted(totals.items()))


def _line(row: Spend) -> tuple[str, ...]:
    tokens = (number(row.calls), number(row.prompt_tokens), number(row.completion_tokens))
    return (row.teacher, row.domain, row.day, *tokens, f"{row.seconds:.2f}", f"{row.usd:.4f}", f"{row.doubt_usd:.4f}")


def show_dataset_plan(as_json: bool) -> None:
    """Calls, tokens and dollars by domain and teacher; and what modifiers and strategies may cost on top."""
    from cogumi_dagster.lib.planning.teachers import plan_modifiers_and_strategies
    from cogumi_dagster.lib.teaching.estimate import LONGEST, plan_dataset, sum_known
    from resources import build_resources

    resources = build_resources()
    settings = resources["settings"]
    with _journal() as journal:
        catalogue = resources["teachers"].catalogue
        plan = plan_dataset(settings.profile, settings.sources, catalogue, journal, engine_version=package_version())
        later = plan_modifiers_and_strategies(settings.profile, catalogue, journal)
    if as_json:
        print(json.dumps({**plan.to_json(), "modifiers_and_strategies": list(map(asdict, later))}, indent=1))
        return
    figures = ("calls", "prompt tokens", "completion tokens", "usd", "usd, at most", "minutes", "answers' length")
    lines = tuple((r.domain, r.teacher, r.step, number(r.tasks), number(r.known), *_figures(r)) for r in plan.rows)
    columns = ("domain", "teacher", "step", "tasks", "known", *figures)
    print_table(Table("The dataset's teachers, before anything is sent", "", columns, lines))
    console.print(
        f"\n{plan.calls:,} calls for {plan.tasks:,} tasks (estimated from {plan.sampled:,}): "
        f"{_cost(plan.usd, plan.worst_usd)}."
    )
    if later:
        lines = tuple((r.domain, r.teacher, r.step, *_figures(r)) for r in later)
        title = "Modifiers and strategies: the most that their teachers are asked"
        print_table(Table(title, "", ("for", "teacher", "step", *figures), lines))
        about, worst = sum_known([row.usd for row in later]), sum_known([row.worst_usd for row in later])
        console.print(
            f"\n{sum(row.calls for row in later):,} calls if the base fails every task, every cheaper teacher is "
            f"rejected and every batch attempted: {_cost(about, worst)}. What is answered already is not taken off."
        )
    if any(row.basis == LONGEST for row in (*plan.rows, *later)):
        console.print("Where a teacher has no history, its answers (and its thinking) count as long as they may be.")
    month = plan.max_usd_per_month
    console.print(
        f"Caps: ${plan.max_usd_per_run:.2f} a run"
        + (f", ${month:.2f} a month, of which ${plan.month_usd:.4f} are spent." if month is not None else ".")
    )
    if plan.usd is not None and plan.usd > plan.max_usd_per_run:
        console.print("[yellow]One run's cap does not hold that:[/] it will stop there and say what is left to do.")


def _figures(row: PlannedCalls) -> tuple[str, ...]:
    tokens = (number(row.prompt_tokens), number(row.completion_tokens))
    return (number(row.calls), *tokens, _usd(row.usd), _usd(row.worst_usd), f"{row.minutes:.0f}", row.basis)


def _usd(value: float | None) -> str:
    return "price unknown" if value is None else f"${value:.4f}" if value < 100 else f"${value:,.2f}"


def _cost(about: float | None, worst: float | None) -> str:
    """Both are None where a teacher has no price."""
    return "price unknown" if about is None else f"about {_usd(about)}, at most {_usd(worst)}"


@contextmanager
def _journal() -> Iterator[Journal | None]:
    """The journal of the profile's store, or None where no teacher has been asked."""
    from resources import build_resources

    path: Path = build_resources()["store"].open().root / JOURNAL_FILE
    if not path.is_file():
        yield None
        return
    with Journal(path) as journal:
        yield journal
