"""MinHash-LSH: how texts are normalised, how bands are chosen, and the exact similarity of two texts.

The inner loops are in ``kernels``; ``corpus`` runs them over many texts.
"""

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.dedup.corpus import read_corpus
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DedupConfig

Shingles = NDArray[np.uint64]
Signatures = NDArray[np.uint32]

RECALL_FLOOR = 0.98
"""Fewer found pairs than this at the threshold is an error, not a result. (datasketch's own tuning at 0.8, 9 bands of
13 rows, finds 0.40 of them; 20 bands of 6 find 0.998.)"""


def normalise(text: str) -> str:
    """NFC, lower case, runs of whitespace to one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def recall(threshold: float, permutations: int, bands: int) -> float:
    """Probability that a pair at Jaccard ``threshold`` shares at least one band."""
    return float(1.0 - (1.0 - threshold ** (permutations // bands)) ** bands)


def bands_for(threshold: float, permutations: int = 128, floor: float = RECALL_FLOOR) -> int:
    """The fewest bands that find a share ``floor`` of the pairs at ``threshold``; if none do, as many as there are
    permutations. A band is ``permutations // bands`` rows; what is left over is not used for bands."""
    return next((n for n in range(1, permutations) if recall(threshold, permutations, n) >= floor), permutations)


def checked(config: DedupConfig) -> DedupConfig:
    """The same config, or a CogumiError that says which value would lose duplicates silently."""
    if config.bands > config.permutations:
        raise CogumiError(
            f"dedup: {config.bands} bands are more than {config.permutations} permutations",
            f"set dedup.bands to {bands_for(config.threshold, config.permutations)}",
        )
    found = recall(config.threshold, config.permutations, config.bands)
    if found < RECALL_FLOOR:
        best = bands_for(config.threshold, config.permutations)
        better = recall(config.threshold, config.permutations, best) >= RECALL_FLOOR
        raise CogumiError(
            f"dedup: {config.bands} bands find only {found:.0%} of the pairs at Jaccard {config.threshold}",
            f"set dedup.bands to {best}" if better else "raise dedup.threshold or dedup.permutations",
        )
    return config


def shingle_set(text: str, size: int) -> Shingles:
    """The distinct n-grams of one normalised text as codes, sorted. Up to 3 characters equal codes mean equal
    n-grams; above, a code is a 64-bit hash. A text shorter than ``size`` has one n-gram, padded with NUL."""
    from cogumi_dagster.lib.dedup.kernels import codes_of

    flat = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    codes = np.empty(len(flat) + size, np.uint64)
    count = codes_of(flat, 0, len(flat), size, np.empty(len(flat) + size, np.uint32), codes)
    return np.unique(codes[:count])


def jaccard(left: Shingles, right: Shingles) -> float:
    """Exact Jaccard similarity of two sorted sets without repeats."""
    places = np.searchsorted(right, left)
    places[places == len(right)] = 0
    shared = int(np.count_nonzero(right[places] == left))
    return shared / (len(left) + len(right) - shared)


def signatures(texts: Sequence[str], config: DedupConfig) -> Signatures:
    """MinHash signatures of texts, shape (documents, permutations).

    Equal, value for value, to those of datasketch 2.0 (``affine32``) given the same 32-bit hashes.
    """
    with ThreadPoolExecutor(1) as pool:
        return read_corpus(texts, config, pool).signatures


def lsh_keys(signatures: Signatures, config: DedupConfig) -> NDArray[np.uint64]:
    """One 64-bit key for each band of each signature, shape (bands, texts): texts that share one are candidates."""
    from cogumi_dagster.lib.dedup.kernels import band_keys

    rows = config.permutations // config.bands
    keys = np.empty((config.bands, len(signatures)), np.uint64)
    for band in range(config.bands):
        band_keys(signatures, band * rows, rows, keys[band])
    return keys
