"""Prune a LoRA by rank: the directions of all modules that change the base least are left out.

Of one module's product B A the truncated SVD is the nearest of its rank. Zeroing the smallest weights of each A and B
loses far more at the same share (bench/modifiers.py), and the zeros are multiplied all the same when served.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE, own_of_module
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded
from cogumi_dagster.lib.training.loop import evaluation_loss

PREFIX = "base_model.model."
EVALUATION_TOKENS = 1024
FEWEST_EXAMPLES, MOST_EXAMPLES = 8, 64
"""Held-back lessons without which nothing is pruned, and as many as are asked: a pass for each share that is tried."""


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
    outcome: str
    """In words, also why nothing was removed."""
    validation_examples: int
    base_loss: float
    adapter_loss: float
    tried: tuple[PruneRow, ...]


def prune_where_quality_holds(
    model: Any,
    adapter: Path,
    validation: Sequence[Encoded],
    folder: Path,
    *,
    shares: Sequence[float],
    keeps: float,
    progress: Progress = silent,
) -> tuple[Path, PruneReport]:
    """(the pruned adapter's folder, or ``adapter`` itself; what was tried).

    ``model`` is the PEFT model with ``adapter`` active, on which the pruned ones are tried; the one chosen is active
    when it returns. The largest of ``shares`` is tried first.
    """
    held_back = validation[:MOST_EXAMPLES]
    with model.disable_adapter():
        base_loss = evaluation_loss(model, held_back, EVALUATION_TOKENS)
    adapter_loss = evaluation_loss(model, held_back, EVALUATION_TOKENS)
    tried: list[PruneRow] = []
    chosen, removed, outcome = adapter, 0.0, "no share keeps the gain"
    if len(held_back) < FEWEST_EXAMPLES:
        outcome = f"{len(held_back)} held-back lessons are too few to choose by"
    elif not adapter_loss < base_loss:
        outcome = "the adapter has no gain on held-back lessons"
    else:
        directions = Directions(adapter)
        for number, share in enumerate(sorted(shares, reverse=True)):
            name = f"pruned_{number}"
            progress(number, len(shares), f"without {share:.0%} of the adapter")
            ranks, really = directions.write(folder / name, share)
            model.load_adapter(folder / name, name)
            model.set_adapter(name)
            loss = evaluation_loss(model, held_back, EVALUATION_TOKENS)
            kept = (base_loss - loss) / (base_loss - adapter_loss)
            tried.append(PruneRow(really, len(ranks), max(ranks.values()), loss, kept))
            if kept >= keeps:
                chosen, removed, outcome = folder / name, really, f"{kept:.0%} of the gain kept"
                break
            model.set_adapter("default")
            model.delete_adapter(name)
    model.eval()
    return chosen, PruneReport(removed, outcome, len(held_back), base_loss, adapter_loss, tuple(tried))


class Directions:
    """The singular directions of all modules of a PEFT adapter."""

    def __init__(self, adapter: Path) -> None:
        from safetensors.torch import load_file
        from torch.linalg import qr, svd

        self.config = json.loads((adapter / CONFIG_FILE).read_text())
        tensors = load_file(adapter / WEIGHTS_FILE)
        self.weights = sum(tensor.numel() for tensor in tensors.values())
        self.modules: dict[str, tuple[Any, Any, Any]] = {}
        """(left (out, rank), singular values (rank,), right (rank, in)) of each scaled product."""
        for name in tensors:
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
            alpha = own_of_module(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
            (left, inner), (right, outer) = qr(b), qr(a.T)
            u, values, v = svd(inner @ outer.T * (alpha / len(a)))
            self.modules[module] = left @ u, values, v @ right.T

    def write(self, out: Path, share: float) -> tuple[dict[str, int], float]:
        """Write a PEFT adapter with at least ``share`` of the weights left out; (rank of each module, share).

        Directions of all modules compete: each has the square of its singular value over its number of weights. A
        module that keeps none is no longer adapted.

        Raises:
            CogumiError: ``share`` leaves no direction.
        """
        from safetensors.torch import save_file

        costs = {module: len(u) + v.shape[1] for module, (u, _, v) in self.modules.items()}
        every = [
            (float(value) ** 2 / costs[module], module)
            for module, (_, values, _) in self.modules.items()
            for value in values
        ]
        room = (1 - share) * self.weights
        ranks: dict[str, int] = {}
        for worth, module in sorted(every, reverse=True):
            if worth > 0 and costs[module] <= room:
                ranks[module] = ranks.get(module, 0) + 1
                room -= costs[module]
        if not ranks:
            raise CogumiError(f"a pruning of {share} leaves nothing of the adapter", "lower modifiers.prune_shares")
        kept: dict[str, Any] = {}
        for module, rank in ranks.items():
            u, values, v = self.modules[module]
            root = values[:rank].sqrt()
            kept[f"{PREFIX}{module}.lora_A.weight"] = (root[:, None] * v[:rank]).contiguous()
            kept[f"{PREFIX}{module}.lora_B.weight"] = (u[:, :rank] * root).contiguous()
        out.mkdir(parents=True)
        save_file(kept, out / WEIGHTS_FILE)
        patterns = {re.escape(module): rank for module, rank in ranks.items()}
        largest = max(ranks.values())
        own = {"target_modules": sorted(ranks), "r": largest, "lora_alpha": largest}
        config = {**self.config, **own, "rank_pattern": patterns, "alpha_pattern": patterns}
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        return ranks, 1 - sum(tensor.numel() for tensor in kept.values()) / self.weights
