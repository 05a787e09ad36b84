"""llm-compressor, made to run on a machine without an accelerator, and what every step asks of its input."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.student import save_checkpoint

log = logging.getLogger(__name__)

MIN_CALIBRATION_SAMPLES = 2
BATCH = 8
"""Calibration samples of one forward pass: small passes leave most of a CPU idle."""


@dataclass(frozen=True)
class Calibration:
    """Sequences of equal length. ``data`` is a ``datasets.Dataset``; ``tokens_by_group`` says what they are of."""

    data: Any
    tokens_by_group: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.data)


@contextlib.contextmanager
def quiet_compressor() -> Iterator[None]:
    """llm-compressor without its log files, progress bars and pinned memory on a CPU; around all that uses it.

    Its cache pins CPU tensors for asynchronous copies to an accelerator, and fails where there is
    none ("Cannot access accelerator device"); without an accelerator there is nothing to copy to.
    """
    import torch

    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from llmcompressor.pipelines.cache import IntermediatesCache

    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    original = IntermediatesCache.pin_memory
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    chatter = io.StringIO()  # progress bars of single layers; the asset reports its own progress
    try:
        with contextlib.redirect_stderr(chatter):
            yield
    finally:
        IntermediatesCache.pin_memory = original
        log.debug("llm-compressor: %s", chatter.getvalue())


def run_oneshot(model: Any, recipe: list[Any], calibration: Calibration | None = None) -> None:
    """Apply a recipe to ``model`` in place, layer by layer where it needs calibration data."""
    from llmcompressor import oneshot

    arguments: dict[str, Any] = {"pipeline": "datafree"}
    if calibration is not None:
        arguments = {
            "dataset": calibration.data,
            "num_calibration_samples": len(calibration),
            "batch_size": min(BATCH, len(calibration)),
            "shuffle_calibration_samples": False,
            "pipeline": "sequential",
        }
    oneshot(model=model, recipe=recipe, **arguments)


def load_sound(checkpoint: Path) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer), every tensor there and finite.

    transformers draws a missing tensor at random and goes on; scales and masks found on such weights would be
    worth nothing.

    Raises:
        CogumiError: no checkpoint, a damaged file, missing tensors, NaN or infinite weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (checkpoint / "config.json").is_file():
        raise CogumiError(f"{checkpoint} is not a checkpoint: it has no config.json", "give a Hugging Face folder")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CogumiError(f"{checkpoint} cannot be loaded: {reason}", "save the checkpoint again, whole") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CogumiError(f"{checkpoint} lacks {len(missing)} tensor(s), {missing[0]} first", "save it again, whole")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CogumiError(
                f"{checkpoint}: tensor {name} holds NaN or infinite values", "the run that wrote it is broken"
            )
    return model.eval(), tokenizer


def kept_in(model: Any) -> Any:
    """The 16-bit torch type that trained weights are saved in: float16, or bfloat16 where a weight is too large for it.

    A recovery moves a weight of 0.06 by some 1e-4, and bfloat16's numbers are 2.4e-4 apart there: rounded to the
    nearest, most of what was learned is gone, since the weights begin on that grid. Float16's are 3e-5 apart.
    """
    import torch

    greatest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    return torch.float16 if greatest <= torch.finfo(torch.float16).max else torch.bfloat16


def round_weights(model: Any) -> None:
    """To what is saved (``kept_in``), in float32, so that what is measured is what is saved. Buffers stay exact."""
    import torch

    kept = kept_in(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(kept))


def save_rounded(model: Any, tokenizer: Any, out: Path) -> None:
    """Save a model in the type of ``kept_in``, to which it is turned with its buffers."""
    save_checkpoint(model.to(kept_in(model)), tokenizer, out)


def calibration_set(tokenizer: Any, pairs: Sequence[Pair], samples: int, tokens: int) -> Calibration:
    """``samples`` sequences of exactly ``tokens`` ids: chat examples end to end, their groups (domains) in equal parts.

    The next example is always of the group that has given the fewest tokens yet, so a sample mixes domains and a
    domain of long answers does not crowd out the others.

    Raises:
        CogumiError: there is not enough text for even ``MIN_CALIBRATION_SAMPLES`` samples.
    """
    from datasets import Dataset

    waiting: dict[str, list[Pair]] = {}
    for pair in reversed(pairs):  # each group's first example comes off its end first
        waiting.setdefault(pair.group, []).append(pair)
    given = dict.fromkeys(sorted(waiting), 0)
    stream: list[int] = []
    while len(stream) < samples * tokens and any(waiting.values()):
        group = min((name for name in given if waiting[name]), key=lambda name: (given[name], name))
        encoded, _ = encode_pairs(tokenizer, [waiting[group].pop()], 1 << 30)
        given[group] += len(encoded[0].ids)
        stream += encoded[0].ids
    rows = [stream[i * tokens : (i + 1) * tokens] for i in range(min(samples, len(stream) // tokens))]
    if len(rows) < MIN_CALIBRATION_SAMPLES:
        raise CogumiError(
            f"the calibration set is too small: {len(stream)} tokens give {len(rows)} sample(s) of {tokens}",
            "add examples to the dataset, or lower calibration_tokens",
        )
    if len(rows) < samples:
        log.warning("only %d of %d calibration samples: the dataset has %d tokens", len(rows), samples, len(stream))
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * tokens for _ in rows]})
    return Calibration(data, given)


def require_group_size(model: Any, group_size: int) -> None:
    """Refuse a group size that does not divide the columns of every linear layer."""
    import torch

    columns = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    for name, count in columns.items():
        if count % group_size:
            fits = [size for size in (128, 64, 32, 16) if not any(other % size for other in columns.values())]
            raise CogumiError(
                f"group size {group_size} does not divide the {count} columns of {name}",
                f"set group_size to {fits[0]}" if fits else "take a student whose widths are multiples of 16",
            )
