"""AWQ: engines side by side, and what brings the 4-bit export near its parent.

    python bench/awq_scales.py engines --folder DIR [--samples 16] [--grid 10]
    python bench/awq_scales.py export  --folder DIR [--samples 16] [--grid 10]
    [--checkpoint DIR --dataset DIR] [--json OUT]

``engines``: W4 group 64 rounded to nearest, and GGUF types, made from the unscaled checkpoint and from each engine's
parent. ``export``: the ways of rounding, on one parent (llm-compressor's), with and without its scales.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression_inputs import Inputs, add_arguments, inputs

from cogumi_dagster.lib.compression.awq import export_w4a16, fold_awq_scales
from cogumi_dagster.lib.compression.compressor import load_sound
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.evaluation.gguf_logits import gguf_answer_logits
from cogumi_dagster.lib.profile import AwqConfig
from cogumi_dagster.lib.training.merge import answer_logits, perplexity_of

Row = dict[str, Any]
TYPES = ("Q4_0", "Q5_K_M")
EXPORTS: tuple[Row, ...] = (
    {},
    {"observer": "mse"},
    {"symmetric": True},
    {"rounding": "gptq"},
    {"rounding": "gptq", "observer": "mse"},
    {"group_size": 32},
    {"group_size": 32, "rounding": "gptq"},
    {"group_size": 32, "rounding": "gptq", "observer": "mse"},
)


def config_of(given: argparse.Namespace, **changes: Any) -> AwqConfig:
    samples = {"calibration_samples": given.samples, "calibration_tokens": given.length, "grid": given.grid}
    return AwqConfig.model_validate({**samples, **changes})


def folded(data: Inputs, given: argparse.Namespace, engine: str, group_size: int = 64) -> tuple[Path, Row]:
    """The parent with an engine's scales, made once for each setting; its time and KL."""
    out = given.folder / f"{engine}-g{group_size}-{given.samples}x{given.length}-{given.grid}"
    note = out.with_suffix(".json")
    if not note.is_file():
        started = time.perf_counter()
        config = config_of(given, engine=engine, group_size=group_size)
        report = fold_awq_scales(data.checkpoint, data.train, data.held_out, out, config)
        figures = {
            "seconds": time.perf_counter() - started, "search_seconds": report.search_seconds,
            "kl": report.parity.mean_kl, "samples": report.calibration_samples, "tokens": report.calibration_tokens,
        }  # fmt: skip
        note.write_text(json.dumps(figures))
    return out, json.loads(note.read_text())


def export(data: Inputs, given: argparse.Namespace, checkpoint: Path, **changes: Any) -> Row:
    out = given.folder / "w4a16"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    report = export_w4a16(checkpoint, data.train, data.held_out, out, config_of(given, **changes))
    return {"ratio": report.perplexity_ratio, "megabytes": report.bytes / 1e6, "tokens": report.perplexity_tokens,
            "export_seconds": time.perf_counter() - started}  # fmt: skip


def engines(data: Inputs, given: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = load_sound(data.checkpoint)
    reference, _ = perplexity_of(answer_logits(model, tokenizer, data.held_out, 1024))
    del model
    for engine in given.parents or ("none", "llmcompressor", "autoawq"):
        checkpoint, made = (data.checkpoint, {}) if engine == "none" else folded(data, given, engine)
        row = {"parent": engine, **made, **export(data, given, checkpoint)}
        f16 = given.folder / "f16.gguf"
        write_gguf(checkpoint, f16)
        for kind in TYPES:
            path = given.folder / f"{kind}.gguf"
            quantize_gguf(f16, path, kind)
            row[kind] = perplexity_of(gguf_answer_logits(path, tokenizer, data.held_out))[0] / reference
            path.unlink()
        f16.unlink()
        yield row


def exports(data: Inputs, given: argparse.Namespace) -> Iterator[Row]:
    for parent in given.parents or ("none", "llmcompressor"):
        for changes in EXPORTS:
            group = changes.get("group_size", 64)
            checkpoint = data.checkpoint if parent == "none" else folded(data, given, parent, group)[0]
            yield {"parent": parent, **changes, **export(data, given, checkpoint, **changes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engines", "export"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--grid", type=int, default=10)
    parser.add_argument("--parents", nargs="*", choices=("none", "llmcompressor", "autoawq"))
    add_arguments(parser)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    data = inputs(given)
    rows = []
    for row in engines(data, given) if given.what == "engines" else exports(data, given):
        rows.append(row)
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
