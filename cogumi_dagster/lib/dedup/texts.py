"""Near-duplicate removal: MinHash-LSH proposes pairs, the exact Jaccard similarity of their shingles decides.

A text is normalised (NFC, lower case, runs of whitespace to one space) and cut into character n-grams. The keep rule is
in ``representatives``: a text goes only if a kept one is its verified near-duplicate. Union-find or "drop the later of
each pair" loses more: one published corpus had 859,091 templated rows merged into one.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from cogumi_dagster.lib.dedup.corpus import cores, read_corpus
from cogumi_dagster.lib.dedup.minhash import checked, normalise, recall
from cogumi_dagster.lib.dedup.representatives import Representatives, represent
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DedupConfig
from cogumi_dagster.lib.progress import Progress, silent

Array = NDArray[Any]
EXAMPLES_PER_CATEGORY = 3
EXCERPT = 160


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


def dedup(
    texts: Sequence[str],
    config: DedupConfig,
    *,
    ids: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> tuple[NDArray[np.bool_], DedupReport]:
    """Which of ``texts`` to keep, as a mask in the order given, and the report.

    ``keep: best`` visits by score, the highest first, then by id, then by text: the same documents stay whatever
    order they come in. ``keep: first`` visits in the order given. All sequences have the length of ``texts``.
    ``workers``: threads, one a core when left out; the result does not depend on it.

    Raises:
        CogumiError: lengths that differ; bands that are too many or find too few pairs; an engine not installed.
    """
    checked(config)
    for name, values in (("ids", ids), ("scores", scores), ("domains", domains), ("sources", sources)):
        if values is not None and len(values) != len(texts):
            raise CogumiError(
                f"dedup: {len(texts)} texts but {len(values)} {name}", f"give one of {name} for each text"
            )
    started = time.perf_counter()
    numbers = id_hashes(ids) if ids is not None else None
    points = np.asarray(scores, np.float64) if scores is not None else None
    if config.engine == "native":
        found = _native(texts, numbers, points, config, workers or cores(), progress)
    else:
        order = visiting_order(len(texts), config, points, numbers, id_hashes([normalise(text) for text in texts]))
        if config.engine == "ray":
            from cogumi_dagster.lib.dedup.on_ray import represent_ray

            found = represent_ray(texts, order, config)
        else:
            from cogumi_dagster.lib.dedup.reference import represent_datasketch

            found = represent_datasketch(texts, order, config)
    names = ids if ids is not None else range(len(texts))
    pairs = example_pairs(found, config)
    excerpts = {n: (str(names[n]), texts[n][:EXCERPT]) for pair in pairs for n in pair[:2]}
    seconds = time.perf_counter() - started
    report = dedup_report(found, config, seconds, pairs, excerpts, domains=domains or (), sources=sources or ())
    return found.kept_by == np.arange(len(texts)), report


def _native(
    texts: Sequence[str], ids: Array | None, scores: Array | None, config: DedupConfig, threads: int, progress: Progress
) -> Representatives:
    with ThreadPoolExecutor(threads) as pool:
        corpus = read_corpus(texts, config, pool, progress=lambda done: progress(done, len(texts), "signatures"))
        order = visiting_order(len(texts), config, scores, ids, corpus.digests)
        return represent(corpus, order, config, pool, progress)


def id_hashes(ids: Iterable[str]) -> Array:
    """64 bits of each id, the same on every machine."""
    return np.fromiter((xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) for name in ids), np.uint64)


def visiting_order(count: int, config: DedupConfig, scores: Array | None, ids: Array | None, digests: Array) -> Array:
    """The order in which documents are visited: the keep rule favours the first."""
    if config.keep == "first":
        return np.arange(count)
    keys = [digests] if ids is None else [digests, ids]
    return np.lexsort([*keys, -scores] if scores is not None else keys)


def _labels(found: Representatives, config: DedupConfig) -> Array:
    """The category of each document, were it removed."""
    near = np.where(found.similarity >= 0.95, "0.95-1.0", f"{config.threshold:g}-0.95")
    return np.where(found.exact, "exact", near)


def example_pairs(found: Representatives, config: DedupConfig) -> list[tuple[int, int, str]]:
    """A few removed documents of each category with the kept ones and the category, the least alike first."""
    labels, removed = _labels(found, config), found.removed
    pairs: list[tuple[int, int, str]] = []
    for label in sorted(set(labels[removed].tolist()), reverse=True):
        mine = removed[labels[removed] == label]
        least = mine[np.argsort(found.similarity[mine], kind="stable")][:EXAMPLES_PER_CATEGORY].tolist()
        pairs += [(number, int(found.kept_by[number]), label) for number in least]
    return pairs


def dedup_report(
    found: Representatives,
    config: DedupConfig,
    seconds: float,
    pairs: Sequence[tuple[int, int, str]],
    excerpts: Mapping[int, tuple[str, str]],
    *,
    domains: Sequence[str],
    sources: Sequence[str],
) -> DedupReport:
    """``pairs`` of ``example_pairs``; ``excerpts``: id and beginning of the text of their documents. ``domains`` and
    ``sources`` of all documents, empty where there are none."""
    count, removed = len(found.kept_by), found.removed
    examples = [
        DuplicatePair(
            excerpts[one][0], excerpts[other][0], round(float(found.similarity[one]), 4), label, excerpts[one][1],
            excerpts[other][1],
        )
        for one, other, label in pairs
    ]  # fmt: skip
    clusters = np.bincount(found.kept_by[removed]) if len(removed) else np.zeros(1, int)
    return DedupReport(
        documents=count,
        kept=count - len(removed),
        removed=len(removed),
        threshold=config.threshold,
        recall_at_threshold=round(recall(config.threshold, config.permutations, config.bands), 4),
        categories=_count(_labels(found, config)[removed].tolist()),
        largest_cluster=1 + int(clusters.max()) if count else 0,
        removed_by_domain=_count(domains[n] for n in removed.tolist()) if domains else {},
        removed_by_source=_count(sources[n] for n in removed.tolist()) if sources else {},
        candidates_verified=found.verified,
        examples=tuple(examples),
        seconds=round(seconds, 3),
        docs_per_second=round(count / max(seconds, 1e-9), 1),
    )


def _count(labels: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(labels).items()))
