"""Single stages on a user's own files. Each calls the function that the asset calls."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogumi_dagster.commands.terminal import progress_bar
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.profile import DOMAINS, DedupConfig, Profile

console = Console(highlight=False)
ENGINES = ("native", "ray", "datasketch")


def dedup_command(
    inputs: list[Path],
    threshold: float,
    shingle: int,
    keep: str,
    engine: str,
    workers: int | None,
    memory_gb: float,
    as_json: bool,
) -> None:
    from cogumi_dagster.lib.curation.files import TABLES, as_given, as_json_lines, form_of
    from cogumi_dagster.lib.dedup.files import dedup_files
    from cogumi_dagster.lib.dedup.minhash import bands_for

    if len(inputs) < 2:
        raise CogumiError("dedup needs at least one input and an output", "cogumi dedup IN.jsonl OUT.jsonl")
    for option, value, known in (("--keep", keep, ("best", "first")), ("--engine", engine, ENGINES)):
        if value not in known:
            raise CogumiError(f"{option} is {value!r}", nearest(value, known))
    if not 0 < threshold <= 1:
        raise CogumiError(f"--threshold is {threshold}", "give a similarity above 0 and up to 1")
    bands = max(DedupConfig().bands, bands_for(threshold))
    config = DedupConfig.model_validate(
        {"threshold": threshold, "shingle": shingle, "keep": keep, "bands": bands, "engine": engine}
    )
    if engine != "ray" and (form := form_of(inputs[-1].name)[0]) in TABLES:
        plain = inputs[-1].name[: inputs[-1].name.lower().rindex(form)]
        raise CogumiError(f"{inputs[-1]} would hold JSON Lines", f"name it {plain}.jsonl")
    with as_json_lines(inputs[:-1], inputs[-1].parent) as lines:
        if engine == "ray":
            from cogumi_dagster.lib.dedup.on_ray import dedup_on_ray

            report = dedup_on_ray(list(lines), inputs[-1], config)
        else:
            with progress_bar("dedup") as progress:
                report = dedup_files(
                    list(lines), inputs[-1], config, workers=workers, memory_gb=memory_gb, progress=progress
                )
        report = replace(report, left_out=tuple(as_given(line, lines) for line in report.left_out))
    if as_json:
        print(json.dumps(report_json(report), indent=1, default=str))
        return
    console.print(
        f"[bold]{report.kept:,}[/] of {report.documents:,} kept, {report.removed:,} removed "
        f"in {report.seconds:.1f} s ({report.docs_per_second:,.0f} a second): {inputs[-1]}"
    )
    table = Table("what", "", "rows", box=None, header_style="bold")
    groups = {
        "duplicates": report.categories,
        "by domain": report.removed_by_domain,
        "by source": report.removed_by_source,
    }
    for group, counts in groups.items():
        for name, count in sorted(counts.items(), key=lambda item: -item[1])[:12]:
            table.add_row(group, name, f"{count:,}")
            group = ""
    table.add_row("largest cluster", "", f"{report.largest_cluster:,}")
    table.add_row("pairs compared exactly", "", f"{report.candidates_verified:,}")
    table.add_row("found of the pairs at the threshold", "", f"{report.recall_at_threshold:.1%}")
    console.print(table)
    for pair in report.examples:
        console.print(f"[bold]{pair.category}[/] {pair.jaccard:.3f}  {pair.removed_id} for {pair.kept_id}")
        for mark, text in (("-", pair.removed_text), ("+", pair.kept_text)):
            console.print(Text(f"  {mark} {' '.join(text.split())[:110]}"))
    for line in report.left_out:
        console.print(f"[yellow]{line}[/]")


def curate_command(
    inputs: list[str],
    profile: Profile,
    mapping: str | None,
    domain: str | None,
    bounds: tuple[int | None, int | None],
    min_quality: float | None,
    balance: bool,
    as_json: bool,
) -> None:
    from cogumi_dagster.lib.curation.curate import curate_files
    from cogumi_dagster.lib.training.student import source_token_counter

    if len(inputs) < 2:
        raise CogumiError("curate needs at least one input and an output folder", "cogumi curate IN.jsonl OUT")
    if domain is not None and domain not in DOMAINS:
        raise CogumiError(f"--domain is {domain!r}", nearest(domain, DOMAINS))
    out = Path(inputs[-1])
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "SHA256SUMS").is_file()):
        raise CogumiError(f"{out} is there already and is no dataset", "name a new folder for the output, last")
    dataset = profile.dataset
    low, high = bounds[0] or dataset.filters.min_tokens, bounds[1] or dataset.filters.max_tokens
    threshold = dataset.quality_threshold if min_quality is None else min_quality
    filters = dataset.filters.model_copy(update={"min_tokens": low, "max_tokens": high})
    config = dataset.model_copy(update={"filters": filters, "quality_threshold": threshold})
    with progress_bar("curate") as progress:
        report = curate_files(
            inputs[:-1],
            out,
            config,
            source_token_counter(profile.student.source),
            mapping=mapping,
            domain=domain,
            balance=balance,
            seed=profile.seed,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report_json(report), indent=1, default=str))
        return
    made = report.dataset
    console.print(f"[bold]{made.rows:,}[/] of {sum(report.read.values()):,} rows kept: {out}, see {out / 'README.md'}")
    table = Table("step", "", "rows", box=None, header_style="bold")
    steps = {
        "read": report.read,
        "broken": {name: len(lines) for name, lines in report.broken.items()},
        "no response": {"": report.without_response},
        "filtered out": report.filters.dropped,
        "near-duplicates": made.dedup.categories,
        "contaminated": made.contamination.by_benchmark,
        "left for the mix": {"": made.left_for_mix},
        "written": made.splits,
    }
    for step, counts in steps.items():
        for name, count in counts.items():
            if count:
                table.add_row(step, name, f"{count:,}")
                step = ""
    console.print(table)


def export_gguf_command(checkpoint: Path, out: Path, kind: str) -> None:
    from cogumi_dagster.lib.compression.gguf_export import export_gguf

    report = export_gguf(checkpoint, out, kind)
    console.print(f"{out}: {report.type}, {report.bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight")
    console.print("tensor types: " + ", ".join(f"{name} {n / 1e6:.1f}M" for name, n in report.tensor_types.items()))


def export_lora_command(adapter: Path, out: Path, base: Path) -> None:
    from cogumi_dagster.lib.compression.gguf_lora import export_own_lora

    size = export_own_lora(adapter, out, base)
    console.print(f"{out}: {size / 1e6:.1f} MB")


def pack_command(source: Path, out: Path, level: int) -> None:
    from cogumi_dagster.lib.compression.package import pack

    if not source.is_file():
        raise CogumiError(f"there is no file {source}", "check the path")
    report = pack(source, out, level=level, dictionary_kb=128)
    console.print(
        f"{out}: {report.bytes_after:,} of {report.bytes_before:,} bytes, {report.ratio:.1%} "
        f"(zstd alone {report.ratio_zstd:.1%})"
    )
    kept = "kept" if report.dictionary_bytes else "left out"
    console.print(f"dictionary {kept}: it saves {report.dictionary_saves:,} bytes, its own taken off")
    speeds = (report.bytes_before / 1e6 / seconds for seconds in (report.pack_seconds, report.unpack_seconds))
    console.print("packed at {:.0f} MB/s, unpacked at {:.0f} MB/s; the bytes are the same".format(*speeds))


def unpack_command(package: Path, out: Path) -> None:
    from cogumi_dagster.lib.compression.package import unpack

    unpack(package, out)
    console.print(f"{out}: {out.stat().st_size:,} bytes, as the manifest says")
