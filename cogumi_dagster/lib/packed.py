"""Files that may be packed (``.gz``, ``.zst``), as streams of bytes."""

import io
from pathlib import Path
from typing import IO, cast

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def open_packed(path: Path, mode: str = "rb") -> IO[bytes]:
    """The file's bytes, packed or not by its ending. ``mode``: ``rb`` or ``wb``.

    Reading raises OSError where a packed file was cut off. (zstandard's own reader would take it for a whole one.)
    """
    packed = COMPRESSIONS.get(path.suffix.lower())
    if packed is None:
        return cast(IO[bytes], path.open(mode))
    import pyarrow

    if "w" in mode:
        return cast(IO[bytes], io.BufferedWriter(pyarrow.output_stream(str(path), compression=packed), 1 << 20))
    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(str(path), compression=packed), 1 << 20))
