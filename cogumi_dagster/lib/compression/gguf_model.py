"""The served file: export the AWQ parent to GGUF, quantize, and hold it against the parent."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression.gguf_checkpoint import checkpoint_sha256
from cogumi_dagster.lib.compression.gguf_export import ExportReport, describe_gguf, write_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from cogumi_dagster.lib.compression.mix import Layout, read_layout
from cogumi_dagster.lib.compression.package import zstd_ratio
from cogumi_dagster.lib.compression.predict import predict_bytes, tensor_types
from cogumi_dagster.lib.compression.quantize import MixReport, quantize_file, quantize_to_budget
from cogumi_dagster.lib.evaluation.answers import accuracy, answer_tasks
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits, perplexity_change
from cogumi_dagster.lib.evaluation.parity_links import ANSWER_TOKENS
from cogumi_dagster.lib.evaluation.statistics import Estimate, Proportion, report_json
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.profile import CompressionConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint

MODEL_FILE = "model.gguf"
IMATRIX_FILE = "imatrix.gguf"
MIXED = "mixed"
Types = Mapping[str, str]


@dataclass(frozen=True)
class GgufReport:
    """``f16_parity`` is the export alone (must be nearly zero); ``parity`` includes quantization.

    ``imatrix_tokens`` is 0 without an importance matrix; ``mix`` is None where no budget was set.
    """

    export: ExportReport
    f16_parity: ParityReport
    parity: ParityReport
    perplexity_parent: float
    perplexity: float
    perplexity_ratio: float
    perplexity_tokens: int
    perplexity_change: Estimate
    """The same ratio with its interval over answers."""
    imatrix_tokens: int = 0
    mix: MixReport | None = None


@dataclass(frozen=True)
class FrontierRow:
    """One quantization of the parent. Bytes are exact; speed is decoding, 4 streams, this machine now."""

    type: str
    bytes: int
    predicted_bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_ratio: float
    perplexity_change: Estimate
    """The same ratio with its interval over answers."""
    mean_kl: float
    """From the 16-bit parent, nats a token: tells types apart that perplexity on so little text does not."""
    score: Proportion
    """Of the parity chain's benchmark, greedily, through the engine; the majority baseline of open answers is 0."""
    tokens_per_second: float
    zeros_kept: float
    """Share of the parent's zeros, those that pruning made and others, that are exactly zero here; 1 if it has none."""
    zstd_ratio: float
    fallback_share: float
    """Share of weights that llama.cpp stored in another type than it wanted, as their rows are no multiple of 256."""
    fallbacks: str
    """``Q6_K as Q8_0, ...``"""
    stored_as: str
    """Share of the weights in each type."""


@dataclass(frozen=True)
class FrontierReport:
    rows: tuple[FrontierRow, ...]
    perplexity_parent: float
    perplexity_tokens: int
    worst_prediction_error: float


