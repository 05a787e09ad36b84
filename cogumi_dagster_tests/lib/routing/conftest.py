"""Synthetic routing examples: hard prompts have low log-probabilities and are often answered wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

WORDS = {
    "code": ["python", "function", "list", "returns", "string", "parse", "loop", "index"],
    "math": ["sum", "number", "fraction", "price", "percent", "total", "add", "apples"],
    "creative": ["poem", "story", "moon", "river", "dream", "write", "verse", "night"],
}
MODIFIERS = {"code": "code", "math": "reasoning", "creative": None}


def routing_rows(count: int, seed: int = 0, test_share: float = 0.0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        domain = list(WORDS)[number % 3]
        hardness, length = draw.random(), int(draw.integers(5, 40))
        modifier = MODIFIERS[domain]
        rows.append(
            {
                "task_id": f"task-{number}",
                "domain": domain,
                "family": domain,
                "modifier": modifier,
                "prompt": f"{' '.join(draw.choice(WORDS[domain], 10))} {number}",
                "split": "test" if draw.random() < test_share else "train",
                "base": {
                    "text": "an answer",
                    "passed": bool(draw.random() < 1 / (1 + np.exp(8 * (hardness - 0.5)))),
                    "logprobs": (-draw.exponential(0.02 + 1.5 * hardness, length)).tolist(),
                    "completion_tokens": length,
                },
                "modifiers": {modifier: {"passed": bool(draw.random() < 0.7)}} if modifier else {},
            }
        )
    return rows


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    return routing_rows
