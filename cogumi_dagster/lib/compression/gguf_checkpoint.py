"""A Hugging Face checkpoint as the source of an export: checked whole by its headers, then read tensor by tensor."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_layout import ARCHITECTURES, Shape, tensor_shapes
from cogumi_dagster.lib.compression.gguf_rope import refuse_unknown_rope
from cogumi_dagster.lib.errors import CogumiError

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
DTYPES = ("BF16", "F16", "F32")
"""safetensors' names of the storage types that are exported; anything else is a quantized checkpoint."""
_SAVE = "save the checkpoint again, whole, with save_pretrained"


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: every tensor that its configuration asks for is there, in its shape."""

    folder: Path
    config: Any
    """transformers' configuration."""
    shapes: dict[str, Shape]
    """Hugging Face name -> shape, in the order of the network."""
    dtype: str
    """Storage type of the embeddings: BF16, F16 or F32."""
    files: dict[str, Path]
    """Hugging Face name -> the safetensors file that holds it."""

    def tensor(self, name: str) -> Any:
        """One torch tensor."""
        with _opened(self.files[name], "pread") as file:
            return file.get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """(name, torch tensor), one at a time. Each is read into memory of its own, never mapped."""
        from contextlib import ExitStack

        with ExitStack() as stack:
            opened = {path: stack.enter_context(_opened(path, "pread")) for path in set(self.files.values())}
            for name in self.shapes:
                yield name, opened[self.files[name]].get_tensor(name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read configuration and headers, no weights.

    Raises:
        CogumiError: no checkpoint, another architecture, quantized or cut-off weights, a missing or surplus tensor,
            a shape that is not the configuration's.
    """
    config = read_config(folder)
    shapes = tensor_shapes(config)
    files, found, dtypes = _headers(folder)
    missing = [name for name in shapes if name not in files]
    if missing:
        raise CogumiError(f"{folder} lacks {len(missing)} tensor(s), {missing[0]} first", _SAVE)
    quantized = [name for name in shapes if dtypes[name] not in DTYPES]
    if quantized:
        raise CogumiError(
            f"{folder}: {quantized[0]} is stored as {dtypes[quantized[0]]}: the checkpoint is quantized",
            "export its 16-bit parent instead",
        )
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    surplus = [name for name in files.keys() - shapes.keys() - ignored if not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise CogumiError(
            f"{folder} holds {len(surplus)} tensor(s) that a {config.model_type} model has no place for, "
            f"{min(surplus)} first",
            "export a plain language model; merge adapters first",
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise CogumiError(f"{folder}: {name} is {found[name]}, but config.json makes it {shape}", _SAVE)
    return Checkpoint(folder, config, shapes, dtypes["model.embed_tokens.weight"], files)


def read_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint that can be exported.

    Raises:
        CogumiError: no configuration, another architecture, a quantized checkpoint, or something that llama.cpp
            computes otherwise.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise CogumiError(f"{folder} is not a checkpoint: it has no config.json", "give a Hugging Face folder")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        kind = stated.get("model_type")
    except (ValueError, AttributeError) as error:
        raise CogumiError(f"{path} is not a configuration: {error}", _SAVE) from None
    if kind not in ARCHITECTURES:
        raise CogumiError(f"{folder} is a {kind!r} checkpoint", f"only {', '.join(ARCHITECTURES)} are exported")
    if stated.get("quantization_config"):
        raise CogumiError(f"{folder} is already quantized", "export its 16-bit parent instead")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # strict configurations raise errors of their own
        raise CogumiError(f"{path} is not a sound configuration: {error}", _SAVE) from error
    unlike = {
        "hidden_act": config.hidden_act != "silu",
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "attention_bias": kind == "qwen3" and config.attention_bias,
    }
    for key, unknown in unlike.items():
        if unknown:
            raise CogumiError(
                f"{folder}: llama.cpp knows no {kind} with {key} = {getattr(config, key)}",
                "keep it in Hugging Face form",
            )
    if not hasattr(config, "head_dim"):  # Qwen2's configuration has none
        config.head_dim = config.hidden_size // config.num_attention_heads
    refuse_unknown_rope(config)
    return config


def checkpoint_sha256(folder: Path) -> str:
    """SHA-256 of the weights: of the one safetensors file, or of the lines ``hash  name`` of all of them."""
    files = _weight_files(folder)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def card(folder: Path) -> dict[str, str]:
    """GGUF key -> value: name and licence, as config.json and the header of the model card state them."""
    from huggingface_hub import metadata_load

    stated: dict[str, Any] = {}
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "README.md").is_file():
            stated = {**stated, **(metadata_load(folder / "README.md") or {})}
    except Exception as error:  # a card is free text: yaml raises what it likes
        log.warning("%s: the model card could not be read: %s", folder, error)
    name = stated.get("_name_or_path")
    found = {
        "general.name": "cogumi" if not name or Path(str(name)).is_absolute() else name,
        "general.license": stated.get("license"),
        "general.license.name": stated.get("license_name"),
        "general.license.link": stated.get("license_link"),
    }
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load."""
    if (folder / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CogumiError(f"{folder / INDEX_FILE} is not an index of shards: {error}", _SAVE) from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise CogumiError(f"{folder} lacks the shard {name}", "download or save it again, whole")
        return [folder / name for name in names]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    raise CogumiError(
        f"{folder} holds no safetensors file ({WEIGHTS_FILE} or {INDEX_FILE})", "save it with save_pretrained"
    )


def _headers(folder: Path) -> tuple[dict[str, Path], dict[str, Shape], dict[str, str]]:
    """(file, shape, storage type) of every tensor, by name."""
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for path in _weight_files(folder):
        with _opened(path) as header:
            for name in header.keys():  # noqa: SIM118 (not a dict)
                if name in files:
                    raise CogumiError(f"{folder}: {name} is in {files[name].name} and in {path.name}", _SAVE)
                view = header.get_slice(name)
                files[name], shapes[name], dtypes[name] = path, tuple(view.get_shape()), view.get_dtype()
    return files, shapes, dtypes


def _opened(path: Path, backend: str = "mmap") -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", backend=backend)
    except SafetensorError as error:
        raise CogumiError(f"{path} is cut off or damaged: {error}", "download or save it again, whole") from None
