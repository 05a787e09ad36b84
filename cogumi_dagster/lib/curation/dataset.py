"""The distillation dataset: every domain's curated rows, deduplicated, decontaminated, mixed, split and written."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.curation.dataset_card import card_plots, dataset_card
from cogumi_dagster.lib.curation.dataset_checks import Verification, record_problem, verify_dataset
from cogumi_dagster.lib.curation.decontamination import ContaminationReport, decontaminate
from cogumi_dagster.lib.curation.mix import Cell, MixRow, choose_counts, mix_table
from cogumi_dagster.lib.dedup.minhash import bands_for
from cogumi_dagster.lib.dedup.texts import DedupReport, dedup
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.jsonl import read_jsonl, write_jsonl
from cogumi_dagster.lib.profile import DOMAINS, DatasetConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks.base import DIFFICULTY_MIX, split_of
from cogumi_dagster.lib.training.batches import Pair

log = logging.getLogger(__name__)

Record = dict[str, Any]
SPLITS = ("train", "validation")
ALL_SPLITS = (*SPLITS, "test")
"""A user's own files have no other evaluation: their test split is written too."""
SUMS_FILE = "SHA256SUMS"
THOROUGH = 0.9999
"""Recall of the search for duplicates, whatever the profile's bands: the dataset promises that none is left."""


@dataclass(frozen=True)
class Example:
    """One record of the dataset, as training code reads it."""

    instruction: str
    response: str
    domain: str
    difficulty: str
    teacher: str
    quality_score: float
    tokens: int
    source: str


@dataclass(frozen=True)
class DatasetReport:
    """What was built, from what, and what a re-reading of the written files found.

    ``rows_in`` = ``test_rows`` + ``held_out_rows`` + ``dedup.removed`` + ``contamination.removed`` + ``left_for_mix``
    + ``rows``. ``checks`` come from the files on disk, not from memory.
    """

    rows: int
    rows_in: int
    test_rows: int
    held_out_rows: int
    left_for_mix: int
    splits: dict[str, int]
    mix: tuple[MixRow, ...]
    difficulty: tuple[MixRow, ...]
    teachers: dict[str, int]
    licences: dict[str, int]
    tokens: int
    mean_quality: float
    dedup: DedupReport
    contamination: ContaminationReport
    checks: Verification
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Row:
    """A record with where it comes from."""

    record: Record
    provenance: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.record["instruction"])

    @property
    def cell(self) -> Cell:
        return self.record["metadata"]["domain"], self.record["metadata"]["difficulty"]


