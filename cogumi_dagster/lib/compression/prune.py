"""Zero the least useful weights of a model by layer class: SparseGPT and Wanda through llm-compressor, or magnitude."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.compression.compressor import Calibration, quiet_compressor, run_oneshot
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD

LINEAR: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
SPARSEGPT_BLOCK = 128
"""Columns that SparseGPT handles at once; a pattern must not straddle two blocks."""


@dataclass(frozen=True)
class Targets:
    """What one step asks: a share of zeros for each class, and the zeros of each group where there is a pattern."""

    overall: float
    """The schedule's share of all weights; NaN where there is no schedule."""
    attention: float
    feed_forward: float
    embeddings: float
    pattern: tuple[int, int]

    def of(self, name: str) -> float:
        return float(getattr(self, name))


def steps_of(config: PruningConfig) -> list[Targets]:
    """The targets of each step: the class targets in proportion to the schedule, whole at its end."""
    zeros, group = config.pattern
    steps = []
    for overall in config.schedule or (float("nan"),):
        share = overall / config.schedule[-1] if config.schedule else 1.0
        now = round(zeros * share)
        linear = {
            name: (now / group if group else share * target) if target else 0.0
            for name, target in (
                ("attention", config.sparsity_attention),
                ("feed_forward", config.sparsity_feed_forward),
            )
        }
        steps.append(Targets(overall, embeddings=share * config.sparsity_embeddings, pattern=(now, group), **linear))
    return steps


@quiet_compressor()
def prune_model(model: Any, calibration: Calibration | None, method: str, targets: Targets) -> None:
    """Prune in place. What is zero already stays zero and counts towards the targets, so masks only grow."""
    if targets.embeddings > 0:
        for table in embedding_tables(model).values():
            _zero_smallest(table, targets.embeddings, None)
    classes = {names: targets.of(name) for name, names in LINEAR.items() if targets.of(name) > 0}
    if method == "magnitude":
        for names, sparsity in classes.items():
            for layer in layers_of(model, names).values():
                _zero_smallest(layer.weight, sparsity, targets.pattern)
    elif classes:
        assert calibration is not None
        run_oneshot(model, _recipe(method, classes, targets.pattern), calibration)
        _release(model)


def _release(model: Any) -> None:
    """Take off what llm-compressor leaves on a model: a wrapper around each module's forward, and one around saving."""
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)
    for module in model.modules():
        vars(module).pop("forward", None)  # the class's own again
    vars(model).pop("save_pretrained", None)


def _recipe(method: str, classes: Mapping[tuple[str, ...], float], pattern: tuple[int, int]) -> list[Any]:
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    # Wanda's zeros score lowest, so they stay; SparseGPT would fill them with other weights' errors
    modifier, extra = (
        (SparseGPTModifier, {"preserve_sparsity_mask": True}) if method == "sparsegpt" else (WandaPruningModifier, {})
    )
    return [
        modifier(
            sparsity=sparsity,
            mask_structure=f"{pattern[0]}:{pattern[1]}",
            targets=[f"re:.*{name}$" for name in names],
            **extra,
        )
        for names, sparsity in classes.items()
    ]


def _zero_smallest(weight: Any, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """Zero the smallest weights: of each group of a pattern, else of each row.

    Rows are compared within themselves (Wanda, arXiv 2306.11695, table 7); of an embedding each row is a token, and
    rare tokens have small rows that a common threshold would wipe out. llm-compressor's magnitude modifier follows
    training epochs and does nothing in one shot.
    """
    import torch

    with torch.no_grad():
        zeros, group = pattern or (0, 0)
        rows = weight.view(-1, group or weight.shape[-1])
        count = zeros if group else int(sparsity * rows.shape[-1])
        if count:
            rows.scatter_(-1, rows.abs().topk(count, largest=False).indices, 0.0)


def layers_of(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """The linear layers whose names end so."""
    return {name: module for name, module in model.named_modules() if name.endswith(tuple(names))}


def embedding_tables(model: Any) -> dict[str, Any]:
    """The input embedding, and the output head where it is not the same tensor."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {"embeddings": table} | ({} if head is table else {"head": head})


def class_weights(model: Any) -> dict[str, list[Any]]:
    """The weight tensors of each class: ``attention``, ``feed_forward``, ``embeddings``."""
    linear = {name: [layer.weight for layer in layers_of(model, names).values()] for name, names in LINEAR.items()}
    return {**linear, "embeddings": list(embedding_tables(model).values())}


def zero_share(weights: Sequence[Any]) -> float:
    """Share of exact zeros."""
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def require_prunable(model: Any, config: PruningConfig) -> None:
    """Hold a pruning config against a model's shapes.

    Raises:
        CogumiError: no such layers, a pattern that does not divide their columns, or a schedule that ends elsewhere
            than the class targets.
    """
    _, group = config.pattern
    for name, names in LINEAR.items():
        layers = layers_of(model, names)
        if not layers:
            raise CogumiError(
                f"the checkpoint has no {name} layers named {', '.join(names)}", "give a Llama-family checkpoint"
            )
        for layer, module in layers.items() if group else ():
            if module.weight.shape[-1] % group:
                raise CogumiError(
                    f"mask_structure {config.mask_structure} does not divide the {module.weight.shape[-1]} columns "
                    f"of {layer}",
                    "take a pattern whose M divides them, such as 2:4",
                )
    if config.method == "sparsegpt" and group and SPARSEGPT_BLOCK % group:
        raise CogumiError(
            f"SparseGPT prunes {SPARSEGPT_BLOCK} columns at once, which {config.mask_structure} does not divide",
            "take a pattern whose M is a power of two, or method wanda",
        )
    if config.schedule:
        _require_same_end(model, config)


SCHEDULE_TOLERANCE = 0.03
"""The specification's 0.65 with 60/70/50 by class is 0.657 of Llama-3.1-8B, 0.644 of Llama-3.2-1B, 0.638 of
SmolLM2-135M: shares of attention, feed-forward and embeddings differ that much between sizes."""


def _require_same_end(model: Any, config: PruningConfig) -> None:
    last = steps_of(config)[-1]
    weights = class_weights(model)
    wanted = sum(last.of(name) * w.numel() for name, of_class in weights.items() for w in of_class)
    share = wanted / sum(parameter.numel() for parameter in model.parameters())
    if abs(share - config.schedule[-1]) > SCHEDULE_TOLERANCE:
        raise CogumiError(
            f"the schedule ends at {config.schedule[-1]:g} of all weights, but the class targets make {share:.3f}",
            f"end compression.pruning.schedule at {share:.2f}, or change the class targets",
        )
