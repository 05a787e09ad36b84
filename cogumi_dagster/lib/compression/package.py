"""Packages: a GGUF's tensors as planes, zstd, a manifest with SHA-256, and unpacking that trusts nothing.

A package is a folder: ``package.json``, ``<name>.zst`` and, where it pays, ``dictionary.zstd``. The file is packed in
chunks of at most 4 MiB, none across a tensor's end. A tensor's chunk becomes planes (see ``planes``), anything else
stays as it is; each plane is a zstd frame, or raw where zstd does not shrink it. Packages of format 1 (zstd frames
of 1 MiB, a dictionary always) still unpack.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.planes import block_bytes, join, plane_bytes, split
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.gguf_file import read_gguf

MANIFEST, DICTIONARY = "package.json", "dictionary.zstd"
PLAIN = "plain"
"""The kind of a chunk that is no tensor, or one of a type that has no layout."""
ZSTD = "zstd"
"""The kind of every chunk of format 1: one frame, which may be longer than what it holds."""
LARGEST_CHUNK = CHUNK = 1 << 22
CHUNK_1 = 1 << 20
"""Of format 1."""
SMALLEST_TENSOR = 1 << 14
"""Smaller ones stay with what is around them: a frame for each plane costs more than it saves."""
LARGEST_MEMBER = 1 << 26
"""Of what is read at once: the manifest and the dictionary."""
BOMB_RATIO, BOMB_BYTES = 1000, 1 << 30
"""More than 1 GiB that is packed to less than a thousandth is no model."""
HUFFMAN = {"strategy": 1, "min_match": 7, "hash_log": 6, "window_log": 19}
"""zstd that hardly looks for repeats (strategy 1 is ``fast``): in planes of codes they are chance, and cost more than
the Huffman code of their bytes. Level 10 gives up to 6 % more bytes of the same planes, at a tenth of the speed."""
THOROUGH = 16
"""From this level on zstd is tried on the planes too, and the shorter frame is kept. It weighs each match, so that it
loses nothing, and finds what is left of an earlier quantization (a checkpoint that was once Q4_1: 4 %), at 2 MB/s."""
MOST_THREADS = 8
"""Chunks in memory are three times as many."""

Size = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Given = TypeVar("Given")
Made = TypeVar("Made")


class Run(NamedTuple):
    """A part of a file: ``plain`` or a tensor type, where it starts, and its bytes."""

    kind: str
    start: int
    bytes: int


class Chunk(NamedTuple):
    """A run as it is packed: its bytes, and those of the frame of each plane."""

    kind: str
    bytes: Size
    frames: tuple[Size, ...]

    @property
    def planes(self) -> list[int]:
        """Bytes of each plane; none where there is no such chunk."""
        whole = self.kind in (PLAIN, ZSTD)
        block = 1 if whole else block_bytes(self.kind)
        if not block or self.bytes % block or self.bytes > LARGEST_CHUNK:
            return []
        return [self.bytes] if whole else plane_bytes(self.kind, self.bytes)

    @property
    def sound(self) -> bool:
        """Whether there can be such a chunk: a frame for each plane, none of them longer."""
        planes, room = self.planes, self.bytes // 100 + 100 if self.kind == ZSTD else 0
        return len(planes) == len(self.frames) and all(
            frame <= plane + room for frame, plane in zip(self.frames, planes, strict=True)
        )


class _Head(BaseModel):
    format: int = 1


class Manifest(BaseModel):
    """``package.json`` of format 2."""

    model_config = ConfigDict(strict=True, frozen=True)
    format: Literal[2]
    file: str
    bytes: Size
    sha256: Sha256
    dictionary_sha256: Sha256 | None
    chunks: tuple[Chunk, ...]


class _Manifest1(BaseModel):
    model_config = ConfigDict(strict=True)
    file: str
    bytes: Size
    sha256: Sha256
    dictionary_sha256: Sha256
    frames: tuple[Size, ...]

    def as_format_2(self) -> Manifest:
        if len(self.frames) != -(-self.bytes // CHUNK_1):
            raise ValueError("the frames do not make up the file")
        chunks = [Chunk(ZSTD, min(CHUNK_1, self.bytes - CHUNK_1 * n), (frame,)) for n, frame in enumerate(self.frames)]
        return Manifest(format=2, chunks=tuple(chunks), **self.model_dump(exclude={"frames"}))


@dataclass(frozen=True)
class PackageReport:
    """Bytes around packing; ``bit_identical`` was found by unpacking again and hashing.

    ``bytes_after`` counts the whole package, manifest and dictionary included. ``ratio_zstd`` is what zstd makes of the
    file as it is, at the same level: the planes' gain is the difference.
    """

    file: str
    bytes_before: int
    bytes_after: int
    ratio: float
    ratio_zstd: float
    level: int
    dictionary_bytes: int
    """0 where it is left out."""
    dictionary_saves: int
    """Bytes that the trained dictionary saves in the frames, less its own. Below 0 it is left out."""
    pack_seconds: float
    unpack_seconds: float
    bit_identical: bool


def pack(source: Path, out: Path, *, level: int, dictionary_kb: int) -> PackageReport:
    """Write the package of ``source`` to the folder ``out``, then unpack it and compare.

    Raises:
        CogumiError: the file is empty.
    """
    if source.stat().st_size == 0:
        raise CogumiError(f"{source} is empty: there is nothing to pack", "write it again")
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, DICTIONARY):  # of a package that was there before
        (out / name).unlink(missing_ok=True)
    runs = file_layout(source)
    dictionary, saves = _dictionary_that_pays(source, runs, level, dictionary_kb * 1024)
    chunks = []
    with (out / f"{source.name}.zst").open("wb") as write:
        for run, frames in _packed(source, runs, level, dictionary):
            chunks.append(Chunk(run.kind, run.bytes, tuple(map(len, frames))))
            write.writelines(frames)
    if dictionary:
        (out / DICTIONARY).write_bytes(dictionary)
    manifest = Manifest(
        format=2,
        file=source.name,
        bytes=source.stat().st_size,
        sha256=file_sha256(source),
        dictionary_sha256=hashlib.sha256(dictionary).hexdigest() if dictionary else None,
        chunks=tuple(chunks),
    )
    (out / MANIFEST).write_text(json.dumps(manifest.model_dump(), separators=(",", ":")))
    packed_at = time.perf_counter()
    again = out / ".round-trip"
    try:
        unpack(out, again)
        unpacked_at = time.perf_counter()
        identical = file_sha256(again) == manifest.sha256
    finally:
        again.unlink(missing_ok=True)
    members = (out / name for name in (f"{source.name}.zst", MANIFEST, DICTIONARY))
    after = sum(member.stat().st_size for member in members if member.is_file())
    return PackageReport(
        file=f"{source.name}.zst",
        bytes_before=manifest.bytes,
        bytes_after=after,
        ratio=after / manifest.bytes,
        ratio_zstd=zstd_ratio(source, level),
        level=level,
        dictionary_bytes=len(dictionary),
        dictionary_saves=saves,
        pack_seconds=packed_at - started,
        unpack_seconds=unpacked_at - packed_at,
        bit_identical=identical,
    )


def zstd_ratio(source: Path, level: int) -> float:
    """Compressed over plain bytes of the file as it is, in chunks of 1 MiB and without a dictionary."""
    size = source.stat().st_size
    runs = [Run(PLAIN, at, min(CHUNK_1, size - at)) for at in range(0, size, CHUNK_1)]
    return _frame_bytes(_packed(source, runs, level, b"")) / max(1, size)


def file_layout(source: Path) -> list[Run]:
    """The file's chunks, in order. What is no sound GGUF is plain from end to end."""
    size = source.stat().st_size
    runs: list[Run] = []
    done = 0
    for kind, start, length in _tensors(source):
        if start < done or start + length > size:  # they overlap, or are cut off
            return _cut(PLAIN, 0, size)
        runs += [*_cut(PLAIN, done, start), *_cut(kind, start, start + length)]
        done = start + length
    return runs + _cut(PLAIN, done, size)


