"""What pruning a modifier costs, at equal shares: directions left out by what they move (ours) and by size, and the
smallest weights zeroed.

    python bench/modifiers.py STORE MODIFIER [--shares 0.6 0.78 0.85 0.9]

STORE is the store of a profile that was run (.cogumi/quick). Losses are of the modifier's own lessons that were held
back from training, not of the replay, 128 at most.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.modifiers.prune import EVALUATION_TOKENS, Directions, asked_of, module_curvature
from cogumi_dagster.lib.modifiers.train import (
    REHEARSAL,
    REPLAY,
    ROWS,
    SIBLINGS,
    modifier_pairs,
    read_rows,
    split_lessons,
)
from cogumi_dagster.lib.training.batches import encode_pairs
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
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.78, 0.85, 0.9])
    arguments = parser.parse_args()
    from peft import PeftModel

    store, name = ArtifactStore(arguments.store), arguments.modifier
    failures, adapter = store.get("domain_failures", name).path, store.get("modifier_adapter", name).path
    trained = store.get("modifier_adapter", name).manifest.config
    seed, length = trained["seed"], trained["modifiers.training"]["max_length"]
    taught = store.get("cascade_examples", name).path
    replayed = read_rows(failures, "successes.jsonl") + read_rows(taught, REHEARSAL)
    pairs = modifier_pairs(read_rows(taught, ROWS, SIBLINGS), replayed, trained["modifiers.replay_share"], seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dequantize_checkpoint(
            store.get("gguf_model").path / MODEL_FILE, store.get("base_checkpoint").path, folder / "served"
        )
        base, tokenizer = load_checkpoint(folder / "served", "float32")
        model: Any = PeftModel.from_pretrained(base, adapter).eval()
        taken, kept_back = split_lessons(pairs, seed)
        lessons = encode_pairs(tokenizer, taken, length)[0]
        held_back = asked_of(encode_pairs(tokenizer, [one for one in kept_back if one.group != REPLAY], length)[0])

        def loss(label: str = "") -> float:
            if label:
                model.load_adapter(folder / label, label)
                model.set_adapter(label)
            found = evaluation_loss(model, held_back, EVALUATION_TOKENS)
            if label:
                model.set_adapter("default")
                model.delete_adapter(label)
            return found

        with model.disable_adapter():
            before = loss()
        whole = loss()
        started = time.perf_counter()
        curvatures = module_curvature(model, lessons)
        seconds = time.perf_counter() - started
        print(f"{name}: {len(lessons)} lessons trained on, {len(held_back)} held back; loss of the base {before:.3f},")
        print(f"with the whole adapter {whole:.3f}; what directions move: measured in {seconds:.0f} s. Gain kept:\n")
        print("| left out | by what they move: modules, largest rank | by size | smallest weights zeroed |")
        print("|---|---|---|---|")
        ways = {"moves": Directions(adapter, curvatures), "size": Directions(adapter)}
        for number, share in enumerate(arguments.shares):
            cells = []
            for way, directions in ways.items():
                ranks, _ = directions.write(folder / f"{way}{number}", share)
                kept = (before - loss(f"{way}{number}")) / (before - whole)
                cells.append(f"{kept:.3f}: {len(ranks)}, {max(ranks.values())}")
            zero_smallest(adapter, folder / f"zeroed{number}", share)
            kept = (before - loss(f"zeroed{number}")) / (before - whole)
            print(f"| {share:.0%} | {' | '.join(cells)} | {kept:.3f} |", flush=True)


if __name__ == "__main__":
    main()
