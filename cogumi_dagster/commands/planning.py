"""``plan --student`` and ``plan --budget``: what a student becomes, what it takes, and what fits, before any of it."""

import json
import math
from dataclasses import asdict

from cogumi_dagster.commands.terminal import console, duration, print_table
from cogumi_dagster.lib.planning.hardware import ACCELERATOR_UTILIZATION, CPU_UTILIZATION, accelerators, this_machine
from cogumi_dagster.lib.planning.plan import (
    DECODE_EFFICIENCY,
    ModelPlan,
    Proposal,
    Verdict,
    judge_budget,
    megabytes,
    parse_bytes,
    plan_model,
    propose,
)
from cogumi_dagster.lib.planning.shapes import ModelShape, find_student, presets, student_of
from cogumi_dagster.lib.profile import read_profile
from cogumi_dagster.lib.report.cells import Table
from cogumi_dagster.lib.teaching.estimate import DatasetPlan

SHOWN = 3
"""Types a student in the table of proposals; ``--json`` has all."""
DECODED_ON = "RTX 4090"
"""The accelerator whose decoding speed the table shows beside this machine's."""
RULE = (
    "Predicted loss is a rule of thumb, for ranking: the refitted Chinchilla law by parameters and pretraining tokens, "
    "plus llama.cpp's published Llama-3-8B perplexity by type; small students lose more in few bits."
)


def show_model_plan(student: str | None, budget: str | None, profile: str | None, as_json: bool) -> None:
    """A student's plan, a budget's proposals, or both; with a budget alone, the profile's student is judged by it."""
    limit = parse_bytes(budget) if budget is not None else None
    shape = find_student(student) if student is not None else student_of(read_profile(profile).student)
    plan, teachers = _plan(shape, profile) if student is not None else (None, None)
    verdict: Verdict | None = None
    proposals: list[Proposal] = []
    impossible: list[Verdict] = []
    if limit is not None:
        verdict = judge_budget(shape, limit)
        verdicts = [judge_budget(preset, limit) for preset in presets().values()]
        impossible = [found for found in verdicts if not found.fitting]
        proposals = propose(list(presets().values()), limit)
    if as_json:
        data = {
            "plan": asdict(plan) if plan else None,
            "teachers": teachers.to_json() if teachers else None,
            "verdict": asdict(verdict) if verdict else None,
            "proposals": [asdict(proposal) for proposal in proposals],
            "impossible": [asdict(found) for found in impossible],
        }
        print(json.dumps(data, indent=1))
        return
    if plan is not None and teachers is not None:
        _show_plan(plan, limit)
        _show_teachers(teachers)
    if verdict is not None:
        _show_verdict(verdict)
    if limit is not None:
        _show_proposals(proposals, impossible, limit)


def _plan(shape: ModelShape, profile: str | None) -> tuple[ModelPlan, DatasetPlan]:
    """The plan for a profile, and its teachers' calls as if nothing was answered yet."""
    from cogumi_dagster.lib.teaching.estimate import plan_dataset
    from cogumi_dagster.lib.training.student import package_version
    from resources import build_resources

    resources = build_resources(profile)
    settings = resources["settings"]
    plan = plan_model(shape, settings.profile, settings.sources, [this_machine(), *accelerators()])
    catalogue = resources["teachers"].catalogue
    return plan, plan_dataset(settings.profile, settings.sources, catalogue, None, engine_version=package_version())