def build_dataset(
    rows_by_domain: Mapping[str, Sequence[Mapping[str, Any]]],
    out: Path,
    config: DatasetConfig,
    benchmark_prompts: Mapping[str, Sequence[str]],
    seed: int,
    held_out_prompts: Iterable[str] = (),
    splits: Sequence[str] = SPLITS,
    balance: bool = True,
    progress: Progress = silent,
) -> DatasetReport:
    """Write {train,validation}.{jsonl,parquet}, provenance.jsonl, README.md and SHA256SUMS into the folder ``out``.

    Args:
        rows_by_domain: curated rows (with ``quality`` and ``tokens``) by domain; the key is the record's domain.
        benchmark_prompts: benchmark name -> prompts that must leave no trace (see ``decontamination``).
        held_out_prompts: prompts of evaluation tasks: a row with exactly such a prompt is left out. Generated
            tasks share their templates with training tasks, so likeness alone says nothing there.
        seed: decides between rows of equal quality and the order of the rows.
        splits: the splits to write; rows of the others are left out (``test``: kept for evaluation).
        balance: leave rows out so that domains and difficulties come near their targets; else keep all.

    Raises:
        CogumiError: an unknown domain, a mix that does not add up to 1, a row that lacks a field, no row left.
    """
    _check(rows_by_domain, config)
    rows, test_rows, held_out_rows = _usable(rows_by_domain, set(map(_words, held_out_prompts)), splits)
    rows_in = sum(map(len, rows_by_domain.values()))
    if not rows:
        raise CogumiError(f"no row left for the dataset: {rows_in} came in, {test_rows} of split test", "curate more")
    mask, dedup_report = _dedup(rows, config, progress)
    rows = [row for row, keep in zip(rows, mask, strict=True) if keep]
    kept, contamination = decontaminate([row.record for row in rows], benchmark_prompts)
    alive = set(map(id, kept))
    rows = [row for row in rows if id(row.record) in alive]
    chosen = _choose(rows, config, seed) if balance else list(rows)
    if not chosen:
        raise CogumiError("decontamination left no row for the dataset", "draw examples from other sources")
    chosen.sort(key=lambda row: _rank(row, seed))

    out.mkdir(parents=True, exist_ok=True)
    files = _write(chosen, out, splits)
    progress(0, 1, "re-reading what was written")
    checks = verify_dataset(
        out, config.dedup, benchmark_prompts, contamination.common_phrases, held_out_prompts, splits
    )
    available = Counter(row.cell for row in rows)
    counts = Counter(row.cell for row in chosen)
    report = DatasetReport(
        rows=len(chosen),
        rows_in=rows_in,
        test_rows=test_rows,
        held_out_rows=held_out_rows,
        left_for_mix=len(rows) - len(chosen),
        splits={split: sum(split_of(row.prompt) == split for row in chosen) for split in splits},
        mix=mix_table(_axis(counts, 0), _axis(available, 0), _shares(config.mix)),
        difficulty=mix_table(_axis(counts, 1), _axis(available, 1), _shares(DIFFICULTY_MIX)),
        teachers=_tally(row.record["metadata"]["teacher"] for row in chosen),
        licences=_tally(row.provenance["licence"] for row in chosen),
        tokens=sum(row.record["metadata"]["tokens"] for row in chosen),
        mean_quality=round(sum(row.record["metadata"]["quality_score"] for row in chosen) / len(chosen), 3),
        dedup=dedup_report,
        contamination=contamination,
        checks=checks,
        sha256={},
    )
    metadata = [row.record["metadata"] for row in chosen]
    (out / "plots").mkdir(exist_ok=True)
    plots = card_plots(report, [m["tokens"] for m in metadata], [m["quality_score"] for m in metadata])
    for name, svg in plots.items():
        (out / "plots" / name).write_text(svg, encoding="utf-8")
    return _seal(out, [*files, *(f"plots/{name}" for name in plots)], report)


def _check(rows_by_domain: Mapping[str, object], config: DatasetConfig) -> None:
    for domain in rows_by_domain:
        if domain not in DOMAINS:
            raise CogumiError(f"unknown domain {domain!r}", nearest(domain, DOMAINS))
    if abs(sum(config.mix.values()) - 1.0) > 1e-6:
        raise CogumiError(f"dataset.mix adds up to {sum(config.mix.values()):g}", "make its shares add up to 1")


def _words(prompt: str) -> str:
    """A prompt as ``split_of`` sees it."""
    return " ".join(prompt.lower().split())


def _usable(
    rows_by_domain: Mapping[str, Sequence[Mapping[str, Any]]], held_out: set[str], splits: Sequence[str]
) -> tuple[list[_Row], int, int]:
    """All rows as records, without those kept for evaluation; and how many of split test, and held out, there were."""
    rows: list[_Row] = []
    test_rows = held_out_rows = 0
    for domain in sorted(rows_by_domain):
        for row in rows_by_domain[domain]:
            usable = _row(row, domain)
            if split_of(usable.prompt) not in splits:
                test_rows += 1
            elif _words(usable.prompt) in held_out:
                held_out_rows += 1
            else:
                rows.append(usable)
    return rows, test_rows, held_out_rows


