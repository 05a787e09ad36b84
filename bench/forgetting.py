"""What an adapter makes the served base forget of code: nats a token of the bodies of HumanEval's own solutions, each
behind its header and docstring. What is generated says little here (SmolLM2-135M solves 10 of 164); this moves at once.

    python bench/forgetting.py STORE ADAPTER [ADAPTER ...]

STORE is the store of a profile that was run (.cogumi/local); an ADAPTER is a folder with PEFT's files, not yet packaged
(.cogumi/local/modifier_adapter/code/v-...).
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.evaluation.humaneval import Problem, load_problems, prompt_for
from cogumi_dagster.lib.training.precision import compute_dtype
from cogumi_dagster.lib.training.student import load_checkpoint


def losses(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> np.ndarray:
    """Mean negative log-likelihood of each problem's body, in nats a token."""
    import torch

    found = []
    for problem in problems:
        asked = [{"role": "user", "content": prompt_for(problem)}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before += f"```python\n{problem.prompt.strip()}\n"
        texts = (before, f"{problem.reference.rstrip()}\n```")
        context, body = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        with torch.inference_mode():
            logits = model(torch.tensor([context + body])).logits[0, -len(body) - 1 : -1].float()
        picked = logits.log_softmax(-1)[torch.arange(len(body)), torch.tensor(body)]
        found.append(-picked.mean().item())
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("adapters", nargs="+", type=Path)
    arguments = parser.parse_args()
    from peft import PeftModel

    store, problems = ArtifactStore(arguments.store), load_problems().problems
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch) / "served"
        dequantize_checkpoint(store.get("gguf_model").path / MODEL_FILE, store.get("base_checkpoint").path, served)
        precision = str(compute_dtype("cpu")).removeprefix("torch.")  # emulated, bfloat16 takes many times as long
        model, tokenizer = load_checkpoint(served, precision)
        base = losses(model.eval(), tokenizer, problems)
        print(f"base: {base.mean():.3f} nats a token, {len(problems)} problems\n", flush=True)
        print("| adapter | nats a token | more than the base, 95 % |\n|---|---|---|")
        for adapter in arguments.adapters:
            adapted = PeftModel.from_pretrained(model, adapter).eval()
            more = losses(adapted, tokenizer, problems) - base
            half = 1.96 * more.std(ddof=1) / len(more) ** 0.5
            print(f"| {adapter.name} | {base.mean() + more.mean():.3f} | {more.mean():.3f} +- {half:.3f} |", flush=True)
            model = adapted.unload()


if __name__ == "__main__":
    main()
