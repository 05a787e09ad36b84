"""``cogumi``: the graph, the server, and every stage on a user's own files."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from cogumi_dagster.lib.errors import CogumiError

app = typer.Typer(
    name="cogumi",
    help="Turn large teachers into small, compressed, routed models.\n\n"
    "Start with [bold]cogumi run -p quick[/bold], then [bold]cogumi chat -p quick[/bold]. "
    "Profiles are YAML files in resources/profiles; offline, nothing asks for a key or a GPU.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OFFLINE = "TRUE"
"""Our own choice; who sets HF_HUB_OFFLINE himself, to 1 or 0, is heard."""
GRAPH, MODEL, STAGES = "The graph", "The model", "Stages, on your own files"
PROFILE_HELP = "A name in resources/profiles, or a path to a YAML file."
ProfileOption = Annotated[
    Optional[str],  # noqa: UP045 (typer reads it)
    typer.Option(
        "--profile",
        "-p",
        help=PROFILE_HELP,
        show_default="COGUMI_PROFILE, else local",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SelectOption = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it)
    typer.Option(
        help="Assets to materialize, separated by commas; else all. +NAME: with all upstream, NAME+: downstream."
    ),
]
PartitionOption = Annotated[
    str,
    typer.Option(help="Only this partition: a domain, a modifier (code and reasoning are both), or a strategy."),
]
CalibrationOption = Annotated[
    Optional[Path],  # noqa: UP045 (typer reads it)
    typer.Option(help="Questions with answers, as for curate; packaged tasks when left out."),
]


def _profile(name: str | None) -> str:
    """Make the choice of profile, and Dagster's home, known to the code location before it is loaded."""
    if name:
        os.environ["COGUMI_PROFILE"] = name
    from cogumi_dagster.home import ensure_home
    from cogumi_dagster.lib.curation.sources import names_datasets
    from cogumi_dagster.lib.profile import beside, profile_path, read_profile

    profile = read_profile(name)
    sources = beside(profile_path(name), profile.dataset.sources)
    if os.environ.get("HF_HUB_OFFLINE") == OFFLINE and (
        profile.student.source.startswith("hub:") or names_datasets(sources)
    ):
        os.environ["HF_HUB_OFFLINE"] = "0"  # no library has read it yet
    ensure_home()
    return str(profile_path(name))


def _names(select: list[str] | None) -> list[str]:
    return [name for part in select or () for name in part.split(",") if name]


@app.command(rich_help_panel=GRAPH)
def run(
    profile: ProfileOption = None,
    select: SelectOption = None,
    partition: PartitionOption = "",
) -> None:
    """Materialize what is not up to date: everything, or some assets. Run again after a kill: it continues."""
    _profile(profile)
    from cogumi_dagster.commands.graph import run_graph

    raise typer.Exit(run_graph(_names(select), partition or None))


@app.command(rich_help_panel=GRAPH)
def demo(
    profile: Annotated[str, typer.Option("--profile", "-p", help=PROFILE_HELP)] = "quick",
) -> None:
    """Run the whole pipeline, show its assets and checks, and ask the served model three questions."""
    _profile(profile)
    from cogumi_dagster.commands.graph import run_demo

    raise typer.Exit(run_demo())


@app.command(rich_help_panel=GRAPH)
def plan(
    what: Annotated[str, typer.Argument(help="'dataset' for the teachers' calls, tokens and dollars.")] = "",
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Plan a student, such as Qwen3-0.6B or a checkpoint's folder: bytes, memory, time, dollars."),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which students and types fit, such as 520MB, and what cannot and why."),
    ] = None,
    profile: ProfileOption = None,
    select: SelectOption = None,
    partition: PartitionOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what a run (of all, or with the same --select and --partition) would make and why, and how long that took.

    With --student or --budget: what a student becomes and costs, and what fits, from its shapes alone.
    """
    if what not in ("", "dataset"):
        raise CogumiError(f"there is no plan of {what!r}", "cogumi plan, or cogumi plan dataset")
    if (select or partition) and (what or student is not None or budget is not None):
        raise CogumiError("--select and --partition are for the plan of a run", "leave one of them out")
    if student is not None or budget is not None:
        if what:
            raise CogumiError(f"a plan of {what!r} takes no --student or --budget", "leave one of them out")
        from cogumi_dagster.commands.planning import show_model_plan

        show_model_plan(student, budget, profile, as_json)
        return
    _profile(profile)
    if what == "dataset":
        from cogumi_dagster.commands.teachers import show_dataset_plan

        show_dataset_plan(as_json)
        return
    from cogumi_dagster.commands.graph import show_plan

    show_plan(as_json, _names(select), partition or None)


@app.command(rich_help_panel=GRAPH)
def status(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Show every artifact and every check, with figures and thresholds."""
    _profile(profile)
    from cogumi_dagster.commands.graph import show_status

    show_status(as_json)


