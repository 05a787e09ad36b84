"""Near-duplicate removal: MinHash-LSH proposes pairs, the exact Jaccard similarity of their shingles decides.

A text is normalised (NFC, lower case, runs of whitespace to one space) and cut into character n-grams.
The keep rule: visit the documents in order and drop one only if a document *already kept* is its verified
near-duplicate. So each dropped document has a kept representative at the threshold or above, and a chain
1~2~3 whose ends differ loses only its middle. Union-find or "drop the later of each pair" loses more: one
published corpus had 859,091 templated rows merged into one.
"""

import hashlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.curation.minhash import (
    Shingles,
    band_keys,
    buckets_of,
    checked,
    jaccard,
    normalise,
    recall,
    shingle_set,
    signatures,
)
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant, write_jsonl
from cogumi_dagster.lib.profile import DedupConfig
from cogumi_dagster.lib.progress import Progress, silent

log = logging.getLogger(__name__)

EXAMPLES_PER_CATEGORY = 3
EXCERPT = 160
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


@dataclass(frozen=True)
class DuplicatePair:
    """A removed document beside the kept one that stands for it."""

    removed_id: str
    kept_id: str
    jaccard: float
    category: str
    removed_text: str
    kept_text: str


@dataclass(frozen=True)
class DedupReport:
    """What went and why. ``categories`` counts removals: ``exact`` is equal normalised text, the rest ranges of
    Jaccard similarity to the kept representative. ``largest_cluster`` is a kept document with all it stands for."""

    documents: int
    kept: int
    removed: int
    threshold: float
    recall_at_threshold: float
    categories: dict[str, int]
    largest_cluster: int
    removed_by_domain: dict[str, int]
    removed_by_source: dict[str, int]
    candidates_verified: int
    examples: tuple[DuplicatePair, ...]
    seconds: float
    docs_per_second: float
    left_out: tuple[str, ...] = ()
    """For files: what could not be read, with line numbers."""


@dataclass
class _Representatives:
    """For each distinct text (by number) the kept text that stands for it, and how like it is."""

    kept_by: list[int]
    similarity: list[float]
    verified: int = 0


def _represent(texts: Sequence[str], config: DedupConfig, progress: Progress) -> _Representatives:
    """Apply the keep rule to distinct, normalised texts in the order given."""
    found = _Representatives(list(range(len(texts))), [1.0] * len(texts))
    buckets = buckets_of(band_keys(signatures(texts, config, progress), config.bands))
    kept_in: dict[tuple[int, int], list[int]] = {}
    sets: dict[int, Shingles] = {}  # only of kept texts that share a bucket: few
    for number, mine in enumerate(buckets):
        if not mine:
            continue
        own = shingle_set(texts[number], config.shingle)
        best, closest = 0.0, number
        for other in sorted({other for bucket in mine for other in kept_in.get(bucket, ())}):
            theirs = sets[other]
            if min(len(own), len(theirs)) < config.threshold * max(len(own), len(theirs)):
                continue  # the sizes alone rule the threshold out
            found.verified += 1
            similarity = jaccard(own, theirs)
            if similarity >= config.threshold and similarity > best:
                best, closest = similarity, other
        found.kept_by[number] = closest
        if closest == number:
            sets[number] = own
            for bucket in mine:
                kept_in.setdefault(bucket, []).append(number)
        else:
            found.similarity[number] = best
    return found


def dedup(
    texts: Sequence[str],
    config: DedupConfig,
    *,
    ids: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    progress: Progress = silent,
) -> tuple[NDArray[np.bool_], DedupReport]:
    """Which of ``texts`` to keep, as a mask in the order given, and the report.

    ``keep: best`` visits by score, the highest first, then by id, then by text: the same documents stay whatever
    order they come in. ``keep: first`` visits in the order given. All sequences have the length of ``texts``.

    Raises:
        CogumiError: lengths that differ; bands that do not divide the permutations or find too few pairs.
    """
    checked(config)
    names = list(ids) if ids is not None else [str(number) for number in range(len(texts))]
    for name, values in (("ids", names), ("scores", scores), ("domains", domains), ("sources", sources)):
        if values is not None and len(values) != len(texts):
            raise CogumiError(
                f"dedup: {len(texts)} texts but {len(values)} {name}", f"give one of {name} for each text"
            )
    started = time.perf_counter()
    normal = [normalise(text) for text in texts]
    order = list(range(len(texts)))
    if config.keep == "best":
        order.sort(key=lambda n: (-(scores[n] if scores is not None else 0.0), names[n], normal[n]))
    first_of: dict[str, int] = {}
    for document in order:
        first_of.setdefault(normal[document], document)
    distinct = {text: number for number, text in enumerate(first_of)}
    found = _represent(list(first_of), config, progress)
    firsts = list(first_of.values())

    mask = np.zeros(len(texts), dtype=bool)
    pairs: list[tuple[int, int, float, str]] = []
    for document in order:
        number = distinct[normal[document]]
        keeper = firsts[found.kept_by[number]]
        if keeper == document:
            mask[document] = True
            continue
        exact = found.kept_by[number] == number
        category = "exact" if exact else _category(found.similarity[number], config.threshold)
        pairs.append((document, keeper, found.similarity[number], category))
    report = _report(texts, names, pairs, found.verified, config, time.perf_counter() - started)
    return mask, replace(
        report,
        removed_by_domain=_count(pairs, domains),
        removed_by_source=_count(pairs, sources),
    )


