"""What pruning costs and brings: methods and sparsities, before and after recovery, zeros in GGUF, bytes after zstd.

    python bench/pruning.py --folder DIR [--methods wanda sparsegpt magnitude] [--sparsities 0.2 0.35 0.5 0.65]
        [--patterns 2:4] [--gradual 0.5 0.65] [--steps 40] [--types Q8_0 Q4_0 Q5_K_M] [--checkpoint DIR --dataset DIR]

Sparsity is that of attention and feed-forward; --embeddings adds theirs. ``gradual`` rows reach it in four steps with
a quarter of the training each, the same number of training steps in all. Types are measured for one method (the first).
The row at sparsity 0 is the control: what the same training does to the unpruned parent.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression_inputs import Inputs, add_arguments, inputs

from cogumi_dagster.lib.compression.compressor import load_sound
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.gguf_read import hf_state_dict, open_gguf
from cogumi_dagster.lib.compression.gradual import prune
from cogumi_dagster.lib.compression.package import zstd_ratio
from cogumi_dagster.lib.compression.prune import class_weights
from cogumi_dagster.lib.compression.recover import recover
from cogumi_dagster.lib.evaluation.gguf_logits import gguf_answer_logits
from cogumi_dagster.lib.profile import PruningConfig, RecoveryConfig
from cogumi_dagster.lib.training.merge import perplexity_of

Row = dict[str, Any]


def config_of(method: str, sparsity: float, given: argparse.Namespace, pattern: str, gradual: bool) -> PruningConfig:
    values: Row = {
        "method": method, "sparsity_attention": sparsity, "sparsity_feed_forward": sparsity,
        "sparsity_embeddings": given.embeddings * sparsity, "mask_structure": pattern,
        "calibration_samples": given.samples, "calibration_tokens": 256,
    }  # fmt: skip
    if gradual:
        overall = given.overall * sparsity
        values["schedule"] = [round(overall * share, 4) for share in (0.25, 0.5, 0.75, 1.0)]
        values["between"] = {"steps": given.steps // 4, "learning_rate": given.rate, "batch_tokens": given.batch}
    return PruningConfig.model_validate(values)


def one(data: Inputs, config: PruningConfig, given: argparse.Namespace) -> tuple[Row, Path]:
    name = f"{config.method}-{config.sparsity_feed_forward}-{config.mask_structure}-{len(config.schedule)}"
    name += f"-{given.embeddings:g}"
    pruned, out, scratch = (given.folder / f"{name}-{kind}" for kind in ("pruned", "recovered", "scratch"))
    for folder in (pruned, out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    report = prune(data.checkpoint, data.train, data.held_out, pruned, config, scratch=scratch)
    prune_seconds = time.perf_counter() - started
    row = {
        "method": config.method + (f" {config.mask_structure}" if config.mask_structure != "0:0" else ""),
        "gradual": bool(config.schedule),
        "linear": config.sparsity_feed_forward,
        "overall": report.sparsity,
        "prune_seconds": prune_seconds,
        "perplexity_parent": report.perplexity_before,
        "pruned": report.perplexity_after / report.perplexity_before,
        "held_out_tokens": report.perplexity_tokens,
        "steps": [(step.sparsity, step.perplexity, step.perplexity_recovered) for step in report.pruning],
        "recovered": float("nan"),
        "recover_seconds": 0.0,
    }
    if not given.steps:
        return row, pruned
    steps = given.steps // 4 if config.schedule else given.steps
    recovery = RecoveryConfig(steps=steps, learning_rate=given.rate, batch_tokens=given.batch)
    started = time.perf_counter()
    after = recover(pruned, data.checkpoint, data.train, data.held_out, out, recovery, scratch=scratch / "recovery")
    assert report.masks_intact and after.mask_intact
    shutil.rmtree(scratch, ignore_errors=True)
    row["recovered"] = after.perplexity_recovered / report.perplexity_before
    row["recover_seconds"] = time.perf_counter() - started
    row["trained_tokens"] = after.tokens
    return row, out


def types(data: Inputs, checkpoint: Path, given: argparse.Namespace, label: str) -> Iterator[Row]:
    """Bytes, zstd and perplexity of each type, and the share of a checkpoint's pruned zeros that are exactly zero."""
    model, tokenizer = load_sound(checkpoint)
    names = {id(p): name for name, p in model.named_parameters()}
    classes = class_weights(model)
    masks = {names[id(w)]: (w == 0).numpy() for w in (*classes["attention"], *classes["feed_forward"])}
    f16 = given.folder / "f16.gguf"
    write_gguf(checkpoint, f16)
    for kind in given.types:
        path = given.folder / f"{kind}.gguf"
        report = quantize_gguf(f16, path, kind)
        perplexity, _ = perplexity_of(gguf_answer_logits(path, tokenizer, data.held_out))
        state = hf_state_dict(open_gguf(path))
        zeros = sum(int(mask.sum()) for mask in masks.values())
        kept = sum(int((state[name][mask] == 0).sum()) for name, mask in masks.items())
        packed = zstd_ratio(path, 10)
        yield {
            "checkpoint": label, "type": kind, "megabytes": report.bytes / 1e6,
            "zstd_megabytes": packed * report.bytes / 1e6, "zeros_kept": kept / max(1, zeros), "perplexity": perplexity,
        }  # fmt: skip
        path.unlink()
    f16.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "magnitude"])
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.2, 0.35, 0.5, 0.65])
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--gradual", nargs="*", type=float, default=[0.5, 0.65])
    parser.add_argument("--embeddings", type=float, default=0.0, help="their sparsity, as a share of the others'")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="of training; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--types", nargs="*", default=["Q8_0", "Q4_0", "Q5_K_M"])
    add_arguments(parser)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    data = inputs(given)
    model, _ = load_sound(data.checkpoint)
    classes = {name: sum(w.numel() for w in weights) for name, weights in class_weights(model).items()}
    linear = classes["attention"] + classes["feed_forward"]
    given.overall = (linear + given.embeddings * classes["embeddings"]) / sum(p.numel() for p in model.parameters())
    del model
    found: dict[str, list[Row]] = {"rows": [], "types": []}

    def types_of(checkpoint: Path, label: str) -> None:
        for row in types(data, checkpoint, given, label) if given.types else ():
            found["types"].append(row)
            print("    {type:7} {megabytes:7.1f} MB, zstd {zstd_megabytes:7.1f} MB, zeros kept {zeros_kept:6.1%}, "
                  "perplexity {perplexity:.3f}".format(**row), flush=True)  # fmt: skip
        save()

    def save() -> None:
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    cases = [("magnitude", 0.0, "0:0", False)]
    cases += [(m, s, "0:0", False) for m in given.methods for s in given.sparsities]
    cases += [(given.methods[0], zeros_of(p), p, False) for p in given.patterns]
    cases += [(given.methods[0], s, "0:0", True) for s in given.gradual]
    types_of(data.checkpoint, "unpruned")
    for method, sparsity, pattern, gradual in cases:
        row, checkpoint = one(data, config_of(method, sparsity, given, pattern, gradual), given)
        found["rows"].append(row)
        print("{method:13} {linear:.2f} linear, {overall:.3f} of all, {way}: x {pruned:7.3f} in {prune_seconds:.0f} s, "
              "after training x {recovered:.3f} in {recover_seconds:.0f} s".format(
                  **row, way="gradual" if gradual else "at once"), flush=True)  # fmt: skip
        if method == given.methods[0]:
            types_of(checkpoint, f"{row['method']} {sparsity:g}{' gradual' if gradual else ''}")
        save()


def zeros_of(pattern: str) -> float:
    zeros, _, group = pattern.partition(":")
    return int(zeros) / int(group)


if __name__ == "__main__":
    main()
