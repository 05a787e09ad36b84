"""Tensors of GGUF files laid out for an entropy coder: the fields of their blocks as planes, exactly invertible.

A block of a quantized tensor mixes what is random (the lower byte of a scale) with what is not, cuts a weight's code
into low and high bits that know of each other, and, in types with a minimum, gives a weight of zero another code in
each block. zstd sees bytes only. Here each field becomes a plane of its own, the bits of a code come together, and
codes are counted from the code of zero, which the block's scale and minimum tell: a pruned weight is 0 everywhere.

Block layouts are those of ggml-common.h; gguf-py's dequantization is the tests' oracle.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[Any]]
"""Of uint8."""
Fields = Mapping[str, Bytes]


@dataclass(frozen=True)
class Codes:
    """A field that holds ``bits`` of every weight's code; weights that share a byte are ``width`` weights apart."""

    field: str
    bits: int
    width: int


@dataclass(frozen=True)
class Layout:
    """A block: its fields in order with their bytes, which of them hold codes, and how to find the code of zero."""

    fields: Mapping[str, int]
    low: Codes
    high: Codes | None = None
    zero: Callable[[Fields, int], Bytes] | int = 0
    """The code that stands for a weight of zero, or how to find it: (scales, largest code) -> (blocks, groups)."""

    @property
    def bytes(self) -> int:
        return sum(self.fields.values())

    @property
    def stored(self) -> Codes:
        """How whole codes are stored: as they were, or joined, as many in a byte as fit."""
        if self.high is None:
            return self.low
        return Codes("codes", self.low.bits + self.high.bits, self.high.width)

    @property
    def planes(self) -> dict[str, int]:
        """Name of each plane -> its bytes for each block."""
        weights = self.fields[self.low.field] * (8 // self.low.bits)
        found = {ZEROS: weights // 8} if self.stored.bits > 4 else {}
        found["codes"] = weights // (8 // self.stored.bits)
        for name, size in self.fields.items():
            if name in _HALVES:
                found |= {f"{name}.low": 1, f"{name}.high": 1}
            elif name == "scales" and size == 12:
                found |= {"scales": 8, "mins": 8} if self.has_mins else {"scales": 16}
            elif not self._holds_codes(name):
                found[name] = size
        return found

    @property
    def has_mins(self) -> bool:
        return "dmin" in self.fields

    def _holds_codes(self, name: str) -> bool:
        return name == self.low.field or (self.high is not None and name == self.high.field)


ZEROS = "zeros"
"""A plane of one bit for each weight: is it zero? Zeros come last in the other planes, where they cost nothing."""
RARE = 0.15
"""A share of zeros below which they stay in their places, and the plane is empty."""
_HALVES = ("d", "m", "dmin")
"""Fields that are one float16: its upper byte (sign, exponent, two bits) has few values, its lower byte has all."""


def split(kind: str, data: bytes) -> list[Bytes]:
    """The planes of a run of whole blocks, in the order of ``plane_names``; every plane is contiguous."""
    if kind in FLOATS:
        return _split_floats(np.frombuffer(data, np.uint8).reshape(-1, FLOATS[kind]))
    layout = LAYOUTS[kind]
    fields = _cut(np.frombuffer(data, np.uint8).reshape(-1, layout.bytes), layout.fields)
    scales = {name: values for name, values in fields.items() if not layout._holds_codes(name)}
    if "scales" in scales and layout.fields["scales"] == 12:
        scales |= _open_mins(scales["scales"]) if layout.has_mins else {"scales": _open_scales(scales["scales"])}
    codes = fields[layout.low.field]
    if layout.high or layout.zero:
        codes = _spread(codes, layout.low)
        if layout.high:
            codes |= _spread(fields[layout.high.field], layout.high) << layout.low.bits
        codes = _pack(_shift(codes, layout, scales, -1), layout.stored)
    planes = {"codes": codes}
    if ZEROS in layout.planes:
        planes[ZEROS], planes["codes"] = _zeros_last([codes.reshape(-1)], codes.reshape(-1) == 0)
    for name, values in scales.items():
        planes |= {f"{name}.low": values[:, 0], f"{name}.high": values[:, 1]} if name in _HALVES else {name: values}
    return [np.ascontiguousarray(planes[name]).reshape(-1) for name in layout.planes]


def join(kind: str, planes: Sequence[bytes], length: int) -> Bytes:
    """The inverse of ``split``: ``length`` bytes from planes of the sizes that ``plane_bytes`` gives."""
    flat = [np.frombuffer(plane, np.uint8) for plane in planes]
    if kind in FLOATS:
        return _join_floats(flat)
    layout = LAYOUTS[kind]
    blocks = length // layout.bytes
    if ZEROS in layout.planes:
        zeros, moved, *flat = flat
        flat = [zeros, *_zeros_back(zeros, [moved]), *flat]
    named = {name: plane.reshape(blocks, -1) for name, plane in zip(layout.planes, flat, strict=True)}
    named.pop(ZEROS, None)
    codes = named.pop("codes")
    scales: dict[str, Bytes] = {}
    for name, values in named.items():
        if not name.endswith(".low"):
            half = name.removesuffix(".high")
            scales[half] = values if half == name else np.concatenate([named[f"{half}.low"], values], axis=1)
    fields = dict(scales)
    if "scales" in scales and layout.fields["scales"] == 12:
        fields["scales"] = _shut_mins(scales) if layout.has_mins else _shut_scales(scales["scales"])
    if layout.high or layout.zero:
        whole = _shift(_spread(codes, layout.stored), layout, scales, +1)
        fields[layout.low.field] = _pack(whole & _most(layout.low.bits), layout.low)
        if layout.high:
            fields[layout.high.field] = _pack(whole >> layout.low.bits, layout.high)
    else:
        fields[layout.low.field] = codes
    return np.concatenate([fields[name] for name in layout.fields], axis=1).reshape(-1)


def plane_names(kind: str) -> list[str]:
    if kind in FLOATS:
        return [ZEROS, *(f"byte {n}" for n in range(FLOATS[kind])[::-1])]
    return list(LAYOUTS[kind].planes)


def plane_bytes(kind: str, length: int) -> list[int]:
    """Bytes of each plane of ``length`` bytes of that type."""
    if kind in FLOATS:
        count = length // FLOATS[kind]
        return [-(-count // 8), *[count] * FLOATS[kind]]
    return [size * (length // LAYOUTS[kind].bytes) for size in LAYOUTS[kind].planes.values()]


def block_bytes(kind: str) -> int | None:
    """Bytes of a block, or None for a type that has no layout here and is stored as it is."""
    return FLOATS[kind] if kind in FLOATS else LAYOUTS[kind].bytes if kind in LAYOUTS else None


def _cut(rows: Bytes, fields: Mapping[str, int]) -> dict[str, Bytes]:
    found, at = {}, 0
    for name, size in fields.items():
        found[name] = rows[:, at : at + size]
        at += size
    return found


def _most(bits: int) -> np.uint8:
    return np.uint8((1 << bits) - 1)


def _spread(values: Bytes, codes: Codes) -> Bytes:
    """(blocks, bytes) -> (blocks, weights): one code in each byte, in the order of the weights."""
    if codes.bits == codes.width == 1:
        return np.unpackbits(values, axis=1, bitorder="little")
    parts = 8 // codes.bits
    lanes = values.reshape(len(values), -1, 1, codes.width)
    out = np.empty((len(values), lanes.shape[1], parts, codes.width), np.uint8)
    for part in range(parts):
        np.bitwise_and(lanes[:, :, 0] >> np.uint8(codes.bits * part), _most(codes.bits), out=out[:, :, part])
    return out.reshape(len(values), -1)


def _pack(weights: Bytes, codes: Codes) -> Bytes:
    """The inverse of ``_spread``."""
    if codes.bits == codes.width == 1:
        return np.packbits(weights, axis=1, bitorder="little")
    parts = 8 // codes.bits
    lanes = weights.reshape(len(weights), -1, parts, codes.width)
    out = lanes[:, :, 0].copy()
    for part in range(1, parts):
        out |= lanes[:, :, part] << np.uint8(codes.bits * part)
    return out.reshape(len(weights), -1)


def _shift(codes: Bytes, layout: Layout, scales: Fields, sign: int) -> Bytes:
    """Count the codes from the code of zero (sign -1), or from 0 again (+1), modulo their number."""
    most = _most(layout.stored.bits)
    if not callable(layout.zero):
        return codes + np.uint8(sign * layout.zero & int(most)) & most
    with np.errstate(all="ignore"):  # a file may hold any scales
        zero = layout.zero(scales, int(most))[:, :, None]
    groups = codes.reshape(len(codes), zero.shape[1], -1)
    moved = groups + zero if sign > 0 else groups - zero  # bytes wrap, as codes do
    return (moved & most).reshape(codes.shape)


def _half(field: Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(field).view("<f2").astype(np.float32)


def _nearest(offset: Any, step: Any, most: int) -> Bytes:
    """The code nearest to zero of weights ``step * code - offset``. IEEE division: the same on every machine."""
    return np.clip(np.nan_to_num(np.rint(offset / step), nan=0.0), 0, most).astype(np.uint8)


def _zero_of_block(scales: Fields, most: int) -> Bytes:
    return _nearest(-_half(scales["m"]), _half(scales["d"]), most)


def _zero_of_groups(scales: Fields, most: int) -> Bytes:
    """Q4_K, Q5_K: eight groups with a scale and a minimum each."""
    return _nearest(_half(scales["dmin"]) * scales["mins"], _half(scales["d"]) * scales["scales"], most)


def _zero_of_nibbles(scales: Fields, most: int) -> Bytes:
    """Q2_K: sixteen groups, scale and minimum in one byte."""
    both = scales["scales"]
    return _nearest(_half(scales["dmin"]) * (both >> 4), _half(scales["d"]) * (both & 15), most)


def _open_scales(field: Bytes) -> Bytes:
    """Q3_K: 16 scales of six bits, four in the first eight bytes and two in the last four."""
    return _spread(field[:, :8], Codes("", 4, 8)) | _spread(field[:, 8:], Codes("", 2, 4)) << 4


def _shut_scales(scales: Bytes) -> Bytes:
    return np.concatenate([_pack(scales & 15, Codes("", 4, 8)), _pack(scales >> 4 & 3, Codes("", 2, 4))], axis=1)


def _open_mins(field: Bytes) -> dict[str, Bytes]:
    """Q4_K, Q5_K: eight scales and eight minimums of six bits, the first four of each whole in a byte."""
    top, last = field[:, :8], _spread(field[:, 8:], Codes("", 4, 4))
    both = np.concatenate([top & 63, last | (top >> 6) << 4], axis=1).reshape(-1, 2, 2, 4)
    return {"scales": both[:, :, 0].reshape(-1, 8), "mins": both[:, :, 1].reshape(-1, 8)}


def _shut_mins(scales: Fields) -> Bytes:
    both = np.stack([scales[name].reshape(-1, 2, 4) for name in ("scales", "mins")], axis=2).reshape(-1, 2, 8)
    first, second = both[:, 0], both[:, 1]
    return np.concatenate([first & 63 | (second >> 4) << 6, _pack(second & 15, Codes("", 4, 4))], axis=1)


def _split_floats(rows: Bytes) -> list[Bytes]:
    """A bit for each zero, then the bytes of the floats, the most significant first."""
    columns = [np.ascontiguousarray(column) for column in rows.T[::-1]]
    return _zeros_last(columns, np.logical_and.reduce([column == 0 for column in columns]))


def _join_floats(planes: Sequence[Bytes]) -> Bytes:
    return np.stack(_zeros_back(planes[0], planes[1:])[::-1], axis=1).reshape(-1)


def _zeros_last(planes: Sequence[Bytes], zero: Any) -> list[Bytes]:
    """``zero`` says of each weight whether all planes are 0 there."""
    if np.count_nonzero(zero) < RARE * len(zero):
        return [np.zeros(-(-len(zero) // 8), np.uint8), *planes]
    others = np.flatnonzero(~zero)  # indices: five times as fast as a mask
    moved = [np.zeros_like(plane) for plane in planes]
    for out, plane in zip(moved, planes, strict=True):
        out[: len(others)] = plane[others]
    return [np.packbits(zero), *moved]


def _zeros_back(zeros: Bytes, planes: Sequence[Bytes]) -> list[Bytes]:
    if not zeros.any():
        return list(planes)
    others = np.flatnonzero(np.unpackbits(zeros, count=len(planes[0])) == 0)
    back = [np.zeros_like(plane) for plane in planes]
    for out, plane in zip(back, planes, strict=True):
        out[others] = plane[: len(others)]
    return back


FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
LAYOUTS = {
    "Q8_0": Layout({"d": 2, "qs": 32}, Codes("qs", 8, 32)),
    "Q4_0": Layout({"d": 2, "qs": 16}, Codes("qs", 4, 16)),
    "IQ4_NL": Layout({"d": 2, "qs": 16}, Codes("qs", 4, 16)),
    "Q4_1": Layout({"d": 2, "m": 2, "qs": 16}, Codes("qs", 4, 16), zero=_zero_of_block),
    "Q5_0": Layout({"d": 2, "qh": 4, "qs": 16}, Codes("qs", 4, 16), Codes("qh", 1, 1), 16),
    "Q5_1": Layout({"d": 2, "m": 2, "qh": 4, "qs": 16}, Codes("qs", 4, 16), Codes("qh", 1, 1), _zero_of_block),
    "Q2_K": Layout({"scales": 16, "qs": 64, "d": 2, "dmin": 2}, Codes("qs", 2, 32), zero=_zero_of_nibbles),
    "Q3_K": Layout({"hmask": 32, "qs": 64, "scales": 12, "d": 2}, Codes("qs", 2, 32), Codes("hmask", 1, 32), 4),
    "Q4_K": Layout({"d": 2, "dmin": 2, "scales": 12, "qs": 128}, Codes("qs", 4, 32), zero=_zero_of_groups),
    "Q5_K": Layout(
        {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128}, Codes("qs", 4, 32), Codes("qh", 1, 32), _zero_of_groups
    ),
    "Q6_K": Layout({"ql": 128, "qh": 64, "scales": 16, "d": 2}, Codes("ql", 4, 64), Codes("qh", 2, 32), 32),
    "IQ4_XS": Layout({"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128}, Codes("qs", 4, 16)),
}  # fmt: skip