@app.command(rich_help_panel=GRAPH)
def verify(profile: ProfileOption = None) -> None:
    """Re-hash every artifact; exit with 1 where a byte has changed."""
    _profile(profile)
    from cogumi_dagster.commands.graph import verify_store

    raise typer.Exit(verify_store())


@app.command(rich_help_panel=GRAPH)
def report(profile: ProfileOption = None) -> None:
    """Print the path of the HTML report."""
    _profile(profile)
    from cogumi_dagster.commands.graph import report_path

    typer.echo(report_path())


@app.command(rich_help_panel=GRAPH)
def ledger(
    profile: ProfileOption = None,
    settle: Annotated[str, typer.Option(help="Settle the calls in doubt: retry or skip.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show what the teachers cost, by teacher, domain and day, and the calls in doubt."""
    _profile(profile)
    from cogumi_dagster.commands.teachers import show_ledger

    show_ledger(settle, as_json)


@app.command(rich_help_panel=GRAPH)
def dev(
    profile: ProfileOption = None,
    port: Annotated[int, typer.Option(help="Port of the Dagster UI.")] = 3000,
) -> None:
    """Open the Dagster UI with sensors and schedules running, after settling runs that a crash left behind."""
    _profile(profile)
    from cogumi_dagster.commands.graph import open_ui

    open_ui(port)


@app.command(rich_help_panel=MODEL)
def serve(
    bundle: Annotated[Optional[Path], typer.Argument(help="A bundle folder; the profile's own when left out.")] = None,  # noqa: UP045
    profile: ProfileOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(help="Port to listen on.", show_default="8600")] = None,  # noqa: UP045
    token: Annotated[
        str, typer.Option(envvar="COGUMI_TOKEN", help="Bearer token; else one that is made once and kept in a file.")
    ] = "",
) -> None:
    """Serve a bundle behind OpenAI's API: models cogumi (routed), cogumi-base, cogumi-code, ..."""
    _profile(profile)
    from cogumi_dagster.commands.model import serve_bundle

    serve_bundle(bundle, host, port, token or None)


@app.command(rich_help_panel=MODEL)
def chat(
    profile: ProfileOption = None,
    url: Annotated[str, typer.Option(help="A running server; one is started when left out.")] = "",
    port: Annotated[int, typer.Option(help="Port of the chat page.")] = 7860,
    token: Annotated[str, typer.Option(envvar="COGUMI_TOKEN", help="The server's bearer token.")] = "",
) -> None:
    """Open a chat page that shows the route, confidence and modifier of each answer."""
    _profile(profile)
    from cogumi_dagster.commands.model import open_chat

    open_chat(url, port, token or None)


@app.command(rich_help_panel=STAGES)
def dedup(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="IN... OUT", help="JSONL, JSON, Parquet or CSV (.gz, .zst too); last the JSONL to write."
        ),
    ],
    threshold: Annotated[float, typer.Option(help="Jaccard similarity from which two texts are duplicates.")] = 0.8,
    shingle: Annotated[int, typer.Option(help="Characters in a shingle.")] = 3,
    keep: Annotated[str, typer.Option(help="best (highest quality score) or first.")] = "best",
    engine: Annotated[
        str, typer.Option(help="native, ray (OUT is a folder) or datasketch (slow reference).")
    ] = "native",
    workers: Annotated[int | None, typer.Option(help="Threads; one a core when left out.", min=1)] = None,
    memory_gb: Annotated[float, typer.Option(help="Texts over this go to a file while it works.")] = 4.0,
    as_json: JsonOption = False,
) -> None:
    """Remove near-duplicates: MinHash-LSH finds candidates, exact Jaccard decides."""
    from cogumi_dagster.commands.stages import dedup_command

    dedup_command(inputs, threshold, shingle, keep, engine, workers, memory_gb, as_json)


