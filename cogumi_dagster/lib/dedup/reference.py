"""The keep rule by datasketch: the reference that the compiled engine is held against. Slow, and plain to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.dedup.minhash import normalise
from cogumi_dagster.lib.dedup.representatives import Representatives
from cogumi_dagster.lib.profile import DedupConfig


def represent_datasketch(texts: Sequence[str], order: NDArray[Any], config: DedupConfig) -> Representatives:
    """Visit ``texts`` in ``order``; each goes to the first kept one that is its verified near-duplicate."""
    from datasketch import MinHash, MinHashLSH

    bands, rows = config.bands, config.permutations // config.bands
    index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    normal = [normalise(text) for text in texts]
    found = Representatives(np.arange(len(texts)), np.ones(len(texts)), np.zeros(len(texts), bool), 0)
    first: dict[str, int] = {}
    sets: dict[int, set[str]] = {}
    place: dict[int, int] = {}
    verified = 0
    for rank, number in enumerate(order.tolist()):
        place[number] = rank
        twin = first.setdefault(normal[number], number)
        if twin != number:
            found.kept_by[number], found.similarity[number] = found.kept_by[twin], found.similarity[twin]
            found.exact[number] = found.kept_by[twin] == twin
            continue
        own = _shingles(normal[number], config.shingle)
        signature = MinHash(num_perm=bands * rows)
        signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in own])
        for other in sorted(index.query(signature), key=place.__getitem__):
            shared = len(own & sets[other])
            verified += 1
            if shared >= config.threshold * (len(own) + len(sets[other]) - shared):
                found.kept_by[number] = other
                found.similarity[number] = shared / (len(own) + len(sets[other]) - shared)
                break
        else:
            sets[number] = own
            index.insert(number, signature, check_duplication=False)
    return Representatives(found.kept_by, found.similarity, found.exact, verified)


def _shingles(text: str, size: int) -> set[str]:
    text += "\0" * (size - len(text))
    return {text[start : start + size] for start in range(len(text) - size + 1)}
