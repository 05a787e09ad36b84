"""``imatrix``, ``quantize`` and ``export-gguf --imatrix``: what needs calibration text, on a user's own model."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cogumi_dagster.commands.terminal import progress_bar
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json

console = Console(highlight=False)
AUTO = "auto"


def imatrix_command(source: Path, out: Path, calibration: Path | None) -> None:
    from cogumi_dagster.lib.compression.calibration import read_calibration
    from cogumi_dagster.lib.compression.imatrix import collect_imatrix, write_imatrix
    from cogumi_dagster.lib.training.student import load_model

    pairs, dataset = read_calibration(calibration)
    model, tokenizer = load_model(source)
    with progress_bar("importance matrix") as progress:
        imatrix = collect_imatrix(model, tokenizer, pairs, dataset=dataset, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(imatrix, out)
    console.print(f"{out}: {len(imatrix.sums)} tensors, {imatrix.tokens:,} tokens of {dataset}")


def export_weighted_command(checkpoint: Path, out: Path, kind: str, imatrix: str, calibration: Path | None) -> None:
    from cogumi_dagster.lib.compression.calibration import read_calibration
    from cogumi_dagster.lib.compression.imatrix import read_imatrix
    from cogumi_dagster.lib.compression.quantize import export_weighted

    if imatrix != AUTO and calibration is not None:
        raise CogumiError("--calibration is only read with --imatrix auto", "leave one of the two out")
    pairs, dataset = read_calibration(calibration) if imatrix == AUTO else ([], "")
    read = None if imatrix == AUTO else read_imatrix(Path(imatrix))
    with progress_bar("export") as progress:
        report, used = export_weighted(
            checkpoint, out, kind, imatrix=read, calibration=pairs, dataset=dataset, progress=progress
        )
    console.print(f"{out}: {report.type}, {report.bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight")
    console.print(f"importance matrix of {used.tokens:,} tokens of {', '.join(used.datasets) or 'unnamed text'}")


def quantize_command(source: Path, out: Path, budget: str, calibration: Path | None, as_json: bool) -> None:
    from cogumi_dagster.lib.compression.calibration import read_calibration
    from cogumi_dagster.lib.compression.quantize import quantize_source
    from cogumi_dagster.lib.planning.plan import parse_bytes

    limit = parse_bytes(budget)
    pairs, dataset = read_calibration(calibration)
    with progress_bar("quantize") as progress:
        export, mix = quantize_source(source, out, limit, pairs, dataset=dataset, progress=progress)
    if as_json:
        print(json.dumps({"out": str(out), "export": report_json(export), "mix": report_json(mix)}, indent=1))
        return
    console.print(
        f"[bold]{out}[/]: {export.bytes / 1e6:.2f} MB of {limit / 1e6:.2f}, {export.bits_per_weight:.2f} bits a weight"
    )
    console.print(
        f"KL divergence on {mix.measured_tokens:,} answer tokens of {dataset}: {mix.measured_loss:.4f} nats a token "
        f"({mix.predicted_loss:.4f} predicted)"
    )
    table = Table("tensors", "stored as", box=None, header_style="bold")
    for name, types in mix.types.items():
        table.add_row(name, types)
    console.print(table)
