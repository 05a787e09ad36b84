"""A user's own files to a dataset, with no teacher call: the graph's judge, filters, deduplication and card."""

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.curation.dataset import ALL_SPLITS, SUMS_FILE, DatasetReport, build_dataset
from cogumi_dagster.lib.curation.filters import CountTokens, CurationReport, curate
from cogumi_dagster.lib.curation.judge import QualityReport, score_responses
from cogumi_dagster.lib.curation.records import SourceRecord, Tally, read_records
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.humaneval import benchmark_prompts
from cogumi_dagster.lib.profile import DOMAINS, DatasetConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import FILE_FAMILY
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.teach import ResponseRow, VerdictRow

OTHER_DOMAIN = "conversation"
"""The domain of rows that state none that the dataset knows."""


@dataclass(frozen=True)
class FilesReport:
    """From files to dataset. ``read`` = ``without_response`` + the judge's rows; each later step reports its own."""

    read: dict[str, int]
    """Records by source."""
    broken: dict[str, tuple[int, ...]]
    """Rows that could not be read, by source."""
    without_response: int
    quality: QualityReport
    filters: CurationReport
    dataset: DatasetReport


def curate_files(
    sources: Sequence[str],
    out: Path,
    config: DatasetConfig,
    count_tokens: CountTokens,
    *,
    mapping: str | None = None,
    domain: str | None = None,
    balance: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> FilesReport:
    """Read, score by rules, filter, deduplicate, decontaminate, split and write ``sources`` into the folder ``out``.

    ``mapping`` and ``domain`` as in ``read_records``. The teacher of a record is its source.

    Raises:
        CogumiError: a file that cannot be read; no row with a response; nothing left. An older dataset in ``out`` is
            then as it was.
    """
    tally = Tally()
    read: Counter[str] = Counter()
    rows: list[ResponseRow] = []
    for source in sources:
        for record in read_records(source, mapping, domain, tally=tally):
            read[record.source] += 1
            if record.response:
                rows.append(_row(record))
            if sum(read.values()) % 10_000 == 0:
                progress(sum(read.values()), 0, "rows read")
    if not rows:
        raise CogumiError(
            f"none of {sum(read.values())} rows has a response",
            "curate takes answered rows; have teachers answer first",
        )
    scored, quality = score_responses(rows, progress=progress)
    progress(0, len(scored), "filtering")
    kept, filters = curate(scored, config.filters, config.quality_threshold, count_tokens)
    by_domain: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in kept:
        by_domain[row["task"]["domain"]].append(row)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        aside = Path(folder)
        dataset = build_dataset(
            by_domain, aside, config, benchmark_prompts(), seed, splits=ALL_SPLITS, balance=balance, progress=progress
        )
        _move_into(aside, out)
    return FilesReport(
        read=dict(read),
        broken={name: tuple(lines) for name, lines in tally.broken.items()},
        without_response=sum(read.values()) - len(rows),
        quality=quality,
        filters=filters,
        dataset=dataset,
    )


def _move_into(made: Path, out: Path) -> None:
    """Put the finished files in their place, the checksums last; an older dataset stays whole until then."""
    for path in sorted(made.rglob("*"), key=lambda path: path.name == SUMS_FILE):
        target = out / path.relative_to(made)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _row(record: SourceRecord) -> ResponseRow:
    task = Task(
        domain=record.domain if record.domain in DOMAINS else OTHER_DOMAIN,
        family=FILE_FAMILY,
        difficulty=record.difficulty or "medium",
        prompt=record.instruction,
        source=record.source,
        licence=record.licence,
    )
    return ResponseRow(
        task=task.to_json(),
        teacher=record.source,
        tier=0,
        response=record.response or "",
        verdict=VerdictRow(passed=None, reason="no verifier", score=0.0),
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=0,
        usd=0.0,
        stand_in=False,
    )
