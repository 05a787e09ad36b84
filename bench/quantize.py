"""Mixes made to a byte budget against llama.cpp's own of the same size, with and without an importance matrix.

    python bench/quantize.py CHECKPOINT --calibration FILE ... --held-out FILE ... --work FOLDER
        [--types Q4_0 Q5_K_M ... 10/70/20] [--tokens 12000] [--check 24]

Files are any that ``cogumi curate`` reads; the held-out ones must not be calibrated on. Perplexity is that of the
answers, through llama.cpp. What was measured is kept in FOLDER/results.json: run it again, with other types, to go on.
``--check N`` measures N single tensors and compares with what was predicted of them.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from cogumi_dagster.lib.compression.calibration import read_calibration
from cogumi_dagster.lib.compression.ggml import fits
from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from cogumi_dagster.lib.compression.mix import Layout, candidates, choose_types, read_layout, types_by_class
from cogumi_dagster.lib.compression.predict import FALLBACK
from cogumi_dagster.lib.compression.quantize import KINDS, file_type, quantize_file
from cogumi_dagster.lib.compression.sensitivity import (
    KlMeter,
    Losses,
    fit_scales,
    measure_curvature,
    predict_losses,
    scaled,
    stored_as,
)  # fmt: skip
from cogumi_dagster.lib.evaluation.gguf_logits import gguf_answer_logits
from cogumi_dagster.lib.evaluation.statistics import bootstrap
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import load_checkpoint

STOCK = ("Q2_K", "Q4_0", "Q5_0", "Q4_K_M", "Q5_K_M", "10/70/20")
SPECIFICATION = ((0.10, "Q5_K"), (0.80, "Q4_K"), (1.00, "Q3_K"))
"""The most sensitive 10 % of the weights at 5 bits, 70 % at 4, 20 % at 3."""

SPECIFIED = "10/70/20"
PAIRS_AT_ONCE = 16
"""A token's log-probabilities take 200 kB."""


class Results:
    """``results.json``: rows by name, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep(self, name: str, row: Any) -> None:
        self.rows[name] = row
        self.path.write_text(json.dumps(self.rows, indent=1))


def read_pairs(files: Sequence[Path], seed: int) -> list[Pair]:
    """The answered rows of all files, none twice, shuffled."""
    pairs = list(dict.fromkeys(chain.from_iterable(read_calibration(file)[0] for file in files)))
    random.Random(seed).shuffle(pairs)
    return pairs


def held_out_pairs(files: Sequence[Path], apart_from: Sequence[Pair], tokenizer: Any, tokens: int) -> list[Pair]:
    """Pairs whose answers make up ``tokens`` tokens; no question of them was calibrated on; short questions
    with long answers, as the tokens of questions cost as much and are not counted."""
    known = {pair.instruction for pair in apart_from}
    chosen, total = [], 0
    for pair in read_pairs(files, 1):
        if pair.instruction in known or len(pair.instruction) > 300 or not 300 <= len(pair.response) <= 2000:
            continue
        chosen.append(pair)
        total += len(tokenizer.encode(pair.response, add_special_tokens=False)) + 1
        if total >= tokens:
            return chosen
    raise SystemExit(f"the held-out files hold {total} answer tokens, {tokens} are asked for")


def answer_losses(gguf: Path, tokenizer: Any, pairs: Sequence[Pair]) -> list[list[float]]:
    """[nats, tokens] of each answer."""
    found = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        for logs, targets in gguf_answer_logits(gguf, tokenizer, pairs[start : start + PAIRS_AT_ONCE]):
            found.append([-float(logs.gather(1, targets[:, None]).sum()), len(targets)])
    return found


def sensitivities(checkpoint: Path, work: Path, pairs: Sequence[Pair], check: int, results: Results) -> Imatrix:
    """The importance matrix; keeps the losses that are predicted with it, and ``check`` single tensors measured."""
    if "losses" in results.rows:
        return read_imatrix(work / "imatrix.gguf")
    model, tokenizer = load_checkpoint(checkpoint, "float32")
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal started
        seconds[step], started = round(time.perf_counter() - started, 1), time.perf_counter()
        print(f"{step}: {seconds[step]} s", flush=True)

    if not (work / "imatrix.gguf").is_file():
        write_imatrix(collect_imatrix(model, tokenizer, pairs), work / "imatrix.gguf")
    imatrix = read_imatrix(work / "imatrix.gguf")
    lap("importance matrix")
    curvature = measure_curvature(model, tokenizer, pairs)
    lap("curvature")
    options = candidates(read_layout(work / "f16.gguf"), KINDS)
    meter = KlMeter(model, tokenizer, pairs)
    raw = predict_losses(work / "f16.gguf", curvature, options, imatrix)
    lap(f"errors in {len(KINDS)} types")
    scales = fit_scales(meter, work / "f16.gguf", raw, imatrix)
    lap("scales")
    losses = scaled(raw, scales)
    results.keep("tokens", {"importance matrix": imatrix.tokens, "scales": meter.tokens})
    results.keep("scales", {name: round(scale, 2) for name, scale in scales.items()})
    results.keep("check", check_single_tensors(work, losses, meter, imatrix, check))
    lap(f"{check} single tensors")
    results.keep("seconds", seconds)
    results.keep("losses", losses)
    return imatrix


def check_single_tensors(
    work: Path, losses: Losses, meter: KlMeter, imatrix: Imatrix, count: int
) -> list[tuple[str, str, float, float]]:
    """(tensor, type, predicted, measured loss) of tensors drawn at random, each alone in a type drawn at random."""
    draw = random.Random(0)
    drawn = {name: draw.choice(list(losses[name])[1:]) for name in draw.sample(list(losses), count)}
    rows = []
    for name, _, values in open_gguf(work / "f16.gguf").tensors():
        if name in drawn:
            stored = stored_as(values, drawn[name], imatrix.importance(name))
            rows.append((name, drawn[name], losses[name][drawn[name]], meter.measure({name: stored})))
    return rows


def specification_types(layout: Layout, losses: Losses) -> dict[str, str]:
    """The specification's shares, tensors ranked by loss per weight at 4 bits; a type that does not fit falls back."""
    weights = {name: prod(layout.shapes[name]) for name in losses}
    ranked = sorted(losses, key=lambda name: -losses[name]["Q4_0"] / weights[name])
    types, done, total = {}, 0.0, sum(weights.values())
    for name in ranked:
        middle = (done + weights[name] / 2) / total
        kind = next(kind for share, kind in SPECIFICATION if middle <= share)
        types[name] = kind if fits(kind, layout.shapes[name][1]) else FALLBACK[kind]
        done += weights[name]
    return types


