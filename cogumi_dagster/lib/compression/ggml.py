"""ggml's own quantizers, the ones that llama.cpp writes files with: rows of floats to blocks of bytes, and back."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from cogumi_dagster.lib.errors import CogumiError

Array = np.ndarray[Any, Any]

CHUNK_WEIGHTS = 32 * 512
"""Weights that one call quantizes, at least (llama.cpp's ``min_chunk_size``)."""


@lru_cache(1)
def _library() -> ctypes.CDLL:
    from llama_cpp._ggml import libggml

    floats = ctypes.POINTER(ctypes.c_float)
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    libggml.ggml_type_name.restype = ctypes.c_char_p
    libggml.ggml_type_name.argtypes = [ctypes.c_int]
    return libggml  # type: ignore[no-any-return]


def type_id(kind: str) -> int:
    """The number of a tensor type in GGUF files: ``Q4_0`` is 2."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[kind])


def block_of(kind: str) -> tuple[int, int]:
    """(weights in a block, bytes of a block) of a tensor type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(weights), int(size)


def fits(kind: str, columns: int) -> bool:
    """Whether rows of so many columns are whole blocks."""
    return columns % block_of(kind)[0] == 0


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row.

    Raises:
        CogumiError: the row is not a whole number of blocks.
    """
    weights, size = block_of(kind)
    if columns % weights:
        raise CogumiError(
            f"rows of {columns} columns cannot be stored as {kind}, whose blocks hold {weights} weights",
            "choose a type whose block divides the columns",
        )
    return columns // weights * size


def quantize_rows(values: Array, kind: str, importance: Array | None = None) -> Array:
    """(rows, columns) floats -> (rows, bytes of a row) uint8, as llama.cpp would store them, in one thread a core.

    ``importance`` (columns,) weighs the squared error of each column (a mean squared input); left out, ggml's rule
    for no importance matrix applies.

    Raises:
        CogumiError: a row that is not a whole number of blocks, or an importance of another length.
    """
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    if importance is not None and importance.shape != (columns,):
        raise CogumiError(
            f"an importance matrix of shape {importance.shape} for rows of {columns} columns",
            "it was made for another model: make it again",
        )
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "F16":
        return values.astype(np.float16).view(np.uint8)
    out = np.empty((rows, row_bytes(kind, columns)), np.uint8)
    weights = np.ascontiguousarray(importance, np.float32) if importance is not None else None
    library, number, floats = _library(), type_id(kind), ctypes.POINTER(ctypes.c_float)

    def quantize(start: int) -> None:
        library.ggml_quantize_chunk(
            number,
            values.ctypes.data_as(floats),
            out.ctypes.data_as(ctypes.c_void_p),
            start * columns,
            min(step, rows - start),
            columns,
            weights.ctypes.data_as(floats) if weights is not None else None,
        )

    step = max(1, CHUNK_WEIGHTS // columns)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(quantize, range(0, rows, step)))
    return out


def dequantize_rows(data: Array, kind: str, columns: int) -> Array:
    """The inverse: (rows, bytes of a row) uint8 -> (rows, columns) float32."""
    if kind == "F32":
        return data.view(np.float32)
    if kind == "F16":
        return data.view(np.float16).astype(np.float32)
    library = _library()
    function = getattr(library, f"dequantize_row_{library.ggml_type_name(type_id(kind)).decode()}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = len(data)
    data, out = np.ascontiguousarray(data), np.empty((rows, columns), np.float32)

    def dequantize(start: int) -> None:
        count = min(step, rows - start)
        function(data[start:].ctypes.data, out[start:].ctypes.data, count * columns)

    step = max(1, CHUNK_WEIGHTS // columns)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(dequantize, range(0, rows, step)))
    return out
