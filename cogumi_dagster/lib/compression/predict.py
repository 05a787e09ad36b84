"""Predict the bytes of a quantized GGUF from shapes alone, by llama.cpp's own rules.

The rules are those of ``llama_tensor_get_type`` (llama.cpp, src/llama-quant.cpp) for dense Llama, Qwen2 and Qwen3
models; ``compression_frontier`` checks them against real files.
"""

from collections.abc import Mapping
from math import prod

Shape = tuple[int, ...]

BLOCK = {
    # tensor type: (weights in a block, bytes of a block), from ggml's block structs
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22),
    "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18), "Q6_K": (256, 210), "Q5_K": (256, 176),
    "Q4_K": (256, 144), "Q3_K": (256, 110), "Q2_K": (256, 84),
}  # fmt: skip

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp stores instead where a row is no multiple of 256; F16 where it is none of 32 either."""

DEFAULT = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K"}
ALIGNMENT = 32


def predict_bytes(shapes: Mapping[str, Shape], type: str, header_bytes: int, *, imatrix: bool = False) -> int:
    """Bytes of the GGUF: ``shapes`` maps GGUF names to (rows, columns), ``header_bytes`` is all before the tensors."""
    kinds = tensor_types(shapes, type, imatrix=imatrix)
    return header_bytes + sum(stored_bytes(shapes[name], kind) for name, kind in kinds.items())


def stored_bytes(shape: Shape, kind: str) -> int:
    """Bytes of one tensor in a file, with the padding to the next."""
    block, size = BLOCK[kind]
    return -(-(prod(shape) // block * size) // ALIGNMENT) * ALIGNMENT


def tensor_types(shapes: Mapping[str, Shape], type: str, *, imatrix: bool = False) -> dict[str, str]:
    """The tensor type that llama.cpp chooses for each tensor; biases and norms stay in F32.

    With an importance matrix it chooses otherwise for the first layers of Q4_0, Q5_0 and IQ4_NL.
    """
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=0)
    return {name: _type_of(name, shape, type, layers, shapes, imatrix) for name, shape in shapes.items()}


def _type_of(name: str, shape: Shape, type: str, layers: int, shapes: Mapping[str, Shape], imatrix: bool) -> str:
    if len(shape) == 1:
        return "F32"
    if type in ("F16", "BF16"):
        return type
    columns, kind = shape[-1], DEFAULT.get(type, type)
    if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
        kind = "Q8_0" if kind == "Q8_0" or columns % 256 else "Q6_K"
    elif name.startswith("blk."):
        kind = _layer_type(name, kind, type, layers, shapes, imatrix)
    if columns % BLOCK[kind][0]:
        kind = FALLBACK.get(kind, kind)
    return "F16" if columns % BLOCK[kind][0] else kind


def _layer_type(name: str, kind: str, type: str, layers: int, shapes: Mapping[str, Shape], imatrix: bool) -> str:
    _, number, module, _ = name.split(".")
    layer = int(number)
    grouped = shapes[f"blk.{layer}.attn_q.weight"][0] // shapes[f"blk.{layer}.attn_k.weight"][0]
    more = _use_more_bits(layer, layers)
    if module == "attn_v":
        kind = _value_type(kind, type, layer, grouped, more)
        # what llama.cpp takes for a 70B model shares each value matrix among eight heads: it can afford more bits
        return "Q5_K" if layers == 80 and grouped > 1 and kind in ("Q3_K", "Q4_K") else kind
    if module == "ffn_down":
        if type == "Q2_K":
            return "Q3_K"
        if type == "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        if type in ("Q4_0", "Q5_0") and layer < layers // 8 and imatrix:
            return "Q4_1" if type == "Q4_0" else "Q5_1"
        if type == "IQ4_NL" and layer < layers // 8 and not imatrix:
            return "Q5_K"
        return "Q6_K" if type in ("Q4_K_M", "Q5_K_M") and more else kind
    if module == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(type, kind)
    return kind


def _value_type(kind: str, type: str, layer: int, grouped: int, more: bool) -> str:
    if type == "Q2_K":
        return "Q4_K" if grouped >= 4 else "Q3_K"
    if type == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if type == "IQ4_NL" and grouped >= 4:
        return "Q5_K"
    return "Q6_K" if type in ("Q4_K_M", "Q5_K_M") and more else kind


def _use_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
