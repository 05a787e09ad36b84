"""Bytes of every artifact that a student becomes, from its shapes alone."""

import json
from collections.abc import Mapping
from math import prod
from typing import get_args

from cogumi_dagster.lib.compression.gguf_layout import Shape, gguf_name
from cogumi_dagster.lib.compression.predict import predict_bytes, stored_bytes
from cogumi_dagster.lib.planning.shapes import ModelShape
from cogumi_dagster.lib.profile import GgufType, LoraConfig

TYPES: tuple[str, ...] = get_args(GgufType)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
METADATA_BYTES = 3000
"""What a GGUF states besides its tokenizer: sizes, names, hashes and a chat template of about 2 kB."""


def checkpoint_bytes(shape: ModelShape, item_bytes: int = 2) -> int:
    """model.safetensors; 16 bits a weight unless told."""
    tensors = {name: ("BF16", size) for name, size in shape.tensors.items()}
    return item_bytes * shape.parameters + _safetensors_header(tensors)


def gguf_bytes(shape: ModelShape, type: str, *, imatrix: bool = False) -> int:
    """The exported file with tokenizer and metadata."""
    tensors = shape.gguf_tensors
    header = METADATA_BYTES + shape.tokenizer_bytes + _tensor_table(tensors)
    return predict_bytes(tensors, type, header, imatrix=imatrix)


def nf4_bytes(shape: ModelShape) -> int:
    """The weights as QLoRA holds them: NF4 in blocks of 64, their scales in 8 bits (double quantization), the rest
    in 16 bits. Two tables of 16 and 256 floats a matrix come with it (bitsandbytes)."""
    matrices = [prod(size) for size in shape.linear.values()]
    blocks = [-(-weights // 64) for weights in matrices]
    scales = sum(count + 4 * -(-count // 256) for count in blocks)
    tables = len(matrices) * 4 * (16 + 256 + 1)
    return sum(matrices) // 2 + scales + tables + 2 * (shape.parameters - sum(matrices))


def w4a16_bytes(shape: ModelShape, group_size: int, *, symmetric: bool) -> int:
    """model.safetensors in compressed-tensors' packed form: 4-bit groups of ``group_size`` columns."""
    tensors: dict[str, tuple[str, Shape]] = {}
    for name, size in shape.tensors.items():
        if name not in shape.linear:
            tensors[name] = ("BF16", size)
            continue
        rows, columns = size
        groups, part = -(-columns // group_size), name.removesuffix("weight")
        tensors[part + "weight_packed"] = ("I32", (rows, -(-columns // 8)))
        tensors[part + "weight_scale"] = ("BF16", (rows, groups))
        tensors[part + "weight_shape"] = ("I64", (2,))
        if not symmetric:
            tensors[part + "weight_zero_point"] = ("I32", (-(-rows // 8), groups))
    data = sum(_ITEM[kind] * prod(size) for kind, size in tensors.values())
    return data + _safetensors_header(tensors)


def adapter_tensors(shape: ModelShape, rank_attention: int, rank_feed_forward: int) -> dict[str, tuple[Shape, Shape]]:
    """Hugging Face name of each adapted matrix -> shapes of its LoRA A and B."""
    found: dict[str, tuple[Shape, Shape]] = {}
    for name, (rows, columns) in shape.linear.items():
        rank = rank_attention if name.split(".")[-2] in ATTENTION else rank_feed_forward
        found[name] = ((rank, columns), (rows, rank))
    return found


def adapter_parameters(shape: ModelShape, config: LoraConfig) -> int:
    """Weights that are trained."""
    pairs = adapter_tensors(shape, config.rank_attention, config.rank_feed_forward)
    return sum(prod(side) for pair in pairs.values() for side in pair)


def adapter_bytes(shape: ModelShape, config: LoraConfig) -> int:
    """adapter_model.safetensors, float32."""
    tensors: dict[str, tuple[str, Shape]] = {}
    for name, sides in adapter_tensors(shape, config.rank_attention, config.rank_feed_forward).items():
        for letter, side in zip("AB", sides, strict=True):
            tensors[f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight"] = ("F32", side)
    return 4 * adapter_parameters(shape, config) + _safetensors_header(tensors)


def gguf_adapter_bytes(shape: ModelShape, rank: int) -> int:
    """A modifier as a GGUF adapter, F16, before packing."""
    tensors = {
        f"{gguf_name(name)}.lora_{letter}": side
        for name, sides in adapter_tensors(shape, rank, rank).items()
        for letter, side in zip("ab", sides, strict=True)
    }
    return _CONTRACT_BYTES + _tensor_table(tensors) + sum(stored_bytes(side, "F16") for side in tensors.values())


_CONTRACT_BYTES = 500
"""Of an adapter's metadata: architecture, alpha and three hashes."""
_ITEM = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}


def _safetensors_header(tensors: Mapping[str, tuple[str, Shape]]) -> int:
    """The JSON in front of the data, as safetensors writes it, padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, size) in tensors.items():
        end = offset + _ITEM[kind] * prod(size)
        header[name] = {"dtype": kind, "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8


def _tensor_table(tensors: Mapping[str, Shape]) -> int:
    """What a GGUF states of its tensors: name, dimensions, type and offset."""
    return sum(8 + len(name) + 4 + 8 * len(size) + 4 + 8 for name, size in tensors.items())