def _tensors(source: Path) -> list[Run]:
    """The tensors that become planes, in the order of the file; none where it is no GGUF."""
    with source.open("rb") as read:
        if read.read(4) != b"GGUF":
            return []
    try:
        found = [Run(t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in read_gguf(source).tensors]
    except Exception:  # the reader raises whatever numpy and struct do
        return []
    return sorted((t for t in found if block_bytes(t.kind) and t.bytes >= SMALLEST_TENSOR), key=lambda t: t.start)


def _cut(kind: str, start: int, end: int) -> list[Run]:
    """Chunks of whole blocks."""
    block = 1 if kind == PLAIN else block_bytes(kind) or 1
    step = max(1, CHUNK // block) * block
    return [Run(kind, at, min(step, end - at)) for at in range(start, end, step)]


def _packed(source: Path, runs: Iterable[Run], level: int, dictionary: bytes) -> Iterator[tuple[Run, list[bytes]]]:
    """Each run with the frames of its planes. Plain runs are packed with the dictionary."""
    import zstandard

    shared = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    mine = threading.local()  # a compressor serves one thread

    def frames(read: tuple[Run, bytes]) -> tuple[Run, list[bytes]]:
        run, data = read
        if not hasattr(mine, "plain"):
            mine.plain = zstandard.ZstdCompressor(level=level, dict_data=shared)
            mine.planes = [zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**HUFFMAN))]
            if level >= THOROUGH:
                mine.planes.append(zstandard.ZstdCompressor(level=level))
        if run.kind == PLAIN:
            return run, [_shortest([mine.plain], data)]
        return run, [_shortest(mine.planes, plane) for plane in split(run.kind, data)]

    with source.open("rb") as file:
        yield from _in_order(frames, ((run, _read(file, run)) for run in runs))


