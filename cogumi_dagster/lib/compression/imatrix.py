"""Importance matrices: how large the inputs of each linear layer's columns are, so that quantizers err where it matters
least. Written and read in llama.cpp's own form (a GGUF of ``general.type`` imatrix).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression.ggml import Array
from cogumi_dagster.lib.compression.gguf_export import written_aside
from cogumi_dagster.lib.compression.gguf_layout import gguf_name
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Encoded, Pair, batches_of, encode_pairs

CHUNK = 512
"""Tokens of a chunk, llama-imatrix's default: other tools say how much data went in by chunks."""

IMATRIX_TOKENS = 4096
"""Calibration tokens, prompts too."""

MIN_TOKENS = 256
"""Below this a mean over tokens says little about 576 columns."""

MAX_LENGTH = 2048
BATCH_TOKENS = 1024
PAIRS_AT_ONCE = 16
SQUARES, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """Per tensor (by its GGUF name) the sum of squared inputs of each column, and over how many tokens."""

    sums: Mapping[str, Array]
    counts: Mapping[str, int]
    datasets: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return max(self.counts.values(), default=0)

    def importance(self, name: str) -> Array | None:
        """Mean squared input of each column of a tensor, float32; None where nothing is known."""
        if name not in self.sums or not self.counts[name]:
            return None
        return (self.sums[name] / self.counts[name]).astype(np.float32)


def collect_imatrix(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    tokens: int = IMATRIX_TOKENS,
    dataset: str = "",
    progress: Progress = silent,
) -> Imatrix:
    """Run ``pairs`` (about ``tokens`` tokens of them) through a transformers model and sum squared inputs.

    The head's inputs stand under the name of the tensor that holds its weights, the embedding's where they are tied
    (llama-imatrix leaves the head out unless it is told to process the output).

    Raises:
        CogumiError: less than ``MIN_TOKENS`` tokens of calibration text.
    """
    import torch

    sums: dict[str, Any] = {}
    count = 0
    mask: Any = None

    def add(name: str, inputs: Any) -> None:
        kept = inputs.reshape(-1, inputs.shape[-1])[mask].double()
        sums[name] = sums.get(name, 0.0) + kept.square().sum(0)

    batches = calibration_batches(tokenizer, pairs, tokens)
    with torch.no_grad(), _linear_inputs(model.model, add, prefix="model."):
        for number, batch in enumerate(batches):
            mask = batch.mask.bool().reshape(-1)
            hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            add(head_name(model), hidden)
            count += batch.tokens
            progress(number + 1, len(batches), f"{count:,} tokens")
    return Imatrix(
        {name: total.numpy().astype(np.float32) for name, total in sums.items()},
        dict.fromkeys(sums, count),
        (dataset,) if dataset else (),
    )


@contextmanager
def _linear_inputs(module: Any, receive: Callable[[str, Any], None], *, prefix: str) -> Iterator[None]:
    """Call ``receive(GGUF name, inputs)`` for every linear layer of ``module`` that runs."""

    def receiver(name: str) -> Callable[[Any, Any], None]:
        return lambda _, inputs: receive(name, inputs[0])

    hooks = [
        layer.register_forward_pre_hook(receiver(gguf_name(f"{prefix}{path}.weight")))
        for path, layer in linear_layers(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linear_layers(module: Any) -> list[tuple[str, Any]]:
    """(path, layer) of every linear layer below ``module``."""
    import torch

    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]


def head_name(model: Any) -> str:
    """The GGUF tensor that the output head's weights are stored in."""
    return "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"


def calibration_batches(tokenizer: Any, pairs: Sequence[Pair], tokens: int) -> list[Any]:
    """Padded batches of pairs drawn from all over the list (always the same ones), about ``tokens`` tokens.

    Raises:
        CogumiError: less than ``MIN_TOKENS`` tokens.
    """
    order = random.Random(0).sample(pairs, len(pairs))
    chosen: list[Encoded] = []
    total = 0
    for start in range(0, len(order), PAIRS_AT_ONCE):
        encoded, _ = encode_pairs(tokenizer, order[start : start + PAIRS_AT_ONCE], 1 << 30)
        for item in encoded:
            if total < tokens and len(item.ids) <= MAX_LENGTH:
                chosen.append(item)
                total += len(item.ids)
        if total >= tokens:
            break
    if total < MIN_TOKENS:
        raise CogumiError(
            f"the calibration text is too small: {total} tokens, at least {MIN_TOKENS} are needed",
            "give more examples",
        )
    return list(batches_of(chosen, BATCH_TOKENS, tokenizer.pad_token_id))


def write_imatrix(imatrix: Imatrix, out: Path) -> None:
    """Write in the form of llama.cpp's ``llama-imatrix --output-format gguf``."""
    from gguf import GGUFWriter

    with written_aside(out) as path:
        writer = GGUFWriter(path, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets) or [""])
        writer.add_uint32("imatrix.chunk_count", max(1, imatrix.tokens // CHUNK))
        writer.add_uint32("imatrix.chunk_size", CHUNK)
        for name in sorted(imatrix.sums):
            writer.add_tensor(f"{name}{SQUARES}", imatrix.sums[name].astype(np.float32).reshape(1, -1))
            writer.add_tensor(f"{name}{COUNTS}", np.array([[imatrix.counts[name]]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read what ``write_imatrix`` or llama-imatrix wrote.

    Raises:
        CogumiError: no such file, not an importance matrix, or one with values that cannot be sums of squares.
    """
    file = open_gguf(path)
    if file.metadata.get("general.type") != "imatrix":
        raise CogumiError(f"{path} is not an importance matrix", "make one with cogumi imatrix or llama-imatrix")
    values = {name: np.array(tensor, np.float32) for name, _, tensor in file.tensors()}
    sums = {name.removesuffix(SQUARES): value for name, value in values.items() if name.endswith(SQUARES)}
    counts = {name.removesuffix(COUNTS): value for name, value in values.items() if name.endswith(COUNTS)}
    for name, value in sums.items():
        if name not in counts or value.shape[0] != 1 or counts[name].size != 1:
            raise CogumiError(f"{path}: {name} has no single count", "mixtures of experts are not read; make it again")
        if not np.isfinite(value).all() or (value < 0).any() or counts[name][0, 0] < 0:
            raise CogumiError(f"{path}: {name} holds values that are no sums of squares", "make it again")
    datasets = file.metadata.get("imatrix.datasets") or []
    return Imatrix(
        {name: value[0] for name, value in sums.items()},
        {name: int(counts[name][0, 0]) for name in sums},
        tuple(name for name in datasets if name),
    )


def require_fit(imatrix: Imatrix, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a matrix that was made for a model with other tensors or other columns."""
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        known = imatrix.sums.get(name)
        if known is None and name.startswith("blk."):
            raise CogumiError(f"the importance matrix has nothing on {name}", "it was made for another model")
        if known is not None and len(known) != shape[1]:
            raise CogumiError(
                f"the importance matrix has {len(known)} columns of {name}, the model {shape[1]}",
                "it was made for another model: make it again",
            )
