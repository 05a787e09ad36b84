"""Write PEFT LoRA adapters as GGUF adapters, and refuse what llama.cpp would apply otherwise than PEFT does."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_checkpoint import checkpoint_sha256, open_checkpoint, read_config
from cogumi_dagster.lib.compression.gguf_export import LARGEST_F16, written_aside
from cogumi_dagster.lib.compression.gguf_layout import Shape, gguf_name, heads_of, permute, tensor_shapes
from cogumi_dagster.lib.errors import CogumiError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"

_REFUSED = {
    "use_dora": "uses DoRA, whose magnitudes are no low-rank product",
    "use_rslora": "uses rsLoRA, but llama.cpp divides alpha by the rank, not by its root",
    "modules_to_save": "saves whole modules (modules_to_save), which are no low-rank product",
    "trainable_token_indices": "trains single embeddings (trainable_token_indices), which are no low-rank product",
    "lora_bias": "trains biases of its own (lora_bias)",
    "target_parameters": "trains bare parameters (target_parameters), which GGUF adapters do not name",
    "layer_replication": "repeats layers (layer_replication), which its base in GGUF does not",
    "fan_in_fan_out": "is for transposed weights (fan_in_fan_out), which these models do not have",
    "alora_invocation_tokens": "switches on after certain tokens (aLoRA)",
    "use_qalora": "pools its inputs (QALoRA)",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "arrow_config": "chooses among experts (Arrow)",
    "kasa_config": "changes its base's weights (KaSA)",
    "monteclora_config": "draws its weights at random (MonteCLoRA)",
}
"""Key of PEFT's LoraConfig -> what a GGUF adapter, an alpha and pairs of matrices, cannot express."""

_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""The other initializations of PEFT (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA ...) change the base's weights as well."""


@dataclass(frozen=True)
class _Pair:
    """One module's matrices as GGUF holds them, float32: ``a`` (rank, inputs), ``b`` (outputs, rank).

    Of embeddings ``a`` is (tokens, rank).
    """

    module: str
    a: np.ndarray[Any, Any]
    b: np.ndarray[Any, Any]


