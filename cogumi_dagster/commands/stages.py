"""Single stages on a user's own files. Each calls the function that the asset calls."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.evaluation.statistics import report_json

console = Console(highlight=False)


def dedup_command(inputs: list[Path], threshold: float, shingle: int, keep: str, as_json: bool) -> None:
    from cogumi_dagster.lib.curation.dedup import dedup_files
    from cogumi_dagster.lib.curation.minhash import bands_for
    from cogumi_dagster.lib.profile import DedupConfig

    if len(inputs) < 2:
        raise CogumiError("dedup needs at least one input and an output", "cogumi dedup IN.jsonl OUT.jsonl")
    if keep not in ("best", "first"):
        raise CogumiError(f"--keep is {keep!r}", nearest(keep, ("best", "first")))
    if not 0 < threshold <= 1:
        raise CogumiError(f"--threshold is {threshold}", "give a similarity above 0 and up to 1")
    bands = max(16, bands_for(threshold))
    config = DedupConfig(threshold=threshold, shingle=shingle, keep="best" if keep == "best" else "first", bands=bands)
    report = dedup_files(inputs[:-1], inputs[-1], config)
    data = report.to_json() if hasattr(report, "to_json") else report_json(report)
    if as_json:
        print(json.dumps(data, indent=1, default=str))
        return
    for name, value in data.items():
        if isinstance(value, int | float | str):
            console.print(f"{name:24} {value:,}" if isinstance(value, int) else f"{name:24} {value}")


def export_gguf_command(checkpoint: Path, out: Path, kind: str) -> None:
    from cogumi_dagster.lib.compression.gguf_export import GENERAL_FILE_TYPES, quantize_gguf, write_gguf

    if kind not in GENERAL_FILE_TYPES:
        raise CogumiError(f"unknown quantization {kind!r}", nearest(kind, GENERAL_FILE_TYPES))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        f16 = Path(folder) / "f16.gguf"
        write_gguf(checkpoint, f16)
        report = quantize_gguf(f16, out, kind)
    console.print(f"{out}: {report.type}, {report.bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight")
    console.print("tensor types: " + ", ".join(f"{name} {n / 1e6:.1f}M" for name, n in report.tensor_types.items()))


def export_lora_command(adapter: Path, out: Path, base: Path) -> None:
    from cogumi_dagster.lib.compression.gguf_export import export_lora

    if not (adapter / "adapter_config.json").is_file():
        raise CogumiError(
            f"{adapter} is not a PEFT adapter: it has no adapter_config.json", "give the adapter's folder"
        )
    size = export_lora(adapter, out, base=base, contract={})
    console.print(f"{out}: {size / 1e6:.1f} MB")


def pack_command(source: Path, out: Path, level: int) -> None:
    from cogumi_dagster.lib.compression.package import pack

    if not source.is_file():
        raise CogumiError(f"there is no file {source}", "check the path")
    for name, value in asdict(pack(source, out, level=level, dictionary_kb=128)).items():
        console.print(f"{name:26} {value:,}" if isinstance(value, int) else f"{name:26} {value}")


def unpack_command(package: Path, out: Path) -> None:
    from cogumi_dagster.lib.compression.package import unpack

    unpack(package, out)
    console.print(f"{out}: {out.stat().st_size:,} bytes, as the manifest says")
