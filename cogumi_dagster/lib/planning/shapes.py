"""The shapes of a student: from its published or its own config.json, without a weight or the network."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import yaml

from cogumi_dagster.lib.compression.gguf_layout import ARCHITECTURES, ROPE_FACTORS, Shape, gguf_name, tensor_shapes
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import StudentConfig

STUDENTS = Path(__file__).resolve().parents[3] / "resources" / "students.yaml"
BYTES_A_TOKEN = 45
"""Of a vocabulary that students.yaml does not know, in a GGUF: between SmolLM2's 34 and Llama 3's 61."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense Llama, Qwen2 or Qwen3 model, called as in transformers' config.json."""

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_factors: bool = False
    """Llama 3's rope scaling: a GGUF holds its factors as one more tensor."""
    pretraining_tokens: float | None = None
    """None where nobody published it."""

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """Hugging Face name -> shape of every tensor of a checkpoint."""
        return tensor_shapes(self)

    @cached_property
    def gguf_tensors(self) -> dict[str, Shape]:
        """GGUF name -> shape of every tensor of the exported file."""
        shapes = {gguf_name(name): shape for name, shape in self.tensors.items()}
        return shapes | ({ROPE_FACTORS: (self.head_dim // 2,)} if self.rope_factors else {})

    @cached_property
    def linear(self) -> dict[str, Shape]:
        """The matrices of the layers: what is pruned, quantized to 4 bits and adapted."""
        return {n: shape for n, shape in self.tensors.items() if n.startswith("model.layers.") and len(shape) == 2}

    @cached_property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors.values())

    @cached_property
    def linear_parameters(self) -> int:
        return sum(prod(shape) for shape in self.linear.values())

    @property
    def tokenizer_bytes(self) -> int:
        """Bytes of the tokenizer in a GGUF."""
        return _tokenizers().get(self.vocab_size, BYTES_A_TOKEN * self.vocab_size)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in 16 bits, all layers."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def find_student(wanted: str) -> ModelShape:
    """A student by name (``Qwen3-0.6B``, ``meta-llama/Llama-3.2-1B-Instruct``) or by checkpoint folder.

    Raises:
        CogumiError: neither a known name nor a folder with a config.json that can be planned for.
    """
    folder = Path(wanted)
    if (folder / "config.json").is_file():
        return read_folder(folder)
    if folder.is_dir():
        raise CogumiError(f"{folder} is not a checkpoint: it has no config.json", "give a Hugging Face folder")
    known = {_plain(name): shape for name, shape in presets().items()}
    if _plain(wanted) in known:
        return known[_plain(wanted)]
    close = nearest(wanted.rpartition("/")[2], presets())
    raise CogumiError(
        f"there is no student {wanted!r} to plan for", f"name a known one ({close}), or give a checkpoint's folder"
    )


def student_of(config: StudentConfig) -> ModelShape:
    """The shapes of a profile's student, before it is imported. Raises CogumiError where they are not known."""
    kind, _, where = config.source.partition(":")
    if kind == "random":
        layers, _, hidden = where.partition("x")
        return _random(config.name, int(layers), int(hidden))
    return find_student(where if kind in ("dir", "hub") else config.name)


def read_folder(folder: Path) -> ModelShape:
    """The shapes that a checkpoint's config.json states; a known student is recognized by them."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CogumiError(f"{path} is not JSON: {error}", "save the checkpoint again") from None
    shape = shape_of_config(folder.resolve().name, config, where=str(path))
    same = (known for known in presets().values() if known.tensors == shape.tensors)
    twin = next(same, None)
    return replace(shape, pretraining_tokens=twin.pretraining_tokens) if twin else shape


def shape_of_config(name: str, config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shapes in a config.json.

    Raises:
        CogumiError: another architecture, a size that is missing or impossible; ``where`` names the file.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CogumiError(f"{where}: model_type {kind!r} cannot be planned for", f"dense models of these: {known}")
    heads = _size(config, "num_attention_heads", where)
    hidden = _size(config, "hidden_size", where)
    kv_heads = _size(config, "num_key_value_heads", where) if config.get("num_key_value_heads") else heads
    default_head = 128 if kind == "qwen3" else hidden // heads
    head_dim = _size(config, "head_dim", where) if config.get("head_dim") else default_head
    if heads % kv_heads or head_dim % 2 or (kind != "qwen3" and not config.get("head_dim") and hidden % heads):
        raise CogumiError(
            f"{where}: {heads} heads of {head_dim} with {kv_heads} key-value heads and hidden_size {hidden} do not fit",
            "save the checkpoint again",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return ModelShape(
        name=name,
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", where),
        num_hidden_layers=_size(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size", where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope_factors=rope.get("rope_type", rope.get("type")) == "llama3",
    )


@cache
def presets() -> dict[str, ModelShape]:
    """The students of resources/students.yaml, smallest first."""
    found = {}
    for name, entry in _students()["students"].items():
        shape = shape_of_config(name, entry["config"], where=f"{STUDENTS.name}: {name}")
        found[name] = replace(shape, pretraining_tokens=1e12 * entry["pretraining_trillions"])
    return dict(sorted(found.items(), key=lambda item: item[1].parameters))


@cache
def _students() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(STUDENTS.read_text(encoding="utf-8"))
    return data


def _tokenizers() -> dict[int, int]:
    found: dict[int, int] = _students()["tokenizer_bytes"]
    return found


def _random(name: str, layers: int, hidden: int) -> ModelShape:
    """The Llama that ``import_student`` draws for ``random:LxH``."""
    return ModelShape(
        name=name,
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        vocab_size=presets()["SmolLM2-135M"].vocab_size,
        tie_word_embeddings=True,
    )


def _plain(name: str) -> str:
    """``meta-llama/Meta-Llama-3.1-8B-Instruct`` -> ``llama-3.1-8b``."""
    return name.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-instruct").removesuffix("-base")


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CogumiError(
            f"{where}: {key} is {value!r}", "it must be a whole number above 0; save the checkpoint again"
        )
    return value
