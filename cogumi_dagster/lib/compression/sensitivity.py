"""How much a change of each weight moves the model's answers: the Fisher information, from one backward pass.

Second order: a change ``d`` of the weights costs ``1/2 d' F d`` nats a token of KL divergence, F the Fisher information
under labels drawn from the model itself. Of F only the diagonal is kept, and of a tensor's diagonal its two marginals:
``F[i, j] ~ rows[i] columns[j]``, each summed over tokens with the other side's size as weight (a token of huge inputs
and no gradient, such as the first of a text, then counts for nothing; the product of two plain means would be ruled by
it). On SmolLM2-135M, as packaged and pruned with AWQ's scales, KL divergences that were measured are 0.5 (keys) to 2.1
(values) times the estimate by class of tensors, so ``fit_scales`` measures each class once; fourteen single tensors in
types from Q8_0 to IQ4_NL, with losses from 6e-8 to 4e-4 nats, then were 0.62 to 1.59 times what was foretold.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression.ggml import Array, dequantize_rows, quantize_rows
from cogumi_dagster.lib.compression.gguf_layout import gguf_name, heads_of, hf_name, permute, unpermute
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix, calibration_batches, head_name, linear_layers
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Batch, Pair, supervised_logits

FISHER_TOKENS = 2048
FIT_TOKENS = 512
SAMPLED_ROWS = 128
"""Rows of a matrix that are quantized to every type: rows differ little in their relative error."""

FIT_TYPE = "Q4_0"
"""What a class is measured in: the middle of the types."""

Losses = dict[str, dict[str, float]]
"""tensor -> type -> predicted KL divergence, nats a token, of storing this tensor alone in this type."""


@dataclass
class Marginals:
    """Sums over tokens for one use of a tensor: ``F[i, j] = rows[i] columns[j] / total``."""

    rows: Any = 0.0
    columns: Any = 0.0
    total: float = 0.0

    def add(self, inputs: Any, gradients: Any) -> None:
        """``inputs`` (tokens, columns) and loss gradients of the outputs (tokens, rows), squared."""
        size, pull = inputs.sum(1), gradients.sum(1)
        self.rows = self.rows + size @ gradients
        self.columns = self.columns + pull @ inputs
        self.total += float(size @ pull)


@dataclass(frozen=True)
class Curvature:
    """The diagonal Fisher information of one tensor, nats a token: a sum of outer products (rows, columns).

    A tied embedding has two: as the head, and as the table that is looked up.
    """

    terms: tuple[tuple[Array, Array], ...]

    def loss(self, change: Array) -> float:
        """KL divergence in nats a token, to second order, of adding ``change`` (rows, columns)."""
        squared = np.square(change)
        return 0.5 * float(sum(rows @ (squared @ columns) for rows, columns in self.terms))

    def sampled(self, count: int) -> tuple[Array, "Curvature"]:
        """Indices of at most ``count`` rows, and the curvature that weighs them so that they stand for all.

        Rows are drawn by what an equal error costs in each, evenly spaced along that sum: rows that matter are all
        there, of the rest a few.
        """
        costs = sum(rows * columns.sum() for rows, columns in self.terms)
        if len(costs) <= count or not costs.sum():
            return np.arange(len(costs)), self
        shares = costs / costs.sum()
        drawn = np.searchsorted(np.cumsum(shares), (np.arange(count) + 0.5) / count).clip(max=len(costs) - 1)
        indices, times = np.unique(drawn, return_counts=True)
        scale = times / (count * shares[indices])
        return indices, Curvature(tuple((rows[indices] * scale, columns) for rows, columns in self.terms))


def measure_curvature(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    tokens: int = FISHER_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Curvature]:
    """GGUF tensor name -> curvature, in GGUF's order of rows, for every matrix of a transformers model.

    Raises:
        CogumiError: too little calibration text.
    """
    sums: dict[tuple[str, str], Marginals] = {}
    with _gradients(model, sums):
        supervised = sampled_gradients(model, calibration_batches(tokenizer, pairs, tokens), seed, progress)
    found: dict[str, list[tuple[Array, Array]]] = {}
    for (name, _), sum_ in sums.items():
        rows, columns = sum_.rows.numpy() / supervised, sum_.columns.numpy() / (sum_.total or 1.0)
        heads = _heads(model, name)
        found.setdefault(name, []).append((permute(rows, heads) if heads else rows, columns))
    return {name: Curvature(tuple(terms)) for name, terms in found.items()}


def sampled_gradients(model: Any, batches: Sequence[Batch], seed: int, progress: Progress = silent) -> int:
    """A backward pass of each batch under labels drawn from the model itself, for those who ``watch`` its layers; the
    number of labels."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    supervised = 0
    for number, batch in enumerate(batches):
        logits, _ = supervised_logits(model, batch)
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits.float().cpu(), -1), 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum").backward()
        supervised += len(labels)
        progress(number + 1, len(batches), f"{supervised:,} answer tokens")
    return supervised


def watch(layer: Any, sums: Marginals) -> Any:
    """Gather a layer's squared inputs and output gradients from its next passes on; the hook, to be removed."""

    def forward(_: Any, inputs: Any, output: Any) -> None:
        squares = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).square()
        output.register_hook(lambda gradient: sums.add(squares, gradient.reshape(-1, gradient.shape[-1]).square()))

    return layer.register_forward_hook(forward)