def measure(results: Results, name: str, path: Path, tokenizer: Any, pairs: Sequence[Pair], **row: Any) -> None:
    row |= {"bytes": path.stat().st_size, "answers": answer_losses(path, tokenizer, pairs)}
    nats, tokens = np.sum(row["answers"], 0)
    results.keep(name, row)
    print(f"{name:32} {row['bytes'] / 1e6:8.2f} MB  perplexity {np.exp(nats / tokens):.4f}", flush=True)


def show(results: Results) -> None:
    rows = results.rows
    print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in rows["seconds"].items()))
    print("measured over predicted loss by class:", ", ".join(f"{k} {v:.2f}" for k, v in rows["scales"].items()))
    parent = np.array(rows["F16"]["answers"])
    tokens = int(parent[:, 1].sum())
    print(f"\n{len(parent)} held-out answers, {tokens:,} tokens; F16 perplexity {_perplexity(parent):.4f}\n")
    print("| file | MB | perplexity | over F16 | against llama.cpp's mix, 95 % | against it with imatrix, 95 % |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if isinstance(row, Mapping) and "answers" in row and name != "F16":
            answers = np.array(row["answers"])
            over = _perplexity(answers) / _perplexity(parent) - 1
            versus = [_against(answers, rows, row.get(key)) for key in ("against", "also_against")]
            cells = [name, f"{row['bytes'] / 1e6:.2f}", f"{_perplexity(answers):.4f}", f"{over:+.2%}", *versus]
            print(f"| {' | '.join(cells)} |")
    print()
    for name, row in rows.items():
        if isinstance(row, Mapping) and "types" in row:
            print(f"{name}: " + "; ".join(f"{kind}: {types}" for kind, types in row["types"].items()))
    if rows.get("check"):
        predicted, measured = (np.array([row[i] for row in rows["check"]]) for i in (2, 3))
        rank = float(np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(measured)))[0, 1])
        ratio = np.quantile(measured / predicted, [0.1, 0.5, 0.9])
        print(
            f"\n{len(predicted)} single tensors: rank correlation {rank:.3f}, measured/predicted {np.round(ratio, 2)}"
        )


def _perplexity(answers: Any) -> float:
    nats, tokens = answers.sum(0)
    return float(np.exp(nats / tokens))


def _against(answers: Any, rows: Mapping[str, Any], other: str | None) -> str:
    """Relative change of perplexity with its bootstrap interval over answers."""
    if other is None or other not in rows:
        return ""
    both = np.column_stack([answers[:, 0] - np.array(rows[other]["answers"])[:, 0], answers[:, 1]])
    found = bootstrap(both, lambda part: float(np.expm1(part[:, 0].sum() / part[:, 1].sum())), 0)
    return f"{found.value:+.2%} ({found.low:+.2%} to {found.high:+.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=STOCK)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--check", type=int, default=24)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    results = Results(work / "results.json")
    calibration = read_pairs(options.calibration, 0)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, local_files_only=True)
    held_out = held_out_pairs(options.held_out, calibration, tokenizer, options.tokens)
    f16, out = work / "f16.gguf", work / "q.gguf"
    if not f16.is_file():
        write_gguf(options.checkpoint, f16)
    imatrix = sensitivities(options.checkpoint, work, calibration, options.check, results)
    if "F16" not in results.rows:
        measure(results, "F16", f16, tokenizer, held_out)
    layout, losses = read_layout(f16), results.rows["losses"]
    for name in chain(*([type, f"mix as {type}"] for type in options.types), (f"{t}, imatrix" for t in options.types)):
        if name in results.rows:
            continue
        type = name.removeprefix("mix as ").removesuffix(", imatrix")
        used, row = None if name == type else imatrix, {} if name == type else {"against": type}
        types = specification_types(layout, losses) if type == SPECIFIED else None
        if name.startswith("mix"):
            types = choose_types(layout, losses, results.rows[type]["bytes"])
            row |= {"also_against": f"{type}, imatrix", "types": types_by_class(types)}
        quantize_file(f16, out, file_type(layout, types) if types else type, imatrix=used, types=types)
        measure(results, name, out, tokenizer, held_out, **row)
    show(results)


if __name__ == "__main__":
    main()
