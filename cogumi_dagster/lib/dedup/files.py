"""Near-duplicates of JSON Lines files, plain, ``.gz`` or ``.zst``: read twice, never held as rows.

The first pass keeps each row's normalised text and signature; the second copies the lines that stay, byte for byte.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from xxhash import xxh3_64_intdigest

from cogumi_dagster.lib.dedup.corpus import cores, read_corpus
from cogumi_dagster.lib.dedup.minhash import checked, normalise
from cogumi_dagster.lib.dedup.representatives import Representatives, represent
from cogumi_dagster.lib.dedup.texts import (
    EXCERPT,
    DedupReport,
    dedup_report,
    example_pairs,
    id_hashes,
    visiting_order,
)  # fmt: skip
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.packed import open_packed
from cogumi_dagster.lib.profile import DedupConfig
from cogumi_dagster.lib.progress import Progress, silent

BLOCK_BYTES = 8 << 20
SHOWN_LINES = 10
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: JSON can spell it, UTF-8 cannot."""
TEXT_FIELDS = (
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
"""Field pairs that ``text_of_row`` knows, in the order tried; then the single fields below."""
SINGLE_FIELDS = ("text", "question", "prompt", "instruction")


@dataclass
class _Rows:
    """What is kept of the rows beside their texts. A flag for each line: 1 for a row with a text."""

    flags: bytearray = field(default_factory=bytearray)
    scores: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def dedup_files(
    inputs: Sequence[Path],
    output: Path,
    config: DedupConfig,
    *,
    workers: int | None = None,
    memory_gb: float = 4.0,
    progress: Progress = silent,
) -> DedupReport:
    """Deduplicate JSON Lines files into one; lines stay as they are, in the order read.

    A row's score is its ``quality.total``, ``quality_score`` or ``score`` (else 0), its id ``id`` (else its text), its
    source ``source`` or the file's name. Broken lines and rows without text are left out and reported. Texts and
    signatures over ``memory_gb`` go to a file beside the output while it works.

    Raises:
        CogumiError: no such file; ``output`` is one of the inputs or a folder; a packed file that was cut off; no row
            of a file has a text; a file that changed while it was read. ``output`` is then as it was.
    """
    checked(config)
    if output.resolve() in {path.resolve() for path in inputs}:
        raise CogumiError(f"{output} is both an input and the output", "name another file for the output, last")
    if output.is_dir():
        raise CogumiError(f"{output} is a folder", "name a file for the output, last")
    for path in inputs:
        if not path.is_file():
            raise CogumiError(f"there is no file {path}", "check the path")
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = _Rows()
    with ThreadPoolExecutor(workers or cores()) as pool:
        if config.engine == "datasketch":
            found = _by_reference(list(_texts(inputs, rows)), rows, config)
        else:
            corpus = read_corpus(
                _texts(inputs, rows), config, pool, memory_gb, output.parent,
                lambda done: progress(done, 0, "texts read and signed"),
            )  # fmt: skip
            ids = np.array(rows.ids, np.uint64)
            order = visiting_order(len(corpus), config, np.array(rows.scores), ids, corpus.digests)
            found = represent(corpus, order, config, pool, progress)
    pairs = example_pairs(found, config)
    excerpts = _copy_kept(inputs, output, rows.flags, found, {n for pair in pairs for n in pair[:2]})
    seconds = time.perf_counter() - started
    report = dedup_report(found, config, seconds, pairs, excerpts, domains=rows.domains, sources=rows.sources)
    return replace(report, left_out=tuple(rows.left_out))


def _by_reference(texts: Sequence[str], rows: _Rows, config: DedupConfig) -> Representatives:
    """The reference engine, which wants all texts at once."""
    from cogumi_dagster.lib.dedup.reference import represent_datasketch

    digests = id_hashes(normalise(text) for text in texts)
    order = visiting_order(len(texts), config, np.array(rows.scores), np.array(rows.ids, np.uint64), digests)
    return represent_datasketch(texts, order, config)


def _blocks(path: Path) -> Iterator[list[bytes]]:
    try:
        with open_packed(path) as lines:
            while block := lines.readlines(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise CogumiError(f"{path} cannot be read: {' '.join(str(error).split())}", "fetch the file again") from None


def _texts(inputs: Sequence[Path], rows: _Rows) -> Iterator[str]:
    """The texts of all rows; what else is needed of them goes into ``rows``."""
    for path in inputs:
        number, read, found, fields = 0, 0, 0, ""
        broken: list[int] = []
        for block in _blocks(path):
            for line in block:
                number += 1
                row = row_of_line(line)
                if row is None:
                    rows.flags.append(0)
                    if line.strip():
                        broken.append(number)
                    continue
                text = text_of_row(row)
                fields = fields or ", ".join(row)
                read += 1
                if text is None:
                    rows.flags.append(0)
                    continue
                found += 1
                rows.flags.append(1)
                score, name, domain, source = row_labels(row, path.name)
                rows.scores.append(score)
                rows.ids.append(name)
                rows.domains.append(domain)
                rows.sources.append(source)
                yield text
        if read and not found:
            known = ", ".join("/".join(pair) for pair in TEXT_FIELDS) + " or text"
            raise CogumiError(f"{path}: no row has a text; its fields are {fields}", f"rename them to {known}")
        if broken:
            shown = ", ".join(map(str, broken[:SHOWN_LINES]))
            more = f" and {len(broken) - SHOWN_LINES} more" if len(broken) > SHOWN_LINES else ""
            rows.left_out.append(f"{path}: {len(broken)} broken line(s) left out (line {shown}{more}), {read} kept")
        if found < read:
            rows.left_out.append(f"{path}: {read - found} row(s) without a text that can be written as UTF-8 left out")


def row_of_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        row = orjson.loads(line)
    except ValueError:  # stricter than json: NaN, half characters
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) else None


def row_labels(row: Mapping[str, Any], file: str) -> tuple[float, int, str, str]:
    """A row's score, the hash of its id (0 without one), its domain and its source."""
    places = [row]
    for part in ("task", "metadata", "quality"):
        place = row.get(part)
        if type(place) is dict:
            places.append(place)
    score = _first(places, ("total", "quality_score", "score"))
    usable = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    name = _first(places, ("id",))
    number = 0 if name is None else xxh3_64_intdigest(str(name).encode("utf-8", "surrogatepass"))
    domain = sys.intern(str(_first(places, ("domain",)) or "-"))
    return float(score) if usable else 0.0, number, domain, sys.intern(str(_first(places, ("source",)) or file))


def _first(places: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """The first of ``names`` in a row, its task, its metadata or its quality."""
    for name in names:
        for place in places:
            value = place.get(name)
            if value is not None:
                return value
    return None


def text_of_row(row: Mapping[str, Any]) -> str | None:
    """The text of a row in any of the usual shapes, ours included; None where there is none that UTF-8 can write."""
    text = _text_of_row(row)
    return None if text is None or (not text.isascii() and LONE_SURROGATE.search(text)) else text


def _text_of_row(row: Mapping[str, Any]) -> str | None:
    task = row.get("task")
    if isinstance(task, Mapping) and isinstance(task.get("prompt"), str):
        return f"{task['prompt']}\n{row.get('response') or ''}"
    for asked, answered in TEXT_FIELDS:
        one, other = row.get(asked), row.get(answered)
        if isinstance(one, str) and isinstance(other, str):
            extra = row.get("input")  # Alpaca's third field
            return f"{one}\n{extra}\n{other}" if extra and isinstance(extra, str) else f"{one}\n{other}"
    return next((row[name] for name in SINGLE_FIELDS if isinstance(row.get(name), str)), None)


def _copy_kept(
    inputs: Sequence[Path], output: Path, flags: bytearray, found: Representatives, wanted: Collection[int]
) -> dict[int, tuple[str, str]]:
    """Write the kept lines through a temporary file; return id and excerpt of the ``wanted`` documents."""
    kept = (found.kept_by == np.arange(len(found.kept_by))).tolist()
    excerpts: dict[int, tuple[str, str]] = {}
    temporary = output.with_name(f".{os.getpid()}.{output.name}")
    line = document = 0
    try:
        with open_packed(temporary, "wb") as out:
            for path in inputs:
                for block in _blocks(path):
                    mine = flags[line : line + len(block)]
                    line += len(block)
                    if len(mine) < len(block):
                        raise CogumiError(f"{path} grew while it was read", "run again when nobody writes to it")
                    stay = []
                    for place, flag in enumerate(mine):
                        stay.append(bool(flag) and kept[document])
                        if flag:
                            if document in wanted:
                                excerpts[document] = _shown(block[place], document)
                            document += 1
                    if not block[-1].endswith(b"\n"):
                        block[-1] += b"\n"
                    out.writelines(compress(block, stay))
        if line != len(flags):
            raise CogumiError("an input shrank while it was read", "run again when nobody writes to it")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return excerpts


def _shown(line: bytes, document: int) -> tuple[str, str]:
    row = row_of_line(line) or {}
    places = [row, *(row[part] for part in ("task", "metadata") if isinstance(row.get(part), Mapping))]
    return str(_first(places, ("id",)) or f"row {document + 1}"), (text_of_row(row) or "")[:EXCERPT]
