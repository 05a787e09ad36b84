"""zstd packages: a trained dictionary, a manifest with SHA-256, and unpacking that trusts nothing."""

import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.errors import CogumiError

CHUNK = 1 << 20


@dataclass(frozen=True)
class PackageReport:
    """Bytes around zstd; ``bit_identical`` was found by unpacking again and hashing."""

    file: str
    bytes_before: int
    bytes_after: int
    ratio: float
    ratio_without_dictionary: float
    level: int
    dictionary_bytes: int
    bit_identical: bool


def pack(
    source: Path, out: Path, *, level: int, dictionary_kb: int, extra: dict[str, Any] | None = None
) -> PackageReport:
    """Write ``<name>.zst``, ``dictionary.zstd`` and ``package.json`` to the folder ``out``, then unpack and compare.

    The dictionary is shared by all frames of a package; each frame is one chunk of 1 MiB, so that
    the memory of unpacking is bounded.

    Raises:
        CogumiError: the file is empty.
    """
    if source.stat().st_size == 0:
        raise CogumiError(f"{source} is empty: there is nothing to pack", "write it again")
    out.mkdir(parents=True, exist_ok=True)
    dictionary = _train_dictionary(source, dictionary_kb * 1024)
    (out / "dictionary.zstd").write_bytes(dictionary.as_bytes())
    packed = out / f"{source.name}.zst"
    frames = []
    with packed.open("wb") as write:
        for frame in _frames(_chunks(source), level, dictionary):
            frames.append(len(frame))
            write.write(frame)
    manifest = {
        "file": source.name,
        "bytes": source.stat().st_size,
        "sha256": file_sha256(source),
        "chunk": CHUNK,
        "frames": frames,
        "dictionary_sha256": file_sha256(out / "dictionary.zstd"),
        **(extra or {}),
    }
    (out / "package.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    again = out / ".round-trip"
    try:
        unpack(out, again)
        identical = file_sha256(again) == manifest["sha256"]
    finally:
        again.unlink(missing_ok=True)
    before, after = source.stat().st_size, packed.stat().st_size
    return PackageReport(
        file=packed.name,
        bytes_before=before,
        bytes_after=after,
        ratio=after / before,
        ratio_without_dictionary=zstd_ratio(source, level),
        level=level,
        dictionary_bytes=(out / "dictionary.zstd").stat().st_size,
        bit_identical=identical,
    )


def zstd_ratio(source: Path, level: int) -> float:
    """Compressed over plain bytes, chunk by chunk and without a dictionary."""
    return sum(map(len, _frames(_chunks(source), level, None))) / max(1, source.stat().st_size)


def _chunks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as read:
        while chunk := read.read(CHUNK):
            yield chunk


def _frames(chunks: Iterable[bytes], level: int, dictionary: Any) -> Iterator[bytes]:
    """Compressed frames in order, on all cores (zstd lets go of the interpreter lock)."""
    import zstandard

    local = threading.local()

    def compress(chunk: bytes) -> bytes:
        if not hasattr(local, "compressor"):  # a compressor serves one thread
            local.compressor = zstandard.ZstdCompressor(level=level, dict_data=dictionary, write_checksum=True)
        frame: bytes = local.compressor.compress(chunk)
        return frame

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[bytes]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(compress, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _train_dictionary(source: Path, size: int) -> Any:
    """Train on pieces spread over the file; small files give a smaller dictionary."""
    import zstandard

    total = source.stat().st_size
    piece = 4096
    count = max(8, min(2000, 100 * size // piece, total // piece))
    with source.open("rb") as read:
        samples: list[bytes | bytearray | memoryview] = []
        for index in range(count):
            read.seek(index * max(1, total - piece) // count)
            samples.append(read.read(piece))
    try:
        if total < piece:  # zstd's trainer ends the process (a segmentation fault) on samples of a byte
            raise zstandard.ZstdError("too little to train on")
        return zstandard.train_dictionary(min(size, max(1024, total // 10)), samples)
    except zstandard.ZstdError:  # too little or too random data: raw content serves as a dictionary
        return zstandard.ZstdCompressionDict(b"".join(samples)[:size], dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def unpack(package: Path, out: Path) -> None:
    """Unpack to ``out``, checking every length and the hash; nothing is left behind on failure.

    Raises:
        CogumiError: a missing file, a truncated or altered frame, more bytes than declared, another hash.
    """
    import zstandard

    try:
        manifest = json.loads((package / "package.json").read_text())
        dictionary = (package / "dictionary.zstd").read_bytes()
        name, size, frames = str(manifest["file"]), int(manifest["bytes"]), [int(n) for n in manifest["frames"]]
        sha256, dictionary_sha256 = manifest["sha256"], manifest["dictionary_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CogumiError(f"{package} is not a package: {error}", "download it again") from error
    damaged = CogumiError(f"{package} is damaged: its contents are not what its manifest says", "download it again")
    if Path(name).name != name or file_sha256(package / "dictionary.zstd") != dictionary_sha256:
        raise damaged
    decompressor = zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(dictionary))
    packed = package / f"{name}.zst"
    if not packed.is_file() or packed.stat().st_size != sum(frames):
        raise damaged
    aside = out.with_name(f".{out.name}.part")
    try:
        written = 0
        with packed.open("rb") as read, aside.open("wb") as write:
            for length in frames:
                frame = read.read(length)
                expected = min(CHUNK, size - written)
                # zstandard trusts the frame's own size over max_output_size: look at it first
                if zstandard.get_frame_parameters(frame).content_size != expected:
                    raise damaged
                chunk = decompressor.decompress(frame, max_output_size=expected)
                if len(chunk) != expected:
                    raise damaged
                written += len(chunk)
                write.write(chunk)
        if written != size or file_sha256(aside) != sha256:
            raise damaged
        aside.replace(out)
    except zstandard.ZstdError:
        raise damaged from None
    finally:
        aside.unlink(missing_ok=True)