def export_model(
    parent: Path,
    held_out: Sequence[Pair],
    out: Path,
    config: CompressionConfig,
    *,
    calibration: Sequence[Pair] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> GgufReport:
    """Write ``out/model.gguf`` and measure it against its 16-bit parent on the held-out answers.

    With ``config.imatrix`` or ``config.budget_mb``, an importance matrix of ``calibration`` stands beside it.
    """
    model, tokenizer = load_checkpoint(parent, "float32")
    reference = flatten(answer_logits(model, tokenizer, held_out))
    out.mkdir(parents=True, exist_ok=True)
    imatrix = mix = None
    if config.imatrix or config.budget_mb is not None:
        imatrix = collect_imatrix(model, tokenizer, calibration, dataset="distillation_dataset", progress=progress)
        write_imatrix(imatrix, out / IMATRIX_FILE)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        f16 = Path(scratch) / "f16.gguf"
        write_gguf(parent, f16, provenance={"parent_sha256": checkpoint_sha256(parent)})
        plain = parity(reference, flatten(gguf_answer_logits(f16, tokenizer, held_out)))
        if config.budget_mb is None:
            export = quantize_file(f16, out / MODEL_FILE, config.gguf_type, imatrix=imatrix)
        else:
            budget = round(config.budget_mb * 1e6)
            export, mix = quantize_to_budget(
                f16, model, tokenizer, calibration, out / MODEL_FILE, budget, imatrix=imatrix, seed=seed,
                progress=progress,
            )  # fmt: skip
    quantized = gguf_answer_logits(out / MODEL_FILE, tokenizer, held_out)
    before, tokens = perplexity_of(reference)
    after, _ = perplexity_of(quantized)
    change = perplexity_change(reference, quantized, seed)
    return GgufReport(
        export, plain, parity(reference, flatten(quantized)), before, after, after / before, tokens, change,
        imatrix_tokens=imatrix.tokens if imatrix else 0, mix=mix,
    )  # fmt: skip


def measure_frontier(
    parent: Path,
    held_out: Sequence[Pair],
    out: Path,
    config: CompressionConfig,
    *,
    tasks: Sequence[Task],
    served: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> FrontierReport:
    """Quantize the parent to each of the profile's types and measure bytes, perplexity, score, speed, zeros and zstd.

    ``served`` is the folder that ``export_model`` wrote: its importance matrix is used for every row, and its file
    has a row of its own (``mixed``) where it was made to a budget.
    """
    model, tokenizer = load_checkpoint(parent, "float32")
    parents = flatten(answer_logits(model, tokenizer, held_out))
    reference, tokens = perplexity_of(parents)
    del model
    mixed = served / MODEL_FILE if served and config.budget_mb is not None else None
    total = len(config.frontier_types) + (mixed is not None)
    rows: list[FrontierRow] = []

    def add(path: Path, export: ExportReport, predicted: int, types: Types, wanted: Types) -> None:
        answers = gguf_answer_logits(path, tokenizer, held_out)
        perplexity, _ = perplexity_of(answers)
        change = perplexity_change(parents, answers, seed)
        divergence = parity(parents, flatten(answers)).mean_kl
        del answers  # 200 kB a token
        fallen = [name for name in types if types[name] != wanted[name]]
        rows.append(
            FrontierRow(
                type=export.type,
                bytes=export.bytes,
                predicted_bytes=predicted,
                bits_per_weight=export.bits_per_weight,
                perplexity=perplexity,
                perplexity_ratio=perplexity / reference,
                perplexity_change=change,
                mean_kl=divergence,
                score=_score(path, tasks),
                tokens_per_second=decode_speed(path),
                zeros_kept=zeros_kept(path, zeros),
                zstd_ratio=zstd_ratio(path, config.zstd_level),
                fallback_share=sum(prod(layout.shapes[name]) for name in fallen) / export.parameters,
                fallbacks=", ".join(sorted({f"{wanted[name]} as {types[name]}" for name in fallen})),
                stored_as=_shares(export),
            )
        )
        progress(len(rows), total, f"{export.type}: {export.bytes / 1e6:.1f} MB")

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        f16 = Path(folder) / "f16.gguf"
        write_gguf(parent, f16)
        layout, imatrix = read_layout(f16), _imatrix_of(served)
        zeros = zeros_of(f16)
        for type in config.frontier_types:
            path = Path(folder) / f"{type}.gguf"
            export = quantize_file(f16, path, type, imatrix=imatrix)
            weighted = imatrix is not None
            predicted = predict_bytes(layout.shapes, type, layout.header, imatrix=weighted)
            kinds = tensor_types(layout.shapes, type, imatrix=weighted)
            add(path, export, predicted, kinds, _wanted_types(layout, type, weighted))
            path.unlink()
        if mixed:
            types = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(mixed).reader.tensors}
            add(mixed, describe_gguf(mixed, MIXED), layout.bytes_as(types), types, types)
    worst = max(abs(row.predicted_bytes / row.bytes - 1) for row in rows)
    write_jsonl(out / "frontier.jsonl", (report_json(row) for row in rows))
    return FrontierReport(tuple(rows), reference, tokens, worst)


def _imatrix_of(served: Path | None) -> Imatrix | None:
    path = served / IMATRIX_FILE if served else None
    return read_imatrix(path) if path and path.is_file() else None


def _wanted_types(layout: Layout, type: str, imatrix: bool) -> dict[str, str]:
    """What llama.cpp would store if every row were a multiple of 256."""
    wide = {name: (*rows, -(-columns // 256) * 256) for name, (*rows, columns) in layout.shapes.items()}
    return tensor_types(wide, type, imatrix=imatrix)


def _shares(export: ExportReport) -> str:
    """``Q5_1 60 %, Q8_0 40 %``: the weights of a file by type, largest first; F32 norms are below half a percent."""
    shares = sorted(((count / export.parameters, kind) for kind, count in export.tensor_types.items()), reverse=True)
    return ", ".join(f"{kind} {share:.0%}" for share, kind in shares if share >= 0.005)


def zeros_of(gguf: Path) -> dict[str, Any]:
    """tensor -> where it is zero, as packed bits."""
    return {name: np.packbits(values == 0) for name, _, values in open_gguf(gguf).tensors()}


def zeros_kept(gguf: Path, parent: Mapping[str, Any]) -> float:
    """``parent``: its zeros, as ``zeros_of`` gives them."""
    both = sum(int(np.bitwise_count(bits & parent[name]).sum()) for name, bits in zeros_of(gguf).items())
    all_of_them = sum(int(np.bitwise_count(bits).sum()) for bits in parent.values())
    return both / all_of_them if all_of_them else 1.0


def _score(gguf: Path, tasks: Sequence[Task]) -> Proportion:
    engine = LlamaEngine(gguf, slots=max(1, min(8, len(tasks))), max_answer_tokens=ANSWER_TOKENS)
    try:
        return accuracy(answer_tasks(engine, tasks))
    finally:
        engine.close()


def decode_speed(gguf: Path, streams: int = 4, tokens: int = 32, rounds: int = 3) -> float:
    """Generated tokens a second with ``streams`` requests at once, the median of ``rounds``; prompts are short and
    counted in the time."""
    engine = LlamaEngine(gguf, slots=streams, context=256, reuse_prompts=False)
    prompts = [[{"role": "user", "content": f"Count from {i} upwards."}] for i in range(streams)]
    engine.chat_many(prompts[:1], max_tokens=4)  # type: ignore[arg-type]
    speeds = []
    for _ in range(rounds):
        started = time.perf_counter()
        answers = engine.chat_many(prompts, max_tokens=tokens)  # type: ignore[arg-type]
        speeds.append(sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - started))
    engine.close()
    return median(speeds)