def _category(similarity: float, threshold: float) -> str:
    return "0.95-1.0" if similarity >= 0.95 else f"{threshold:g}-0.95"


def _count(pairs: list[tuple[int, int, float, str]], labels: Sequence[str] | None) -> dict[str, int]:
    return dict(sorted(Counter(labels[pair[0]] for pair in pairs).items())) if labels is not None else {}


def _report(
    texts: Sequence[str],
    names: Sequence[str],
    pairs: list[tuple[int, int, float, str]],
    verified: int,
    config: DedupConfig,
    seconds: float,
) -> DedupReport:
    categories = Counter(category for *_, category in pairs)
    clusters = Counter(keeper for _, keeper, _, _ in pairs)
    shown: Counter[str] = Counter()
    examples: list[DuplicatePair] = []
    for removed, keeper, similarity, category in sorted(pairs, key=lambda p: (p[2], names[p[0]])):
        if shown[category] < EXAMPLES_PER_CATEGORY:
            shown[category] += 1
            excerpts = texts[removed][:EXCERPT], texts[keeper][:EXCERPT]
            examples.append(DuplicatePair(names[removed], names[keeper], round(similarity, 4), category, *excerpts))
    return DedupReport(
        documents=len(texts),
        kept=len(texts) - len(pairs),
        removed=len(pairs),
        threshold=config.threshold,
        recall_at_threshold=round(recall(config.threshold, config.permutations, config.bands), 4),
        categories=dict(sorted(categories.items())),
        largest_cluster=1 + max(clusters.values(), default=0) if texts else 0,
        removed_by_domain={},
        removed_by_source={},
        candidates_verified=verified,
        examples=tuple(examples),
        seconds=round(seconds, 3),
        docs_per_second=round(len(texts) / max(seconds, 1e-9), 1),
    )


def text_of_row(row: Mapping[str, Any]) -> str | None:
    """The text of a row in any of the usual shapes, ours included; None where there is none."""
    task = row.get("task")
    if isinstance(task, Mapping) and isinstance(task.get("prompt"), str):
        return f"{task['prompt']}\n{row.get('response') or ''}"
    for asked, answered in TEXT_FIELDS:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return f"{row[asked]}\n{row[answered]}"
    return next((row[name] for name in SINGLE_FIELDS if isinstance(row.get(name), str)), None)


def _field(row: Mapping[str, Any], *names: str) -> Any:
    """The first of ``names`` in a row, its task, its metadata or its quality."""
    places = [row, *(row[part] for part in ("task", "metadata", "quality") if isinstance(row.get(part), Mapping))]
    return next((place[name] for name in names for place in places if place.get(name) is not None), None)


def _score(row: Mapping[str, Any]) -> float:
    score = _field(row, "total", "quality_score", "score")
    usable = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    return float(score) if usable else 0.0


def dedup_files(
    inputs: Sequence[Path],
    output: Path,
    config: DedupConfig,
    text_of: Callable[[Mapping[str, Any]], str | None] = text_of_row,
    progress: Progress = silent,
) -> DedupReport:
    """Deduplicate JSONL files into one; rows stay as they are, in the order read.

    A row's score is its ``quality.total``, ``quality_score`` or ``score`` (else 0), its id ``id`` or a hash of its
    content, its source ``source`` or the file's name. Broken lines and rows without text are left out and reported.

    Raises:
        CogumiError: no such file; ``output`` is one of the inputs; no row of a file has a text.
    """
    if output.resolve() in {path.resolve() for path in inputs}:
        raise CogumiError(f"{output} is both an input and the output", "name another file for the output, last")
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    files: list[str] = []
    left_out: list[str] = []
    for path in inputs:
        read, report = read_jsonl_tolerant(path)
        if report.broken:
            left_out.append(report.describe())
        found = [(row, text) for row in read if (text := text_of(row)) is not None and not LONE_SURROGATE.search(text)]
        if read and not found:
            known = ", ".join("/".join(pair) for pair in TEXT_FIELDS) + " or text"
            raise CogumiError(
                f"{path}: no row has a text; its fields are {', '.join(read[0])}", f"rename them to {known}"
            )
        if len(found) < len(read):
            left_out.append(
                f"{path}: {len(read) - len(found)} row(s) without a text that can be written as UTF-8 left out"
            )
        rows += [row for row, _ in found]
        texts += [text for _, text in found]
        files += [path.name] * len(found)
    mask, result = dedup(
        texts,
        config,
        ids=[str(_field(row, "id") or _content_id(row)) for row in rows],
        scores=[_score(row) for row in rows],
        domains=[str(_field(row, "domain") or "-") for row in rows],
        sources=[str(_field(row, "source") or name) for row, name in zip(rows, files, strict=True)],
        progress=progress,
    )
    write_jsonl(output, (row for row, keep in zip(rows, mask, strict=True) if keep))
    log.info("dedup: kept %d of %d rows in %s", result.kept, result.documents, output)
    return replace(result, left_out=tuple(left_out))


def _content_id(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
