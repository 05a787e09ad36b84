"""Why a link of the parity chain is broken: what its text, weights and metadata say. Asked only of broken links."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.evaluation.parity_links import Observed

Tensors = Mapping[str, np.ndarray[Any, Any]]
ROUNDING = 0.02
"""Relative distance of two tensors from which they are not each other's rounding (bfloat16 rounds to 0.4 %)."""


def of_ids(seen: Observed, wanted: Observed, gguf: Path | None) -> str:
    """Other ids: another text, or another tokenization of the same text."""
    if not seen.texts:  # the server tells only counts
        at = next(n for n, count in enumerate(seen.prompt_tokens) if count != wanted.prompt_tokens[n])
        said = f"prompt {at} has {seen.prompt_tokens[at]} tokens, {wanted.prompt_tokens[at]} are right"
        return f"the server applies another chat template, or adds a token: {said}"
    for mine, right in zip(seen.texts, wanted.texts, strict=True):
        if mine != right:
            same = next((n for n, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b), len(right))
            at = max(0, same - 20)
            return f"another chat template: {mine[at : at + 50]!r} is {right[at : at + 50]!r} in the link before"
    pre = f" (tokenizer.ggml.pre is {_metadata(gguf).get('tokenizer.ggml.pre')!r})" if gguf else ""
    return f"the same text gets other ids: a wrong pre-tokenizer{pre}, or another vocabulary"


def of_merge(student: Path, adapter: Path, merged: Path) -> str:
    """How much of the adapter is in the merged weights: the projection of their change on alpha / rank * B A."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    before, after = _checkpoint(student), _checkpoint(merged)
    factors = {
        name: tensor.float().numpy() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    trained, along, whole = set(), 0.0, 0.0
    for name, a in factors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            trained.add(f"{module}.weight")
            update = _scale(config, module, len(a)) * (factors[name.replace(".lora_A.", ".lora_B.")] @ a)
            along += float(((after[f"{module}.weight"] - before[f"{module}.weight"]) * update).sum())
            whole += float((update * update).sum())
    share = along / whole if whole else math.nan
    if abs(share) < 0.05:
        return "the adapter is not merged: the weights did not move along it"
    if not abs(share - 1) < 0.05:
        return f"the adapter is merged at another scale than alpha / rank: {share:.2f} of it is in the weights"
    beside = [name for name in _moved(before, after) if name not in trained]
    if beside:
        return f"tensors moved that the adapter does not train: {', '.join(beside[:3])} ({len(beside)})"
    return "the adapter is merged at its scale and nothing else moved: look at the files beside the weights"


def of_export(checkpoint: Path, gguf: Path) -> str:
    """Tensors of an unquantized GGUF that are not the checkpoint's."""
    from cogumi_dagster.lib.compression.gguf_read import hf_state_dict, open_gguf

    file = open_gguf(gguf)
    right, found = _checkpoint(checkpoint), hf_state_dict(file)
    different = [name for name, values in found.items() if name in right and _distance(values, right[name]) > ROUNDING]
    if different and all(_same_rows(found[name], right[name]) for name in different):
        return f"the query and key heads are not permuted: rows of {different[0]} are in another order"
    if different:
        return f"{len(different)} tensors are not the checkpoint's, {different[0]} first"
    config = json.loads((checkpoint / "config.json").read_text())
    theta = (config.get("rope_parameters") or config).get("rope_theta")
    base = next((value for key, value in file.metadata.items() if key.endswith("rope.freq_base")), None)
    if theta and base and abs(float(base) / float(theta) - 1) > 1e-6:
        return f"the rotary base is {float(base):g} in the file and {float(theta):g} in the checkpoint"
    return "the weights are the checkpoint's: look at the metadata (rope, norm epsilon, head counts)"


def of_folding(parent: Path, folded: Path) -> str:
    """AWQ scales must be divided out of the layer before. Names the tensors that moved."""
    moved = _moved(_checkpoint(parent), _checkpoint(folded))
    return f"scales are folded on one side only; moved: {', '.join(moved[:3])} ({len(moved)} tensors)"


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's own factor of B A: alpha / rank, both by pattern; divided by the root of the rank in rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if module.endswith(key)), config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _moved(first: Tensors, second: Tensors) -> list[str]:
    return [name for name in first if name in second and _distance(second[name], first[name]) > ROUNDING]


def _distance(values: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    if values.shape != right.shape:
        return float("inf")
    return float(np.linalg.norm(values - right) / (np.linalg.norm(right) or 1.0))


def _same_rows(values: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """The same rows in another order, by their norms."""
    mine, theirs = (np.sort(np.linalg.norm(np.atleast_2d(one), axis=1)) for one in (values, right))
    return values.shape == right.shape and bool(np.allclose(mine, theirs, rtol=ROUNDING))


def _checkpoint(folder: Path) -> Tensors:
    """All tensors in float32."""
    from safetensors.torch import load_file

    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.float().numpy() for tensors in files for name, tensor in tensors.items()}


def _metadata(gguf: Path) -> Mapping[str, Any]:
    from cogumi_dagster.lib.compression.gguf_read import open_gguf

    return open_gguf(gguf).metadata
