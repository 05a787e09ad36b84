"""The keep rule over a corpus: who stands for whom.

Visit the texts in order and drop one only if a text *already kept* is its verified near-duplicate. So each dropped text
has a kept representative at the threshold or above, and a chain 1~2~3 whose ends differ loses only its middle.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.dedup.corpus import Corpus
from cogumi_dagster.lib.profile import DedupConfig
from cogumi_dagster.lib.progress import Progress, silent

Array = NDArray[Any]
BATCH = 8192
"""Texts compared at once with those kept before, in parallel; only then with each other. The result does not depend
on it: a match is always the kept text that comes first in the order."""
SIGMAS = 4.0
"""A candidate whose signature or sketch agrees in fewer places than the threshold predicts, less this many standard
deviations, is not verified: of the pairs at the threshold about 1 in 10,000 is lost."""


@dataclass(frozen=True)
class Representatives:
    """For each text its kept representative (itself when kept), how like it is (exact Jaccard similarity) and whether
    the two are equal. ``verified``: pairs compared exactly."""

    kept_by: Array
    similarity: Array
    exact: Array
    verified: int

    @property
    def removed(self) -> Array:
        """Numbers of the texts that go."""
        return np.flatnonzero(self.kept_by != np.arange(len(self.kept_by)))


def represent(
    corpus: Corpus, order: Array, config: DedupConfig, pool: ThreadPoolExecutor, progress: Progress = silent
) -> Representatives:
    """Apply the keep rule in the ``order`` given (text numbers)."""
    first = _equal_texts(corpus, order)
    distinct = order[first[order] == order]
    buckets, heads = _buckets(corpus, distinct, config, pool)
    found, similarity, verified = _near(corpus, distinct, buckets, heads, config, pool, progress)
    kept_by = np.where(found[first] >= 0, found[first], first)  # an equal text goes where its first one goes
    exact = (kept_by == first) & (first != np.arange(len(corpus)))
    return Representatives(kept_by, similarity[first], exact, verified)


def _equal_texts(corpus: Corpus, order: Array) -> Array:
    """For each text the first in the order that equals it."""
    from cogumi_dagster.lib.dedup.kernels import same_bytes

    first = np.arange(len(corpus))
    if not len(order):
        return first
    by_digest = order[np.argsort(corpus.digests[order], kind="stable")]
    digests = corpus.digests[by_digest]
    begins = np.concatenate(([True], digests[1:] != digests[:-1]))
    leader = by_digest[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    others = np.flatnonzero(~begins)
    same = same_bytes(corpus.flat, corpus.starts, by_digest[others], leader[others])
    first[by_digest[others[same]]] = leader[others[same]]
    return first


def _buckets(corpus: Corpus, texts: Array, config: DedupConfig, pool: ThreadPoolExecutor) -> tuple[Array, int]:
    """Bucket of each band and text, -1 where the text would be alone in it; and how many buckets there are."""
    from cogumi_dagster.lib.dedup.kernels import band_keys

    rows = config.permutations // config.bands
    buckets = np.full((config.bands, len(corpus)), -1, np.int32)

    def band(number: int) -> int:
        keys = np.empty(len(corpus), np.uint64)
        band_keys(corpus.signatures, number * rows, rows, keys)
        mine = keys[texts]
        by_key = np.argsort(mine)
        ordered = mine[by_key]
        begins = np.concatenate(([True], ordered[1:] != ordered[:-1])) if len(ordered) else np.zeros(0, bool)
        group = np.cumsum(begins) - 1
        shared = np.bincount(group)[group] > 1 if len(group) else begins
        numbers = np.cumsum(begins & shared) - 1
        buckets[number, texts[by_key[shared]]] = numbers[shared]
        return int(numbers[-1]) + 1 if len(numbers) else 0

    total = 0
    for number, count in enumerate(pool.map(band, range(config.bands))):
        buckets[number, buckets[number] >= 0] += total
        total += count
    return buckets, total


def _near(
    corpus: Corpus,
    texts: Array,
    buckets: Array,
    heads: int,
    config: DedupConfig,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[Array, Array, int]:
    from cogumi_dagster.lib.dedup.kernels import match, sketch

    count = len(corpus)
    found, similarity = np.full(count, -1, np.int64), np.ones(count)
    visited = texts[(buckets[:, texts] >= 0).any(axis=0)]
    rank = np.zeros(count, np.int64)
    rank[visited] = np.arange(len(visited))
    sizes = np.zeros(heads, np.int64)
    for band in buckets:
        sizes += np.bincount(band[band >= 0], minlength=heads)
    begins = np.concatenate(([0], np.cumsum(sizes)))
    members, low_of_member = np.zeros(begins[-1], np.int32), np.zeros(begins[-1], np.uint64)
    filled = np.zeros(heads, np.int32)
    bits = min(64, config.permutations)
    low, high = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    sketch(corpus.signatures, 0, bits, low)
    sketch(corpus.signatures, config.permutations - bits, bits, high)
    limits = _limits(config.threshold, bits, config.permutations)

    def look(part: Array, seen: Array, fresh_from: int, append: int) -> int:
        return int(
            match(
                part, fresh_from, corpus.flat, corpus.starts, config.shingle, corpus.signatures, limits,
                config.threshold, buckets, rank, begins, filled, members, low, low_of_member, high, seen, found,
                similarity, append,
            )
        )  # fmt: skip

    scratch = [np.full(count, -1, np.int32) for _ in range(pool._max_workers)]
    verified = 0
    for begin in range(0, len(visited), BATCH):
        batch = visited[begin : begin + BATCH]
        parts: Sequence[Array] = np.array_split(batch, len(scratch))
        verified += sum(pool.map(look, parts, scratch, [begin] * len(parts), [0] * len(parts)))
        verified += look(batch, scratch[0], begin, 1)
        progress(min(begin + BATCH, len(visited)), len(visited), "comparing")
    return found, similarity, verified


def _limits(threshold: float, bits: int, permutations: int) -> Array:
    """Agreement of sketches and signatures below which a candidate is not verified: see ``SIGMAS``. The sketches
    count 64 bits each, those beyond ``bits`` being equal."""
    bit = (1 + threshold) / 2
    apart = permutations >= 2 * bits  # else the two sketches overlap, and together say nothing more

    def floor(count: int, share: float) -> int:
        return max(0, math.floor(count * share - SIGMAS * math.sqrt(count * share * (1 - share))))

    both = floor(2 * bits, bit) if apart else 0
    return np.array([floor(bits, bit) + 64 - bits, both + (128 - 2 * bits) * apart, floor(permutations, threshold)])
