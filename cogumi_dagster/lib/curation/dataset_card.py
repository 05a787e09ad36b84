"""The dataset's card: what it holds, where it comes from, what was taken out and what was checked."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cogumi_dagster.lib.evaluation.plots import Bar, bar_plot

if TYPE_CHECKING:
    from cogumi_dagster.lib.curation.dataset import DatasetReport
    from cogumi_dagster.lib.curation.mix import MixRow

FRONT_MATTER = """---
configs:
- config_name: default
  data_files:
%s
---
"""


TOKEN_STEPS = (32, 64, 128, 256, 512, 1024, 2048)


def card_plots(report: "DatasetReport", tokens: Sequence[int], scores: Sequence[float]) -> Mapping[str, str]:
    """The card's plots as SVG, by file name."""
    mix = [Bar(row.name, 100 * row.actual) for row in (*report.mix, *report.difficulty)]
    steps = Counter(next((step for step in TOKEN_STEPS if count <= step), TOKEN_STEPS[-1] + 1) for count in tokens)
    lengths = [Bar(f"up to {step:,}", steps[step]) for step in TOKEN_STEPS if steps[step]]
    if steps[TOKEN_STEPS[-1] + 1]:
        lengths.append(Bar(f"over {TOKEN_STEPS[-1]:,}", steps[TOKEN_STEPS[-1] + 1]))
    totals = Counter(int(score) for score in scores)
    quality = [Bar(str(score), totals[score]) for score in sorted(totals)]
    lost = [Bar(f"near-duplicate, {name}", count) for name, count in report.dedup.categories.items()]
    lost += [Bar(f"contaminated, {name}", count) for name, count in report.contamination.by_benchmark.items()]
    lost += [Bar("over the mix", report.left_for_mix), Bar("kept", report.rows)]
    return {
        "mix.svg": bar_plot(mix, "Domains and difficulties", "per cent of the rows"),
        "tokens.svg": bar_plot(lengths, "Length", "rows, by tokens of instruction and response"),
        "quality.svg": bar_plot(quality, "Quality", "rows, by score of 10, rounded down"),
        "rows.svg": bar_plot(lost, "What came in", "rows"),
    }


def dataset_card(report: "DatasetReport") -> str:
    """The card as Markdown. It holds no time of day, so that the same rows give the same bytes."""
    checks, duplicates, leaks = report.checks, report.dedup, report.contamination
    parts = [
        FRONT_MATTER % "\n".join(f"  - {{split: {split}, path: {split}.parquet}}" for split in report.splits),
        "# Distillation dataset\n",
        f"{report.rows:,} instructions with a teacher's answer, {report.tokens:,} tokens, mean quality "
        f"{report.mean_quality:.2f} of 10. A record is `instruction`, `response` and `metadata` (`domain`, "
        "`difficulty`, `teacher`, `quality_score`, `tokens`, `source`); `provenance.jsonl` names each one's "
        "task, family and licence.\n",
        "![Domains and difficulties](plots/mix.svg) ![Length](plots/tokens.svg)\n",
        "![Quality](plots/quality.svg) ![What came in](plots/rows.svg)\n",
        "## Splits\n",
        _table(("split", "rows"), report.splits.items()),
        "By the hash of the prompt, so that no prompt is in two.\n",
        "## Domains\n",
        _mix(report.mix),
        "## Difficulty\n",
        _mix(report.difficulty),
        "## Teachers\n",
        _table(("teacher", "rows"), report.teachers.items()),
        "## Licences of the sources\n",
        _table(("licence", "rows"), report.licences.items()),
        "## What was left out\n",
        _table(
            ("step", "rows"),
            [
                ("came in", report.rows_in),
                ("of a split kept for evaluation", report.test_rows),
                ("held out for evaluation", report.held_out_rows),
                *((f"near-duplicate, {name}", count) for name, count in duplicates.categories.items()),
                *((f"contaminated, {name}", count) for name, count in leaks.by_benchmark.items()),
                ("over the mix", report.left_for_mix),
                ("**kept**", report.rows),
            ],
        ),
        f"Near-duplicates are at Jaccard {duplicates.threshold:g} or more on character n-grams, verified exactly; each "
        "has a kept representative.\n",
        "## Checks on the written files\n",
        _table(
            ("check", "found"),
            [
                ("records that fit the schema", f"{checks.schema_valid:.2%} of {checks.records}"),
                (f"near-duplicate pairs left (datasketch, {checks.rechecked:,} records)", checks.near_duplicates_left),
                ("contaminated records", checks.contaminated),
                ("prompts in two splits or the wrong one", checks.split_overlap),
                ("prompts held out for evaluation", checks.held_out),
            ],
        ),
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def _mix(rows: Iterable["MixRow"]) -> str:
    body = [
        (row.name, f"{row.target:.0%}", f"{row.actual:.1%}", f"{100 * row.deviation:+.1f}", row.rows, row.available)
        for row in rows
    ]
    return _table(("name", "target", "actual", "points off", "rows", "available"), body)
