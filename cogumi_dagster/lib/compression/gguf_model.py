"""The served file: export the AWQ parent to GGUF, quantize, and hold it against the parent."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_export import ExportReport, quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.package import zstd_ratio
from cogumi_dagster.lib.compression.predict import predict_bytes, tensor_types
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.profile import CompressionConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity, perplexity_of
from cogumi_dagster.lib.training.student import load_checkpoint

MODEL_FILE = "model.gguf"


@dataclass(frozen=True)
class GgufReport:
    """``f16_parity`` is the export alone (must be nearly zero); ``parity`` includes quantization."""

    export: ExportReport
    f16_parity: ParityReport
    parity: ParityReport
    perplexity_parent: float
    perplexity: float
    perplexity_ratio: float
    perplexity_tokens: int


@dataclass(frozen=True)
class FrontierRow:
    """One quantization of the parent. Bytes are exact; speed is decoding, 4 streams, this machine now."""

    type: str
    bytes: int
    predicted_bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_ratio: float
    tokens_per_second: float
    zstd_ratio: float
    fallback_share: float
    """Share of weights that llama.cpp stored in a larger type because their rows do not divide by 256."""


@dataclass(frozen=True)
class FrontierReport:
    rows: tuple[FrontierRow, ...]
    perplexity_parent: float
    perplexity_tokens: int
    worst_prediction_error: float


def export_model(parent: Path, held_out: Sequence[Pair], out: Path, config: CompressionConfig) -> GgufReport:
    """Write ``out/model.gguf`` and measure it against its 16-bit parent on the held-out answers."""
    model, tokenizer = load_checkpoint(parent, "float32")
    reference = flatten(answer_logits(model, tokenizer, held_out, 1024))
    del model
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        f16 = Path(scratch) / "f16.gguf"
        write_gguf(parent, f16, provenance={"parent_sha256": file_sha256(next(parent.glob("*.safetensors")))})
        plain = parity(reference, flatten(gguf_answer_logits(f16, tokenizer, held_out)))
        export = quantize_gguf(f16, out / MODEL_FILE, config.gguf_type)
    quantized = flatten(gguf_answer_logits(out / MODEL_FILE, tokenizer, held_out))
    before, tokens = perplexity_of(reference)
    after, _ = perplexity_of(quantized)
    return GgufReport(export, plain, parity(reference, quantized), before, after, after / before, tokens)


def measure_frontier(
    parent: Path, held_out: Sequence[Pair], out: Path, config: CompressionConfig, *, progress: Progress = silent
) -> FrontierReport:
    """Quantize the parent to each of the profile's types and measure bytes, perplexity, speed and zstd."""
    from gguf import GGUFReader

    model, tokenizer = load_checkpoint(parent, "float32")
    reference, tokens = perplexity_of(answer_logits(model, tokenizer, held_out, 1024))
    del model
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        scratch = Path(folder)
        write_gguf(parent, scratch / "f16.gguf")
        reader = GGUFReader(scratch / "f16.gguf")
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        header = int(reader.data_offset)
        for number, type in enumerate(config.frontier_types):
            path = scratch / f"{type}.gguf"
            export = quantize_gguf(scratch / "f16.gguf", path, type)
            perplexity, _ = perplexity_of(gguf_answer_logits(path, tokenizer, held_out))
            rows.append(
                FrontierRow(
                    type=type,
                    bytes=export.bytes,
                    predicted_bytes=predict_bytes(shapes, type, header),
                    bits_per_weight=export.bits_per_weight,
                    perplexity=perplexity,
                    perplexity_ratio=perplexity / reference,
                    tokens_per_second=decode_speed(path),
                    zstd_ratio=zstd_ratio(path, config.zstd_level),
                    fallback_share=_fallback_share(shapes, type),
                )
            )
            path.unlink()
            progress(number + 1, len(config.frontier_types), f"{type}: {export.bytes / 1e6:.1f} MB")
    worst = max(abs(row.predicted_bytes / row.bytes - 1) for row in rows)
    return FrontierReport(tuple(rows), reference, tokens, worst)


def decode_speed(gguf: Path, streams: int = 4, tokens: int = 32) -> float:
    """Generated tokens a second with ``streams`` requests at once; prompts are short and counted in the time."""
    engine = LlamaEngine(gguf, slots=streams, context=256)
    prompts = [[{"role": "user", "content": f"Count from {i} upwards."}] for i in range(streams)]
    engine.chat_many(prompts[:1], max_tokens=4)  # type: ignore[arg-type]
    started = time.perf_counter()
    answers = engine.chat_many(prompts, max_tokens=tokens)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    engine.close()
    return sum(answer.completion_tokens for answer in answers) / seconds


def _fallback_share(shapes: dict[str, tuple[int, ...]], type: str) -> float:
    """Weights in rows that are no multiple of 256, where the type wants them to be, as a share of all."""
    if not type.endswith(("_K", "_K_M")):
        return 0.0
    total = fallen = 0
    for name, kind in tensor_types(shapes, type).items():
        weights = 1
        for size in shapes[name]:
            weights *= size
        total += weights
        fallen += weights if len(shapes[name]) == 2 and not kind.endswith("_K") else 0
    return fallen / total
