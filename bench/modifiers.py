"""What pruning a modifier costs: directions left out (ours) against the smallest weights zeroed, at equal shares.

    python bench/modifiers.py STORE MODIFIER [--shares 0.5 0.7 0.78 0.85 0.9]

STORE is the store of a profile that was run (.cogumi/quick). Losses are of the modifier's own lessons: those
that it was trained on and those held back.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.modifiers.prune import EVALUATION_TOKENS, Directions
from cogumi_dagster.lib.modifiers.train import modifier_pairs, split_lessons
from cogumi_dagster.lib.training.batches import Encoded, encode_pairs
from cogumi_dagster.lib.training.loop import evaluation_loss
from cogumi_dagster.lib.training.student import load_checkpoint


def zero_smallest(adapter: Path, out: Path, share: float) -> None:
    from safetensors.torch import load_file, save_file

    out.mkdir()
    (out / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text())
    tensors = load_file(adapter / WEIGHTS_FILE)
    for tensor in tensors.values():
        tensor.view(-1)[tensor.abs().flatten().topk(int(share * tensor.numel()), largest=False).indices] = 0.0
    save_file(tensors, out / WEIGHTS_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("modifier")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7, 0.78, 0.85, 0.9])
    arguments = parser.parse_args()
    from peft import PeftModel

    store, name = ArtifactStore(arguments.store), arguments.modifier
    failures, adapter = store.get("domain_failures", name).path, store.get("modifier_adapter", name).path
    trained = store.get("modifier_adapter", name).manifest.config
    seed, length = trained["seed"], trained["modifiers.training"]["max_length"]
    lessons = modifier_pairs(
        read_jsonl(store.get("cascade_examples", name).path / "rows.jsonl"), read_jsonl(failures / "successes.jsonl"),
        trained["modifiers.replay_share"], seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dequantize_checkpoint(
            store.get("gguf_model").path / MODEL_FILE, store.get("base_checkpoint").path, folder / "served"
        )
        base, tokenizer = load_checkpoint(folder / "served", "float32")
        model: Any = PeftModel.from_pretrained(base, adapter).eval()
        groups: list[list[Encoded]] = [
            encode_pairs(tokenizer, part, length)[0] for part in split_lessons(lessons, seed)
        ]

        def losses(label: str) -> str:
            if label != "base":
                model.load_adapter(folder / label, label)
                model.set_adapter(label)
            return " / ".join(f"{evaluation_loss(model, group, EVALUATION_TOKENS):.3f}" for group in groups)

        with model.disable_adapter():
            before = losses("base")
        directions = Directions(adapter)
        directions.write(folder / "whole", 0.0)
        print(f"{name}: {len(groups[0])} lessons trained on, {len(groups[1])} held back")
        print(f"loss of the base {before}, with the whole adapter {losses('whole')}\n")
        print("| left out | directions (trained on / held back) | smallest weights | modules, largest rank |")
        print("|---|---|---|---|")
        for number, share in enumerate(arguments.shares):
            ranks, _ = directions.write(folder / f"d{number}", share)
            zero_smallest(adapter, folder / f"z{number}", share)
            print(
                f"| {share:.0%} | {losses(f'd{number}')} | {losses(f'z{number}')} "
                f"| {len(ranks)}, {max(ranks.values())} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
