"""Texts made ready for near-duplicate search: normalised, end to end in one array, with signatures and digests.

Texts come one by one and are worked on in blocks by threads (the kernels hold no lock). What does not fit into the
memory given goes to a file, which the operating system then pages in as it is needed.
"""

import os
import tempfile
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.profile import DedupConfig

BLOCK_BYTES = 16 << 20
"""Texts are worked on in blocks of this size: large against the wait for Python's lock, small against memory."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Corpus:
    """``flat``: the normalised texts' UTF-8 bytes; text ``i`` is ``flat[starts[i]:starts[i + 1]]``. ``signatures``:
    uint32, documents x permutations. ``digests``: 64 bits of each text."""

    flat: Array
    starts: Array
    signatures: Array
    digests: Array

    def __len__(self) -> int:
        return len(self.starts) - 1


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def permutations_of(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The factors and offsets of datasketch 2.0's ``affine32`` scheme with seed 1: h -> a*h + b mod 2^32, a odd."""
    random = np.random.RandomState(1)
    factors = random.randint(0, 1 << 31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, random.randint(0, 1 << 32, count, dtype=np.uint32)


def read_corpus(
    texts: Iterable[str],
    config: DedupConfig,
    pool: ThreadPoolExecutor,
    memory_gb: float = 4.0,
    scratch: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Corpus:
    """Normalise and sign ``texts``, as they come. What is over ``memory_gb`` goes to a file in ``scratch``."""
    texts_store = _Store(np.dtype(np.uint8), 1, scratch)
    signature_store = _Store(np.dtype(np.uint32), config.permutations, scratch)
    lengths: list[Array] = []
    digests: list[Array] = []
    pending: deque[Future[tuple[Array, Array, Array, Array]]] = deque()
    budget = memory_gb * 1e9
    done = 0

    def take() -> None:
        nonlocal done
        flat, block_lengths, signatures, block_digests = pending.popleft().result()
        texts_store.append(flat)
        signature_store.append(signatures)
        lengths.append(block_lengths)
        digests.append(block_digests)
        done += len(block_lengths)
        progress(done)
        if texts_store.bytes + signature_store.bytes > budget:
            texts_store.spill()
            signature_store.spill()

    block: list[bytes] = []
    size = 0
    for text in texts:
        if not text.isascii():
            text = " ".join(unicodedata.normalize("NFC", text).lower().split())
        # A lone surrogate is legal in JSON and in str; it must not end a run.
        block.append(text.encode("utf-8", "surrogatepass"))
        size += len(block[-1])
        if size >= BLOCK_BYTES:
            pending.append(pool.submit(_work, block, config))
            block, size = [], 0
            while len(pending) > 2 * pool._max_workers or (pending and pending[0].done()):
                take()
    if block:
        pending.append(pool.submit(_work, block, config))
    while pending:
        take()
    counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return Corpus(
        texts_store.whole().reshape(-1),
        starts,
        signature_store.whole(),
        np.concatenate(digests) if digests else np.zeros(0, np.uint64),
    )


def _work(block: list[bytes], config: DedupConfig) -> tuple[Array, Array, Array, Array]:
    from cogumi_dagster.lib.dedup import kernels

    raw = np.frombuffer(b"".join(block), dtype=np.uint8)
    ends = np.zeros(len(block) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, block), np.int64, len(block)), out=ends[1:])
    flat = np.empty(len(raw), np.uint8)
    lengths = np.empty(len(block), np.int64)
    used = kernels.squeeze(raw, ends, flat, lengths)
    starts = np.zeros(len(block) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    signatures = np.empty((len(block), config.permutations), np.uint32)
    digests = np.empty(len(block), np.uint64)
    factors, offsets = permutations_of(config.permutations)
    kernels.sign(flat, starts, config.shingle, factors, offsets, signatures, digests)
    return flat[:used], lengths, signatures, digests


class _Store:
    """Rows appended block by block, in memory until told to spill, then in a file that vanishes with the process."""

    def __init__(self, kind: "np.dtype[Any]", width: int, scratch: Path | None) -> None:
        self._kind, self._width, self._scratch = kind, width, scratch
        self._blocks: list[Array] = []
        self._file: Any = None
        self.bytes = 0
        self._on_disk = 0

    def append(self, rows: Array) -> None:
        if self._file is not None:
            self._file.write(np.ascontiguousarray(rows).data)
            self._on_disk += rows.nbytes
        else:
            self._blocks.append(rows.copy() if rows.base is not None else rows)
            self.bytes += rows.nbytes

    def spill(self) -> None:
        """From now on to disk, what is in memory too."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115  (lives as long as the mapping)
            blocks, self._blocks = self._blocks, []
            for rows in blocks:
                self.append(rows)
            self.bytes = 0

    def whole(self) -> Array:
        """All rows, shape (rows, width)."""
        if self._file is not None and self._on_disk:
            self._file.flush()
            return np.memmap(self._file, dtype=self._kind, mode="r").reshape(-1, self._width)
        total = sum(rows.size for rows in self._blocks)
        whole = np.empty(total, self._kind)
        at = 0
        self._blocks.reverse()
        while self._blocks:  # freed as they are copied: the peak is the whole and one block
            rows = self._blocks.pop().reshape(-1)
            whole[at : at + rows.size] = rows
            at += rows.size
        return whole.reshape(-1, self._width)