def _read(file: Any, run: Run) -> bytes:
    file.seek(run.start)
    data: bytes = file.read(run.bytes)
    return data


def _shortest(compressors: Iterable[Any], plane: Any) -> bytes:
    """A frame as long as its plane is the plane itself: that is how unpacking knows."""
    frame: bytes = min((compressor.compress(plane) for compressor in compressors), key=len)
    return frame if len(frame) < len(plane) else bytes(plane)


def _frame_bytes(packed: Iterable[tuple[Run, list[bytes]]]) -> int:
    return sum(len(frame) for _, frames in packed for frame in frames)


def _in_order(work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Results in order, made by several threads (zstd and numpy let go of the interpreter lock), a few ahead."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _dictionary_that_pays(source: Path, runs: Sequence[Run], level: int, size: int) -> tuple[bytes, int]:
    """(a dictionary for the plain runs, or nothing; bytes that it saves less its own)."""
    plain = [run for run in runs if run.kind == PLAIN]
    dictionary = _train_dictionary(source, plain, size)
    saves = _frame_bytes(_packed(source, plain, level, b"")) - len(dictionary)
    saves -= _frame_bytes(_packed(source, plain, level, dictionary))
    return (dictionary if saves > 0 else b""), saves


def _train_dictionary(source: Path, runs: Sequence[Run], size: int) -> bytes:
    """Train on pieces spread over the runs; little data gives a smaller dictionary."""
    import zstandard

    piece, total = 4096, sum(run.bytes for run in runs)
    step = max(piece, total // max(8, min(2000, 100 * size // piece)))
    samples: list[bytes | bytearray | memoryview] = []
    wanted = done = 0
    with source.open("rb") as file:
        for run in runs:
            while wanted < done + run.bytes:
                at = wanted - done
                samples.append(_read(file, Run(PLAIN, run.start + at, min(piece, run.bytes - at))))
                wanted += step
            done += run.bytes
    try:
        if total < piece:  # zstd's trainer ends the process (a segmentation fault) on samples of a byte
            raise zstandard.ZstdError("too little to train on")
        return zstandard.train_dictionary(min(size, max(1024, total // 10)), samples).as_bytes()
    except zstandard.ZstdError:  # too little or too random data: raw content serves as a dictionary
        return b"".join(samples)[:size]


def unpack(package: Path, out: Path) -> None:
    """Unpack to ``out``, checking every size before memory or disk is taken, and the hash; nothing is left on failure.

    Raises:
        CogumiError: a missing file, a truncated or altered frame, sizes that do not add up or that no model
            has, too little room on the disk, another hash, a format that is not known.
    """
    import zstandard

    damaged = CogumiError(f"{package} is damaged: its contents are not what its manifest says", "download it again")
    manifest = read_manifest(package)
    packed = package / f"{manifest.file}.zst"
    if packed.name not in {entry.name for entry in package.iterdir()} or not packed.is_file():
        raise damaged  # a path to somewhere else is none of these names
    if packed.stat().st_size != sum(sum(chunk.frames) for chunk in manifest.chunks):
        raise damaged
    _require_room(manifest, packed.stat().st_size, out)
    dictionary = _read_dictionary(package, manifest)
    shared = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    mine = threading.local()  # a decompressor serves one thread

    def opened(kind: str, frame: bytes, size: int) -> bytes:
        if len(frame) == size and kind != ZSTD:
            return frame
        # zstandard trusts the frame's own size over max_output_size: look at it first
        if zstandard.get_frame_parameters(frame).content_size != size:
            raise damaged
        if not hasattr(mine, "decompressor"):
            mine.decompressor = zstandard.ZstdDecompressor(dict_data=shared)
        plane: bytes = mine.decompressor.decompress(frame, max_output_size=size)
        if len(plane) != size:
            raise damaged
        return plane

    def chunk_bytes(read: tuple[Chunk, list[bytes]]) -> Any:
        chunk, frames = read
        planes = [opened(chunk.kind, frame, size) for frame, size in zip(frames, chunk.planes, strict=True)]
        return planes[0] if chunk.kind in (PLAIN, ZSTD) else join(chunk.kind, planes, chunk.bytes)

    aside = out.with_name(f".{out.name}.part")
    digest = hashlib.sha256()
    try:
        with packed.open("rb") as file, aside.open("wb") as write:
            read = ((chunk, [file.read(size) for size in chunk.frames]) for chunk in manifest.chunks)
            for data in _in_order(chunk_bytes, read):
                digest.update(data)
                write.write(data)
        if digest.hexdigest() != manifest.sha256:
            raise damaged
        aside.replace(out)
    except zstandard.ZstdError:
        raise damaged from None
    finally:
        aside.unlink(missing_ok=True)


def read_manifest(package: Path) -> Manifest:
    """The manifest, its sizes consistent with each other.

    Raises:
        CogumiError: there is none, it is not one, or of a format that is not known.
    """
    try:
        path = package / MANIFEST
        if path.stat().st_size > LARGEST_MEMBER:
            raise ValueError("the manifest is too large")
        text = path.read_bytes()
        version = _Head.model_validate_json(text).format
        if version > 2:
            raise CogumiError(
                f"{package} is a package of format {version}", "this version reads 1 and 2: update cogumi"
            )
        manifest = (
            Manifest.model_validate_json(text) if version == 2 else _Manifest1.model_validate_json(text).as_format_2()
        )
        if sum(chunk.bytes for chunk in manifest.chunks) != manifest.bytes:
            raise ValueError("the chunks do not make up the file")
        for chunk in manifest.chunks:
            if not chunk.sound:
                raise ValueError(f"a chunk of {chunk.bytes} bytes of {chunk.kind[:40]!r} cannot be")
    except (OSError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CogumiError(f"{package} is not a package: {what}", "download it again") from error
    return manifest


def _require_room(manifest: Manifest, packed: int, out: Path) -> None:
    if manifest.bytes > BOMB_BYTES and manifest.bytes > BOMB_RATIO * packed:
        raise CogumiError(
            f"{manifest.file} is packed to {packed:,} bytes and says that it holds {manifest.bytes:,}: no model does",
            "do not trust where it came from",
        )
    free = shutil.disk_usage(out.parent).free
    if manifest.bytes > free:
        raise CogumiError(
            f"{manifest.file} takes {manifest.bytes:,} bytes and {out.parent} has {free:,} free",
            "make room, or unpack elsewhere",
        )


def _read_dictionary(package: Path, manifest: Manifest) -> bytes:
    if manifest.dictionary_sha256 is None:
        return b""
    path = package / DICTIONARY
    if not path.is_file() or path.stat().st_size > LARGEST_MEMBER or file_sha256(path) != manifest.dictionary_sha256:
        raise CogumiError(f"{package} is damaged: {DICTIONARY} is not what its manifest says", "download it again")
    return path.read_bytes()