def _show_plan(plan: ModelPlan, limit: int | None) -> None:
    console.print(
        f"[bold]{plan.student}[/]: {plan.parameters:,} parameters, {plan.linear_parameters:,} of them in the layers' "
        f"matrices; {plan.cache_bytes_per_token / 1e3:.0f} kB of cache a token of context. Profile {plan.profile}."
    )
    print_table(
        Table(
            "Artifacts",
            "",
            ("artifact", "bytes", "asset"),
            tuple((a.what, _bytes(a.bytes), a.assets) for a in plan.artifacts),
        )
    )
    here = plan.devices[0].device
    columns = [
        "type",
        "bytes",
        "bits/weight",
        "perplexity",
        "loss",
        f"tok/s, {here}",
        f"tok/s, {DECODED_ON}",
        "stored as",
    ]
    lines = []
    for row in plan.types:
        line = [
            row.type, _bytes(row.bytes), f"{row.bits_per_weight:.2f}", f"x {math.exp(row.penalty):.3f}",
            "unknown" if row.loss is None else f"{row.loss:.3f}", f"{row.decode[here]:,.0f}",
            f"{row.decode[DECODED_ON]:,.0f}",
            ", ".join(f"{kind} {share:.0%}" for kind, share in row.stored.items() if share >= 0.01),
        ]  # fmt: skip
        lines.append(tuple(line if limit is None else [*line[:2], "fits" if row.bytes <= limit else "", *line[2:]]))
    columns = columns if limit is None else [*columns[:2], "budget", *columns[2:]]
    print_table(Table("The served file, by type", "", tuple(columns), tuple(lines)))
    runs = tuple(
        (r.what, f"{r.parameters:,}", f"{r.tokens:,}", f"{r.steps:,}", f"{r.row_tokens:,}", f"{r.flops / 1e15:,.2f}")
        for r in plan.runs
    )
    columns = ["training", "trained weights", "tokens, at most", "steps", "tokens a row", "PFLOP"]
    print_table(Table("Training", "", tuple(columns), runs))
    devices = tuple(
        (
            d.device, _bytes(d.bytes_plain), _bytes(d.bytes_checkpointed),
            "no" if not d.fits else "recomputing" if d.checkpointing else "yes",
            f"{d.largest_row:,}", f"{d.tokens_per_second:,.0f}" if d.fits else "", _time(d.seconds) if d.fits else "",
        )
        for d in plan.devices
    )  # fmt: skip
    columns = ["device", "memory", "recomputing", "fits", "largest row", "tokens/s", "time"]
    print_table(Table(f"Training the {plan.runs[0].what}, by device", "", tuple(columns), devices))
    console.print(
        f"\n[dim]{here}: {plan.devices[0].basis}; the others: data sheets, dense bf16. Training is assumed to reach "
        f"{CPU_UTILIZATION:.0%} and {ACCELERATOR_UTILIZATION:.0%} of that (less for students under 1B), decoding one "
        f"stream {DECODE_EFFICIENCY:.0%} of the bandwidth. {plan.examples:,} examples at most, of about "
        f"{plan.example_tokens:.0f} tokens. Recomputing "
        f"is gradient checkpointing.{'' if limit else ' ' + RULE}[/]"
    )


def _show_teachers(plan: DatasetPlan) -> None:
    teachers: dict[str, list[float]] = {}
    unknown = set()
    for row in plan.rows:
        total = teachers.setdefault(row.teacher, [0, 0, 0, 0.0, 0.0])
        figures = (row.calls, row.prompt_tokens, row.completion_tokens, row.usd or 0.0, row.worst_usd or 0.0)
        teachers[row.teacher] = [a + b for a, b in zip(total, figures, strict=True)]
        unknown |= {row.teacher} if row.usd is None else set()
    lines = tuple(
        (name, *(f"{count:,.0f}" for count in total[:3]),
         *("price unknown" if name in unknown else f"${usd:,.2f}" for usd in total[3:]))
        for name, total in teachers.items()
    )  # fmt: skip
    columns = ("teacher", "calls", "prompt tokens", "completion tokens", "usd", "usd, at most")
    print_table(Table("Teachers, if nothing is answered yet", "", columns, lines))
    console.print("[dim]By domain, and less what the journal already has: cogumi plan dataset.[/]")


def _show_verdict(verdict: Verdict) -> None:
    limit = megabytes(verdict.budget)
    if verdict.fitting:
        best = verdict.fitting[0]
        console.print(
            f"\n[green]{verdict.student} fits {limit}[/] as {', '.join(verdict.fitting)}; {best} loses least. "
            f"({verdict.bits_per_weight:.2f} bits for each weight)"
        )
    else:
        console.print(f"\n[red]{verdict.student} cannot fit {limit}:[/] {verdict.reason}.")


def _show_proposals(proposals: list[Proposal], impossible: list[Verdict], limit: int) -> None:
    if not proposals:
        console.print("No student that is known by name fits.")
    else:
        marks = {name: "" if shape.model_type == "llama" else " *" for name, shape in presets().items()}
        shown = [p for p in proposals if [q for q in proposals if q.student == p.student].index(p) < SHOWN]
        lines = tuple(
            (p.student + marks[p.student], p.type, _bytes(p.bytes), f"{p.bits_per_weight:.2f}", f"{p.loss:.3f}")
            for p in shown
        )
        columns = ("student", "type", "bytes", "bits/weight", "predicted loss")
        print_table(Table(f"What fits {megabytes(limit)}, lowest predicted loss first", "", columns, lines))
        console.print(f"[dim]{len(shown)} of {len(proposals)}, the best {SHOWN} types of each; --json has all.[/]")
        console.print("[dim]* no Llama: for export-gguf and quantize, not for the graph.[/]")
    if impossible:
        refused = tuple(
            (v.student, f"{v.bits_per_weight:.2f}", f"{v.smallest_type}, {_bytes(v.smallest_bytes)}")
            for v in impossible
        )
        print_table(Table("", "", ("cannot fit", "bits left for a weight", "smallest file"), refused))
    console.print(f"\n[dim]The budget is of the served file; zstd packs it a little smaller. {RULE}[/]")


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return duration(seconds) if seconds < 5400 else f"{seconds / 3600:,.1f} h"