def _row(row: Mapping[str, Any], domain: str) -> _Row:
    try:
        task = row["task"]
        record: Record = {
            "instruction": task["prompt"].strip(),
            "response": row["response"].strip(),
            "metadata": {
                "domain": domain,
                "difficulty": task["difficulty"],
                "teacher": row["teacher"],
                "quality_score": float(row["quality"]["total"]),
                "tokens": int(row["tokens"]),
                "source": task.get("source", "generated"),
            },
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CogumiError(
            f"a row of {domain} is no curated row: {error!r}", "materialize curated_examples again"
        ) from None
    problem = record_problem(record)
    if problem:
        raise CogumiError(f"a row of {domain} does not fit the schema: {problem}", "materialize curated_examples again")
    text = f"{record['instruction']}\n{record['response']}"
    provenance = {
        "id": hashlib.sha256(text.encode()).hexdigest()[:16],
        "split": split_of(record["instruction"]),
        "domain": domain,
        "source": record["metadata"]["source"],
        "licence": task.get("licence", "unknown"),
        "family": task.get("family", "unknown"),
        "task_id": task.get("id", ""),
        "teacher": record["metadata"]["teacher"],
        "judge": row["quality"].get("judge", "unknown"),
    }
    return _Row(record, provenance)


def _dedup(rows: Sequence[_Row], config: DatasetConfig, progress: Progress) -> tuple[Sequence[bool], DedupReport]:
    bands = bands_for(config.dedup.threshold, config.dedup.permutations, THOROUGH)
    mask, report = dedup(
        [f"{row.prompt}\n{row.record['response']}" for row in rows],
        config.dedup.model_copy(update={"bands": max(bands, config.dedup.bands)}),
        ids=[row.provenance["id"] for row in rows],
        scores=[row.record["metadata"]["quality_score"] for row in rows],
        domains=[row.record["metadata"]["domain"] for row in rows],
        sources=[row.record["metadata"]["source"] for row in rows],
        progress=progress,
    )
    return mask.tolist(), report


def _choose(rows: Sequence[_Row], config: DatasetConfig, seed: int) -> list[_Row]:
    """The best rows of each domain and difficulty, as many as the mix asks for."""
    cells: dict[Cell, list[_Row]] = defaultdict(list)
    for row in rows:
        cells[row.cell].append(row)
    counts = choose_counts(
        {cell: len(group) for cell, group in cells.items()}, _shares(config.mix), _shares(DIFFICULTY_MIX)
    )
    chosen: list[_Row] = []
    for cell, count in counts.items():
        best = sorted(cells[cell], key=lambda row: (-row.record["metadata"]["quality_score"], _rank(row, seed)))
        chosen += best[:count]
    return chosen


def _rank(row: _Row, seed: int) -> str:
    """A place in a shuffle that the seed and the row decide, whatever the order of the input."""
    return hashlib.sha256(f"{seed}:{row.provenance['id']}:{row.cell}".encode()).hexdigest()


def _axis(counts: Mapping[Cell, int], axis: int) -> dict[str, int]:
    result: Counter[str] = Counter()
    for cell, count in counts.items():
        result[cell[axis]] += count
    return dict(result)


def _shares(mix: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): share for name, share in mix.items()}


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _write(rows: Sequence[_Row], out: Path, splits: Sequence[str]) -> list[str]:
    """Write the data files; return their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    metadata = [("domain", text), ("difficulty", text), ("teacher", text)]
    metadata += [("quality_score", pa.float64()), ("tokens", number), ("source", text)]
    schema = pa.schema([("instruction", text), ("response", text), ("metadata", pa.struct(metadata))])
    files: list[str] = []
    for split in splits:
        records = [row.record for row in rows if row.provenance["split"] == split]
        write_jsonl(out / f"{split}.jsonl", records)
        pq.write_table(pa.Table.from_pylist(records, schema=schema), out / f"{split}.parquet")
        files += [f"{split}.jsonl", f"{split}.parquet"]
    write_jsonl(out / "provenance.jsonl", (row.provenance for row in rows))
    return [*files, "provenance.jsonl"]


def _seal(out: Path, files: Sequence[str], report: DatasetReport) -> DatasetReport:
    """Write the card and the checksums; return the report with them."""
    (out / "README.md").write_text(dataset_card(report), encoding="utf-8")
    digests = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sorted([*files, "README.md"])}
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    (out / SUMS_FILE).write_text(lines, encoding="ascii")
    log.info("dataset: %d rows in %s", report.rows, out)
    return replace(report, sha256=digests)


def training_pairs(path: Path) -> list[Pair]:
    """The records of a split as what training code takes."""
    return [Pair(example.instruction, example.response, example.domain) for example in load_examples(path)]


def load_examples(path: Path) -> list[Example]:
    """Read one of the dataset's JSONL files.

    Raises:
        CogumiError: no such file, a broken line, or a record that does not fit the schema, with its number.
    """
    examples: list[Example] = []
    for number, record in enumerate(read_jsonl(path), 1):
        problem = record_problem(record)
        if problem:
            raise CogumiError(f"{path}: record {number}: {problem}", "materialize distillation_dataset again")
        examples.append(Example(record["instruction"], record["response"], **record["metadata"]))
    return examples
