"""What a training step costs in floating-point operations, and how fast this machine multiplies matrices."""

import time
from collections.abc import Sequence
from typing import Any

from cogumi_dagster.lib.training.batches import Encoded


def step_flops(model: Any, items: Sequence[Encoded], trained: int, *, checkpointing: bool, shared: int = 0) -> float:
    """Operations of one optimizer step of a LoRA of ``trained`` parameters on ``items``; a multiply-add is two.

    Frozen weights cost 2 a token forward and 2 backward (gradients of inputs only), trained ones 2 and 4;
    causal attention 2 x length x width forward and twice that backward, a layer; the head only where a token is
    supervised. ``checkpointing`` adds the second forward pass; ``shared`` tokens are not computed a second time.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    frozen = config.num_hidden_layers * (
        2 * config.hidden_size * width
        + 2 * config.hidden_size * width * config.num_key_value_heads // config.num_attention_heads
        + 3 * config.hidden_size * config.intermediate_size
    )
    tokens = sum(len(item.ids) for item in items) - shared
    supervised = sum(len(item.ids) - item.answer_start for item in items)
    attention = config.num_hidden_layers * sum(2.0 * len(item.ids) ** 2 * width for item in items)
    passes = 3 if checkpointing else 2
    head = 4.0 * supervised * config.vocab_size * config.hidden_size
    return 2.0 * passes * frozen * tokens + 2.0 * (passes + 1) * trained * tokens + (passes + 1) * attention + head


def matmul_rate(device: str, dtype: Any, *, rows: int, inner: int, columns: int, seconds: float = 0.4) -> float:
    """Operations a second of (rows, inner) x (inner, columns), the best of as many as fit in ``seconds``."""
    import torch

    left, right = torch.randn(rows, inner).to(device, dtype), torch.randn(inner, columns).to(device, dtype)
    best, ends = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        left @ right
        while time.perf_counter() < ends:
            started = time.perf_counter()
            left @ right
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inner * columns / best