@app.command(rich_help_panel=STAGES)
def curate(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES... OUT", help="JSONL, JSON, Parquet, CSV, .gz, .zst, globs, s3://; last a folder."
        ),
    ],
    profile: ProfileOption = None,
    mapping: Annotated[
        str | None, typer.Option(help="How to read the rows; found by their fields when left out.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Domain of rows that state none.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="The profile's when left out.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The profile's when left out.", min=1)] = None,
    min_quality: Annotated[float | None, typer.Option(help="0 to 10; the profile's (7) when left out.")] = None,
    balance: Annotated[bool, typer.Option("--balance", help="Leave rows out for the mix of domains.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn files of answered questions into a dataset: score, filter, deduplicate, split. No teacher is called."""
    from cogumi_dagster.commands.stages import curate_command
    from cogumi_dagster.lib.profile import read_profile

    bounds = min_tokens, max_tokens
    curate_command(inputs, read_profile(profile), mapping, domain, bounds, min_quality, balance, as_json)


@app.command("export-gguf", rich_help_panel=STAGES)
def export_gguf(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder: Llama, Qwen2, Qwen2.5 or Qwen3.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    kind: Annotated[str, typer.Option("--type", help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, ...")] = "Q5_K_M",
    imatrix: Annotated[str, typer.Option(help="auto, or an importance matrix in GGUF form.", show_default="none")] = "",
    calibration: CalibrationOption = None,
) -> None:
    """Write a checkpoint as GGUF, quantized by llama.cpp."""
    if imatrix:
        from cogumi_dagster.commands.quantize import export_weighted_command

        export_weighted_command(checkpoint, out, kind, imatrix, calibration)
        return
    if calibration:
        raise CogumiError("--calibration is text for an importance matrix, and none is asked for", "add --imatrix auto")
    from cogumi_dagster.commands.stages import export_gguf_command

    export_gguf_command(checkpoint, out, kind)


@app.command(rich_help_panel=STAGES)
def imatrix(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or an unquantized GGUF of a Llama.")],
    out: Annotated[Path, typer.Argument(help="The importance matrix to write, in llama.cpp's GGUF form.")],
    calibration: CalibrationOption = None,
) -> None:
    """Measure which columns of a model's matrices matter: its mean squared inputs on calibration text."""
    from cogumi_dagster.commands.quantize import imatrix_command

    imatrix_command(source, out, calibration)


@app.command(rich_help_panel=STAGES)
def quantize(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or an unquantized GGUF of a Llama.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    budget: Annotated[str, typer.Option(help="Bytes that the file may have: 90MB, 1.2GB, ...")],
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize to a byte budget: each tensor in the type that together cost the least, by measured sensitivity."""
    from cogumi_dagster.commands.quantize import quantize_command

    quantize_command(source, out, budget, calibration, as_json)


@app.command("export-lora", rich_help_panel=STAGES)
def export_lora(
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA folder.")],
    out: Annotated[Path, typer.Argument(help="The GGUF adapter to write.")],
    base: Annotated[Path, typer.Option(help="The checkpoint that the adapter was trained on.")],
) -> None:
    """Write a PEFT LoRA adapter as a GGUF adapter."""
    from cogumi_dagster.commands.stages import export_lora_command

    export_lora_command(adapter, out, base)


@app.command(rich_help_panel=STAGES)
def pack(
    source: Annotated[Path, typer.Argument(help="A file, such as a GGUF.")],
    out: Annotated[Path, typer.Argument(help="The package folder to write.")],
    level: Annotated[int, typer.Option(min=1, max=22, help="zstd level.")] = 10,
) -> None:
    """Pack a file: a GGUF's tensors split into planes, zstd, a SHA-256 manifest; unpacked again to compare."""
    from cogumi_dagster.commands.stages import pack_command

    pack_command(source, out, level)


@app.command(rich_help_panel=STAGES)
def unpack(
    package: Annotated[Path, typer.Argument(help="A package folder.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Unpack a package, checking every byte."""
    from cogumi_dagster.commands.stages import unpack_command

    unpack_command(package, out)


def main() -> None:
    """Entry point: an error that the user can mend is one sentence and exit status 1, never a traceback."""
    for noisy in ("httpx", "transformers", "sentence_transformers", "llama.cpp"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", OFFLINE)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    try:
        app()
    except CogumiError as error:
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(error.problem)}")
        if error.mend:
            console.print(f"[bold]mend:[/]  {escape(error.mend)}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror or error}{where}\nmend:  check the path, its permissions and the disk",
            file=sys.stderr,
        )
        sys.exit(1)
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name!r} is not installed\nmend:  make install", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
