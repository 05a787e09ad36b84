"""Prune a LoRA by rank: the directions of all modules that move the answers least are left out.

A change D of a module's product B A costs about ``1/2 sum(rows[i] columns[j] D[i, j]^2)`` nats a token, where rows and
columns are the marginals of the Fisher information (``compression.sensitivity``). Weighed by their roots, the truncated
SVD is the cheapest change of its rank, and its singular values can be held against those of other modules. Most modules
then keep no direction and cost nothing when served. By size alone, and by zeroing the smallest weights, far more is
lost at the same share (bench/modifiers.py).
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE, own_of_module
from cogumi_dagster.lib.compression.sensitivity import (
    FISHER_TOKENS,
    Marginals,
    no_weight_gradients,
    sampled_gradients,
    watch,
)
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded, batches_of
from cogumi_dagster.lib.training.loop import evaluation_loss
from cogumi_dagster.lib.training.packing import packed_rows

PREFIX = "base_model.model."
EVALUATION_TOKENS = 1024
SMALLEST_WEIGHT = 1e-3
"""Of a row or column, in parts of the mean: one that the lessons never move must not be free."""
FEWEST_EXAMPLES, MOST_EXAMPLES = 8, 128
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
    lessons: Sequence[Encoded],
    validation: Sequence[Encoded],
    folder: Path,
    *,
    shares: Sequence[float],
    keeps: float,
    progress: Progress = silent,
) -> tuple[Path, PruneReport]:
    """(the pruned adapter's folder, or ``adapter`` itself; what was tried).

    ``model`` is the PEFT model with ``adapter`` active, on which the pruned ones are tried; the one chosen is active
    when it returns. Some of ``lessons`` tell which directions matter, some of ``validation`` what is lost without the
    others. The largest of ``shares`` is tried first.
    """
    held_back = asked_of(validation)
    with model.disable_adapter():
        base_loss = loss_of(model, held_back)
    adapter_loss = loss_of(model, held_back)
    tried: list[PruneRow] = []
    chosen, removed, outcome = adapter, 0.0, "no share keeps the gain"
    if len(held_back) < FEWEST_EXAMPLES:
        outcome = f"{len(held_back)} held-back lessons are too few to choose by"
    elif not adapter_loss < base_loss:
        outcome = "the adapter has no gain on held-back lessons"
    else:
        progress(0, len(shares), "which directions matter")
        directions = Directions(adapter, module_curvature(model, lessons))
        for number, share in enumerate(sorted(shares, reverse=True)):
            name = f"pruned_{number}"
            progress(number, len(shares), f"without {share:.0%} of the adapter")
            ranks, really = directions.write(folder / name, share)
            model.load_adapter(folder / name, name)
            model.set_adapter(name)
            loss = loss_of(model, held_back)
            kept = (base_loss - loss) / (base_loss - adapter_loss)
            tried.append(PruneRow(really, len(ranks), max(ranks.values()), loss, kept))
            if kept >= keeps:
                chosen, removed, outcome = folder / name, really, f"{kept:.0%} of the gain kept"
                break
            model.set_adapter("default")
            model.delete_adapter(name)
    model.eval()
    return chosen, PruneReport(removed, outcome, len(held_back), base_loss, adapter_loss, tuple(tried))


def asked_of(validation: Sequence[Encoded]) -> list[Encoded]:
    """The held-back lessons on which a pruning is judged: at random, since those with one answer are side by side."""
    return random.Random(0).sample(validation, min(len(validation), MOST_EXAMPLES))


def loss_of(model: Any, lessons: Sequence[Encoded]) -> float:
    """Mean loss a supervised token of a PEFT model with its active adapter."""
    with packed_rows(model.get_base_model()):
        return evaluation_loss(model, lessons, EVALUATION_TOKENS)


Curvatures = Mapping[str, tuple[Any, Any]]
"""module -> (rows (out,), columns (in,)): the marginals of its product's Fisher information, nats a token."""


def module_curvature(model: Any, lessons: Sequence[Encoded], tokens: int = FISHER_TOKENS) -> Curvatures:
    """Of every module that ``model``, a PEFT model, adapts with its active adapter, on about ``tokens`` tokens drawn
    from ``lessons``."""
    chosen: list[Encoded] = []
    for item in random.Random(0).sample(lessons, len(lessons)):
        if sum(len(one.ids) for one in chosen) >= tokens:
            break
        chosen.append(item)
    sums: dict[str, Marginals] = {}
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            hooks.append(watch(layer, sums.setdefault(path.removeprefix(PREFIX), Marginals())))
    model.eval()
    try:
        with no_weight_gradients(model):
            labels = sampled_gradients(model, list(batches_of(chosen, EVALUATION_TOKENS, 0)), seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: (sum_.rows / labels, sum_.columns / (sum_.total or 1.0)) for module, sum_ in sums.items()}


class Directions:
    """The directions of all modules of a PEFT adapter, by what each of them moves: of ``curvatures`` where given, else
    by size."""

    def __init__(self, adapter: Path, curvatures: Curvatures | None = None) -> None:
        from safetensors.torch import load_file
        from torch.linalg import qr, svd

        self.config = json.loads((adapter / CONFIG_FILE).read_text())
        tensors = load_file(adapter / WEIGHTS_FILE)
        self.weights = sum(tensor.numel() for tensor in tensors.values())
        self.modules: dict[str, tuple[Any, Any, Any, Any]] = {}
        """(left (out, rank), size (rank,), right (rank, in), worth (rank,)) of each scaled product: left and right of
        length 1, the most worth first."""
        for name in tensors:
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
            alpha = own_of_module(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
            rows, columns = curvatures[module] if curvatures else (b.new_ones(len(b)), a.new_ones(a.shape[1]))
            by_row, by_column = (
                root.clamp(min=SMALLEST_WEIGHT * float(root.mean()) or 1.0)
                for root in (rows.to(b).sqrt(), columns.to(a).sqrt())
            )
            (left, inner), (right, outer) = qr(b * by_row[:, None]), qr(a.T * by_column[:, None])
            u, values, v = svd(inner @ outer.T * (alpha / len(a)))
            left, right = (left @ u) / by_row[:, None], (v @ right.T) / by_column
            long, wide = left.norm(dim=0), right.norm(dim=1)
            self.modules[module] = left / long, values * long * wide, right / wide[:, None], values**2

    def write(self, out: Path, share: float) -> tuple[dict[str, int], float]:
        """Write a PEFT adapter with at least ``share`` of the weights left out; (rank of each module, share).

        Directions of all modules compete: each has its worth over its number of weights. A module that keeps none is no
        longer adapted.

        Raises:
            CogumiError: ``share`` leaves no direction.
        """
        from safetensors.torch import save_file

        costs = {module: len(left) + right.shape[1] for module, (left, _, right, _) in self.modules.items()}
        every = [
            (float(value) / costs[module], module)
            for module, (_, _, _, worth) in self.modules.items()
            for value in worth
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
            left, sizes, right, _ = self.modules[module]
            root = sizes[:rank].sqrt()
            kept[f"{PREFIX}{module}.lora_A.weight"] = (root[:, None] * right[:rank]).contiguous()
            kept[f"{PREFIX}{module}.lora_B.weight"] = (left[:, :rank] * root).contiguous()
        out.mkdir(parents=True)
        save_file(kept, out / WEIGHTS_FILE)
        patterns = {re.escape(module): rank for module, rank in ranks.items()}
        largest = max(ranks.values())
        own = {"target_modules": sorted(ranks), "r": largest, "lora_alpha": largest}
        config = {**self.config, **own, "rank_pattern": patterns, "alpha_pattern": patterns}
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        return ranks, 1 - sum(tensor.numel() for tensor in kept.values()) / self.weights
