"""Prune a LoRA by rank: the directions of all modules that change the base least are left out.

Of one module's product B A the truncated SVD is the nearest of its rank. Zeroing the smallest weights of A and B
instead loses far more at the same bytes, and saves no time when served (bench/modifiers.py).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE, own_of_module
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Encoded
from cogumi_dagster.lib.training.loop import evaluation_loss

PREFIX = "base_model.model."
EVALUATION_TOKENS = 1024


@dataclass(frozen=True)
class PruneRow:
    """A share that was tried. ``gain_kept`` is of the fall in validation loss that the whole adapter brings."""

    removed: float
    """Share of the adapter's weights."""
    modules: int
    largest_rank: int
    validation_loss: float
    gain_kept: float


@dataclass(frozen=True)
class PruneReport:
    """``chosen`` is the share that was removed: the largest tried that keeps enough of the gain, else 0."""

    chosen: float
    validation_examples: int
    base_loss: float
    adapter_loss: float
    tried: tuple[PruneRow, ...]


def prune_where_quality_holds(
    model: Any, adapter: Path, validation: Sequence[Encoded], folder: Path, *, shares: Sequence[float], keeps: float
) -> tuple[Path, PruneReport]:
    """(the pruned adapter's folder, or ``adapter`` itself; what was tried).

    ``model`` is the PEFT model with ``adapter`` active, on which the pruned ones are tried; the one chosen is active
    when it returns. The largest of ``shares`` is tried first.
    """
    with model.disable_adapter():
        base_loss = evaluation_loss(model, validation, EVALUATION_TOKENS)
    adapter_loss = evaluation_loss(model, validation, EVALUATION_TOKENS)
    tried: list[PruneRow] = []
    chosen, removed = adapter, 0.0
    if adapter_loss < base_loss:
        for share in sorted(shares, reverse=True):
            name = f"pruned_{round(1000 * share)}"
            ranks, really = prune_adapter(adapter, folder / name, share)
            model.load_adapter(folder / name, name)
            model.set_adapter(name)
            loss = evaluation_loss(model, validation, EVALUATION_TOKENS)
            kept = (base_loss - loss) / (base_loss - adapter_loss)
            tried.append(PruneRow(really, len(ranks), max(ranks.values()), loss, kept))
            if kept >= keeps:
                chosen, removed = folder / name, really
                break
        else:
            model.set_adapter("default")
    model.eval()
    return chosen, PruneReport(removed, len(validation), base_loss, adapter_loss, tuple(tried))


def prune_adapter(adapter: Path, out: Path, share: float) -> tuple[dict[str, int], float]:
    """Write to ``out`` a PEFT adapter with at least ``share`` of the weights left out; (rank of each module, share).

    Directions of all modules compete: each has the square of its singular value over its number of weights. A module
    that keeps none is no longer adapted.

    Raises:
        CogumiError: ``share`` leaves no direction.
    """
    from safetensors.torch import load_file, save_file
    from torch.linalg import qr, svd

    config = json.loads((adapter / CONFIG_FILE).read_text())
    tensors = load_file(adapter / WEIGHTS_FILE)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    parts: dict[str, tuple[Any, Any, Any]] = {}
    directions: list[tuple[float, str, int]] = []
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()
        rank = len(a)
        alpha = own_of_module(config.get("alpha_pattern"), module.removeprefix(PREFIX), config["lora_alpha"])
        (left, inner), (right, outer) = qr(b), qr(a.T)
        u, values, v = svd(inner @ outer.T * (alpha / rank))
        parts[module] = left @ u, values, v @ right.T
        cost = a.shape[1] + b.shape[0]
        directions += [(float(value) ** 2 / cost, module, cost) for value in values]
    weights = sum(tensor.numel() for tensor in tensors.values())
    room = (1 - share) * weights
    ranks: dict[str, int] = {}
    for value, module, cost in sorted(directions, reverse=True):
        if value > 0 and cost <= room:
            ranks[module] = ranks.get(module, 0) + 1
            room -= cost
    if not ranks:
        raise CogumiError(f"a pruning of {share} leaves nothing of the adapter", "lower modifiers.prune_shares")
    kept: dict[str, Any] = {}
    for module, rank in ranks.items():
        u, values, v = parts[module]
        root = values[:rank].sqrt()
        kept[f"{module}.lora_A.weight"] = (root[:, None] * v[:rank]).contiguous()
        kept[f"{module}.lora_B.weight"] = (u[:, :rank] * root).contiguous()
    out.mkdir(parents=True)
    save_file(kept, out / WEIGHTS_FILE)
    names = {module.removeprefix(PREFIX): rank for module, rank in ranks.items()}
    patterns = {re.escape(name): rank for name, rank in names.items()}
    largest = max(names.values())
    config |= {
        "target_modules": sorted(names), "r": largest, "lora_alpha": largest, "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }  # fmt: skip
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=1))
    return names, 1 - sum(tensor.numel() for tensor in kept.values()) / weights
