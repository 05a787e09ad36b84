"""llm-compressor, made to run on a machine without an accelerator."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair, encode_pairs

log = logging.getLogger(__name__)

MIN_CALIBRATION_SAMPLES = 2


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


def run_oneshot(model: Any, recipe: list[Any], calibration: Any | None = None, samples: int = 0) -> None:
    """Apply a recipe to ``model`` in place, layer by layer where it needs calibration data."""
    from llmcompressor import oneshot

    arguments: dict[str, Any] = {"pipeline": "datafree"}
    if calibration is not None:
        arguments = {"dataset": calibration, "num_calibration_samples": samples, "pipeline": "sequential"}
    oneshot(model=model, recipe=recipe, **arguments)


def calibration_set(tokenizer: Any, pairs: Sequence[Pair], samples: int, tokens: int) -> Any:
    """A ``datasets.Dataset`` of ``samples`` sequences of exactly ``tokens`` ids: chat examples, end to end.

    Raises:
        CogumiError: there is not enough text for even ``MIN_CALIBRATION_SAMPLES`` samples.
    """
    from datasets import Dataset

    encoded, _ = encode_pairs(tokenizer, pairs, 1 << 30)
    stream = [token for item in encoded for token in item.ids]
    rows = [stream[i * tokens : (i + 1) * tokens] for i in range(min(samples, len(stream) // tokens))]
    if len(rows) < MIN_CALIBRATION_SAMPLES:
        raise CogumiError(
            f"the calibration set is too small: {len(stream)} tokens give {len(rows)} sample(s) of {tokens}",
            "add examples to the dataset, or lower calibration_tokens",
        )
    if len(rows) < samples:
        log.warning("only %d of %d calibration samples: the dataset has %d tokens", len(rows), samples, len(stream))
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * tokens for _ in rows]})


def require_group_size(checkpoint: Path, group_size: int) -> None:
    """Refuse a group size that does not divide the columns of every linear layer."""
    import json

    config = json.loads((checkpoint / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size"):
        if config[name] % group_size:
            fits = [
                size
                for size in (128, 64, 32, 16)
                if not (config["hidden_size"] % size or config["intermediate_size"] % size)
            ]
            raise CogumiError(
                f"group size {group_size} does not divide {name} {config[name]}",
                f"set group_size to {fits[0] if fits else 16}",
            )