@contextmanager
def no_weight_gradients(model: Any) -> Iterator[None]:
    """No parameter takes part in backward passes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _heads(model: Any, name: str) -> int | None:
    config = model.config
    return heads_of(config.model_type, f".{name}", config.num_attention_heads, config.num_key_value_heads)


@contextmanager
def _gradients(model: Any, sums: dict[tuple[str, str], Marginals]) -> Iterator[None]:
    """Gather squared inputs and output gradients of every matrix, and no gradient of a weight."""
    import torch

    ids: Any = None

    def embedding(_: Any, inputs: Any, output: Any) -> None:
        nonlocal ids
        ids = inputs[0].reshape(-1)
        output.requires_grad_()
        output.register_hook(looked_up)

    def looked_up(gradient: Any) -> None:
        """The input is one-hot: rows are the tokens of the text."""
        squares = gradient.reshape(-1, gradient.shape[-1]).square()
        pull = squares.sum(1)
        mine = sums.setdefault(("token_embd.weight", "lookup"), Marginals())
        mine.rows = mine.rows + torch.zeros(model.config.vocab_size).index_add(0, ids, pull)
        mine.columns = mine.columns + squares.sum(0)
        mine.total += float(pull.sum())

    named = [("lm_head", head_name(model), "head")]
    named += [(f"model.{path}", gguf_name(f"model.{path}.weight"), "linear") for path, _ in linear_layers(model.model)]
    hooks = [model.get_input_embeddings().register_forward_hook(embedding)]
    hooks += [watch(model.get_submodule(path), sums.setdefault((name, use), Marginals())) for path, name, use in named]
    try:
        with no_weight_gradients(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def predict_losses(
    f16: Path,
    curvature: Mapping[str, Curvature],
    options: Mapping[str, Sequence[str]],
    imatrix: Imatrix | None,
    *,
    progress: Progress = silent,
) -> Losses:
    """Store rows of every matrix of an unquantized GGUF in each of its ``options``; weigh what the rounding changes."""
    losses: Losses = {}
    for name, own, values in open_gguf(f16).tensors():
        if name not in options:
            continue
        importance = imatrix.importance(name) if imatrix else None
        indices, curved = curvature[name].sampled(SAMPLED_ROWS)
        rows = values[indices]
        losses[name] = {
            kind: 0.0 if kind == own else curved.loss(stored_as(rows, kind, importance) - rows)
            for kind in options[name]
        }
        progress(len(losses), len(options), name)
    return losses


def stored_as(values: Array, kind: str, importance: Array | None) -> Array:
    """The values that come back after a matrix was stored in ``kind``."""
    return dequantize_rows(quantize_rows(values, kind, importance), kind, values.shape[1])


def class_of(name: str) -> str:
    """``blk.3.ffn_up.weight`` -> ``ffn_up``; the embedding and the head are classes of their own."""
    return name.removesuffix(".weight").rpartition(".")[2]


class KlMeter:
    """KL divergence of a model with some matrices replaced from the model as it was, on answers of ``pairs``."""

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[Pair], tokens: int = FIT_TOKENS) -> None:
        self.model = model
        self.batches: list[Batch] = calibration_batches(tokenizer, pairs, tokens)
        self.reference = [self._logs(batch) for batch in self.batches]
        self.tokens = sum(len(logs) for logs in self.reference)

    def _logs(self, batch: Batch) -> Any:
        import torch

        with torch.no_grad():
            return torch.log_softmax(supervised_logits(self.model, batch)[0].float(), -1)

    def measure(self, replaced: Mapping[str, Array]) -> float:
        """Mean nats a token of KL(before || after); ``replaced`` maps GGUF names to values in GGUF's order."""
        with _replaced(self.model, replaced):
            total = sum(
                float((before.exp() * (before - self._logs(batch))).sum())
                for before, batch in zip(self.reference, self.batches, strict=True)
            )
        return total / self.tokens


@contextmanager
def _replaced(model: Any, values: Mapping[str, Array]) -> Iterator[None]:
    import torch

    kept = {}
    try:
        for name, value in values.items():
            heads = _heads(model, name)
            parameter = model.get_parameter(hf_name(name))
            kept[name] = parameter.data
            plain = unpermute(value, heads) if heads else value
            parameter.data = torch.from_numpy(np.ascontiguousarray(plain)).to(parameter.dtype)
        yield
    finally:
        for name, value in kept.items():
            model.get_parameter(hf_name(name)).data = value


def fit_scales(
    meter: KlMeter, f16: Path, losses: Losses, imatrix: Imatrix | None, *, progress: Progress = silent
) -> dict[str, float]:
    """class -> measured over predicted KL divergence, all of the class's matrices in ``FIT_TYPE`` at once."""
    file, scales = open_gguf(f16), {}
    measured = {name: class_of(name) for name, by_kind in losses.items() if FIT_TYPE in by_kind}
    classes = list(dict.fromkeys(measured.values()))
    for number, kind in enumerate(classes):
        replaced = {
            name: stored_as(values, FIT_TYPE, imatrix.importance(name) if imatrix else None)
            for name, _, values in file.tensors()
            if measured.get(name) == kind
        }
        predicted = sum(losses[name][FIT_TYPE] for name in replaced)
        scales[kind] = meter.measure(replaced) / predicted if predicted > 0 else 1.0
        progress(number + 1, len(classes), f"{kind} {scales[kind]:.2f}")
    return scales


def scaled(losses: Losses, scales: Mapping[str, float]) -> Losses:
    """Losses times the factor of each tensor's class; a class that was not measured keeps its own."""
    return {
        name: {kind: loss * scales.get(class_of(name), 1.0) for kind, loss in by_kind.items()}
        for name, by_kind in losses.items()
    }