def export_lora(
    adapter: Path, out: Path, *, base: Path, contract: Mapping[str, str], type: Literal["F32", "F16"] = "F32"
) -> int:
    """Write a PEFT LoRA adapter as a GGUF adapter for the base checkpoint; return its bytes.

    ``contract`` (hashes of base, tokenizer, template) is stored under ``cogumi.*``. llama.cpp scales by alpha over
    the rank of each pair, with one alpha for all: where a module has its own, the ratio is folded into its B.

    Raises:
        CogumiError: no adapter, damaged or NaN weights, or too large for ``type``, something that a GGUF adapter cannot
            express, an adapter for a base of other shapes.
    """
    from gguf import GGUFWriter

    config = _adapter_config(adapter)
    base_config = read_config(base)
    pairs = list(_pairs(adapter, config, base, base_config))
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as path:
        writer = GGUFWriter(path, base_config.model_type)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
            for key, value in contract.items():
                writer.add_string(f"cogumi.{key}", value)
            for pair in pairs:
                name = f"{pair.module}.weight"
                heads = heads_of(
                    base_config.model_type, name, base_config.num_attention_heads, base_config.num_key_value_heads
                )
                b = permute(pair.b, heads) if heads else pair.b
                for letter, matrix in (("a", pair.a), ("b", b)):
                    if type == "F16" and np.abs(matrix).max(initial=0.0) > LARGEST_F16:
                        raise CogumiError(f"{adapter}: {pair.module} does not fit in F16", "export it as F32")
                    stored = np.ascontiguousarray(matrix, np.float16 if type == "F16" else np.float32)
                    writer.add_tensor(f"{gguf_name(name)}.lora_{letter}", stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return out.stat().st_size


def export_own_lora(adapter: Path, out: Path, base: Path) -> int:
    """``export_lora`` with the hashes of the base checkpoint's weights and tokenizer; return the bytes.

    Raises:
        CogumiError: as ``export_lora``; or the folder that the adapter was trained on is there, with other weights.
    """
    recorded = Path(str(_adapter_config(adapter).get("base_model_name_or_path") or ""))
    contract = {"parent_sha256": checkpoint_sha256(base)}
    elsewhere = (recorded / "config.json").is_file() and not recorded.samefile(base)
    if elsewhere and checkpoint_sha256(recorded) != contract["parent_sha256"]:
        raise CogumiError(
            f"{adapter} is for another base: it was trained on {recorded}, whose weights are not those of {base}",
            f"give --base {recorded}",
        )
    if (base / "tokenizer.json").is_file():
        contract["tokenizer_sha256"] = file_sha256(base / "tokenizer.json")
    return export_lora(adapter, out, base=base, contract=contract)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG_FILE
    if not path.is_file():
        raise CogumiError(f"{adapter} is not a PEFT adapter: it has no {CONFIG_FILE}", "give the adapter's folder")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise CogumiError(f"{path} is not an adapter's configuration: {error}", "save the adapter again") from None
    reason = next((reason for key, reason in _REFUSED.items() if config.get(key)), "")
    init = config.get("init_lora_weights", True)
    if kind != "LORA":
        reason = f"is a {kind} adapter, not LoRA"
    elif config.get("bias", "none") != "none":
        reason = "trains biases, which are no low-rank product"
    elif init not in _INITS_THAT_KEEP_THE_BASE:
        reason = f"was started with {init}, which changes its base's weights as well"
    elif not config.get("lora_alpha"):
        reason = "has alpha 0, which llama.cpp takes for no scaling"
    if reason:
        raise CogumiError(
            f"{adapter} {reason}: a GGUF adapter cannot express that",
            "train a plain LoRA, or merge the adapter and export the model",
        )
    return config


def _pairs(adapter: Path, config: dict[str, Any], base: Path, base_config: Any) -> Iterator[_Pair]:
    """The adapter's pairs, scaled for one alpha, checked against the shapes of the base."""
    shapes = tensor_shapes(base_config)
    sides: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    tables: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in _weights(adapter):
        stem = name.removeprefix("base_model.model.")
        if found := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", stem):
            sides.setdefault(found[1], {})[found[2]] = values
        elif stem.replace(".base_layer", "") in (f"{EMBEDDINGS}.weight", f"{HEAD}.weight"):
            tables[stem.replace(".base_layer", "")] = values
        else:
            raise CogumiError(f"{adapter}: tensor {name!r} is not a LoRA matrix", "train a plain LoRA")
    if not sides:
        raise CogumiError(f"{adapter} holds no LoRA matrix", "save the adapter again")
    for module in sides:
        _refuse_target(adapter, module, shapes, base_config)
    for name, values in tables.items():
        _refuse_other_table(adapter, base, name, values)
    for module, found_sides in sides.items():
        if found_sides.keys() != {"A", "B"}:
            raise CogumiError(f"{adapter}: {module} has only one of A and B", "save the adapter again")
        rank = own_of_module(config.get("rank_pattern"), module, config["r"])
        rows, columns = shapes[f"{module}.weight"]
        if module == EMBEDDINGS:
            rows, columns = columns, rows  # a table of rows: ids choose columns of A
        for side, wanted in (("A", (rank, columns)), ("B", (rows, rank))):
            if found_sides[side].shape != wanted:
                raise CogumiError(
                    f"{adapter} is for another base: its {side} of {module} is {found_sides[side].shape}, "
                    f"rank and base make it {wanted}",
                    "give the checkpoint that it was trained on with --base",
                )
        alpha = own_of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
        a = found_sides["A"].T if module == EMBEDDINGS else found_sides["A"]
        yield _Pair(module, a, found_sides["B"] * np.float32(alpha / config["lora_alpha"]))


def _refuse_target(adapter: Path, module: str, shapes: Mapping[str, Shape], base: Any) -> None:
    if module in (EMBEDDINGS, HEAD) and base.tie_word_embeddings:
        raise CogumiError(
            f"{adapter} adapts {module}, but here it is one tensor with the other: llama.cpp would adapt both",
            "leave it out of target_modules, or merge the adapter and export the model",
        )
    if len(shapes.get(f"{module}.weight", ())) != 2:
        raise CogumiError(
            f"{adapter} is for another base: a {base.model_type} of {base.num_hidden_layers} layers has no {module}",
            "give the checkpoint that it was trained on with --base",
        )


def _refuse_other_table(adapter: Path, base: Path, name: str, values: np.ndarray[Any, Any]) -> None:
    """PEFT saves embeddings and head along with an adapter of them; they must be the base's own."""
    source = open_checkpoint(base)
    if name not in source.shapes or not np.array_equal(source.tensor(name).float().numpy(), values):
        raise CogumiError(
            f"{adapter} brings a {name} of its own, which is not that of {base}",
            "give the checkpoint that it was trained on with --base, or merge the adapter and export the model",
        )


def _weights(adapter: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / WEIGHTS_FILE
    if not path.is_file():
        raise CogumiError(f"{adapter} holds no {WEIGHTS_FILE}", "save the adapter with save_pretrained")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CogumiError(f"{path} is cut off or damaged: {error}", "save the adapter again") from None
    for name, tensor in sorted(tensors.items()):
        values = tensor.float().numpy()
        if not np.isfinite(values).all():
            raise CogumiError(f"{adapter}: tensor {name} holds NaN or infinite values", "the training run is broken")
        yield name, values


def own_of_module(pattern: Mapping[str, float] | None, module: str, default: Any) -> Any:
    """A module's own rank or alpha: of the first key that matches as PEFT's ``get_pattern_key`` matches."""
    return next((own for key, own in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
