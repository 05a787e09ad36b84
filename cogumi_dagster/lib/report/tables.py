"""The tables of the report, from what the artifacts say of themselves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cogumi_dagster.lib.artifacts import ArtifactRef
from cogumi_dagster.lib.report.cells import Table, label, number, proportion, right, share, size
from cogumi_dagster.lib.report.one_for_all import Compared

if TYPE_CHECKING:  # the terminal imports this module for its tables, and should not wait for the planner
    from cogumi_dagster.lib.report.predicted import Comparison

Reports = Mapping[str, Mapping[str | None, Mapping[str, Any]]]
"""By asset and partition."""


def headline(reports: Reports) -> Table:
    rows: list[tuple[str, str]] = []

    def add(name: str, asset: str, show: Any) -> None:
        report = reports.get(asset, {}).get(None)
        if report:
            rows.append((name, show(report)))

    add("Student", "student_model", lambda r: f"{r['name']}, {r['parameters']:,} parameters")
    add(
        "Training examples",
        "distillation_dataset",
        lambda r: f"{r['splits'].get('train', 0):,} of {r['rows']:,} records",
    )
    add(
        "Served file",
        "gguf_model",
        lambda r: (
            f"{r['export']['type']}, {size(r['export']['bytes'])}, {r['export']['bits_per_weight']:.2f} bits a weight"
        ),
    )
    add(
        "Perplexity against the 16-bit parent",
        "gguf_model",
        lambda r: f"x {_ratio(r)} ({r['perplexity_tokens']} tokens)",
    )
    add("Packed with zstd", "packaged_base", lambda r: size(r["bytes_after"]))
    add("Routed system", "system_evaluation", lambda r: proportion(r["routed"]))
    add("Base alone", "system_evaluation", lambda r: proportion(r["base"]))
    add("Each family's commonest answer", "system_evaluation", lambda r: proportion(r.get("majority")))
    add("Oracle", "system_evaluation", lambda r: proportion(r["oracle"]))
    add("Router AUROC", "router_model", lambda r: proportion(r["of_router"]["auroc"]))
    add("AUROC of the task's family alone", "router_model", lambda r: proportion(r.get("auroc_of_family")))
    return Table(
        "At a glance",
        "Accuracies: successes of count, 95 % interval.",
        ("figure", "value"),
        tuple(rows),
    )


def compression_tables(reports: Reports) -> Iterator[Table]:
    """What compression cost, and whether every form of the model answers alike."""
    if frontier := reports.get("compression_frontier", {}).get(None):
        yield Table(
            "Compression",
            f"Perplexity and KL from the 16-bit parent (nats a token) on {frontier['perplexity_tokens']} held-out tokens, through llama.cpp; 95 % intervals over answers.",
            ("type", "MB", "predicted MB", "bits a weight", "perplexity / parent", "mean KL", "score", "tokens/s", "zeros kept", "zstd ratio", "K-quant fallback"),
            tuple(
                (r["type"], f"{r['bytes'] / 1e6:.1f}", f"{r['predicted_bytes'] / 1e6:.1f}", f"{r['bits_per_weight']:.2f}",
                 _ratio(r), number(r.get("mean_kl")), proportion(r.get("score")), f"{r['tokens_per_second']:.0f}", share(r.get("zeros_kept")), f"{r['zstd_ratio']:.3f}", f"{r['fallback_share']:.0%} {r.get('fallbacks', '')}".strip())
                for r in frontier["rows"]
            ),
        )  # fmt: skip
    if chain := reports.get("parity_chain", {}).get(None):
        yield Table(
            "Parity chain",
            f"{chain['benchmark']}. KL in nats a token; the served answers against the first link's: McNemar p {number(chain['score_p_value'])}.",
            ("link", "must equal", "same ids", "mean KL", "max KL", "mean KL to first", "perplexity", "score", "problem"),
            tuple(
                (r["link"], number(r["must_equal"]), f"{r['same_ids']} of {r['prompts']}", number(r["mean_kl"]), number(r["max_kl"]),
                 number(r["mean_kl_first"]), number(r["perplexity"]), proportion(r["score"]), r["problem"])
                for r in chain["links"]
            ),
        )  # fmt: skip


def modifier_tables(reports: Reports) -> Iterator[Table]:
    """What each modifier repairs and breaks, who taught it, and its bytes."""
    if modifiers := reports.get("modifier_evaluation"):
        yield Table(
            "Modifiers",
            "Held-out tasks (split test), served. The gate: more repairs than breaks, beyond chance and beyond what the base "
            "repairs when it answers again with other seeds (sampling); no more breaks than repairs on a public benchmark; of the base's "
            "successes, and of those that it repeats, no more breaks than in one re-run; and everything judged. New kinds: forms of requests or expressions that no lesson had.",
            ("modifier", "commonest answers", "base", "with modifier", "failures repaired", "base again repairs", "successes kept", "of them: base again keeps", "with modifier", "of those it repeats: base again keeps", "with modifier", "new kinds, base", "with modifier", "p", "not judged", "gate"),
            tuple(
                (str(k), proportion(r.get("majority")), proportion(r["base"]), proportion(r["modified"]), proportion(r["repaired"]),
                 proportion(r["noise"]["repaired"]) if r.get("noise") else "not measured", proportion(r["kept"]),
                 *_rerun(r.get("rerun")), *_rerun(r.get("steady")), *_new_kinds(r.get("new_kinds")), number(r["p_value"]), str(r.get("not_run", "")), "passed" if r["gate_passed"] else "not passed")
                for k, r in modifiers.items()
            ),
        )  # fmt: skip
        yield Table(
            "Modifiers by family",
            "The same held-out tasks.",
            ("modifier", "family", "commonest answer", "base", "with modifier"),
            tuple(
                (
                    str(k),
                    row["family"],
                    proportion(row.get("majority")),
                    proportion(row["base"]),
                    proportion(row["modified"]),
                )
                for k, r in modifiers.items()
                for row in r.get("families", ())
            ),
        )
        public = [(str(k), row) for k, r in modifiers.items() for row in r.get("benchmarks", ())]
        if public:
            yield Table(
                "Modifiers on public benchmarks",
                "No training task was generated from them.",
                ("modifier", "benchmark", "base", "with modifier", "repaired", "broken", "McNemar p"),
                tuple(
                    (k, row["benchmark"], row["not_run"] or proportion(row["base"]), row["not_run"] or proportion(row["modified"]),
                     str(row["repaired"]), str(row["broken"]), number(row["p_value"]))
                    for k, row in public
                ),
            )  # fmt: skip
        crossed = [(str(k), row) for k, r in modifiers.items() for row in r.get("domains", ())]
        if crossed:
            yield Table(
                "Every modifier on every domain",
                "Its own held-out tasks, and fresh ones (split test) of the domains that it was not made for.",
                ("modifier", "domain", "base", "with modifier", "p"),
                tuple(
                    (k, row["domain"], proportion(row["base"]), proportion(row["modified"]), number(row["p_value"]))
                    for k, row in crossed
                ),
            )
    if cascades := reports.get("cascade_examples"):
        siblings = ", ".join(f"{name} {r['siblings']}" for name, r in cascades.items() if r.get("siblings"))
        yield Table(
            "Cascade of teachers",
            "Failed tasks by the tier that answered them first; every accepted answer passed its verifier."
            + (f" Further problems of their kinds, by the exact solver, are taught besides: {siblings}." if siblings else ""),
            ("modifier", "tier", "teachers", "tasks that reached it", "accepted", "share", "target", "dollars", "an accepted one"),
            tuple(
                (str(k), str(t["tier"]), ", ".join(t["teachers"]) or "none", str(t["asked"]), str(t["accepted"]),
                 share(t["share"]), f"{t['low']:.0%} to {t['high']:.0%}", number(t["usd"]),
                 number(t["usd"] / t["accepted"]) if t["accepted"] else "none")
                for k, r in cascades.items()
                for t in r["tiers"]
            ),
        )  # fmt: skip
    if packed := reports.get("packaged_modifier"):
        yield Table(
            "Modifiers, packed",
            "Directions left out while the gain in validation loss holds (wanted: 78 to 85 %); bytes of the whole adapter "
            "as GGUF (F16), pruned, and packed with zstd (wanted: 0.18 of the whole).",
            ("modifier", "left out", "why", "held-back lessons", "loss, base", "loss, whole", "bytes, whole", "pruned", "packed", "packed / whole"),
            tuple(
                (str(k), f"{r['pruning']['chosen']:.0%}", r["pruning"]["outcome"], str(r["pruning"]["validation_examples"]),
                 number(r["pruning"]["base_loss"]), number(r["pruning"]["adapter_loss"]), size(r["unpruned_bytes"]),
                 size(r["adapter_bytes"]), size(r["package"]["bytes_after"]),
                 f"{r['package']['bytes_after'] / r['unpruned_bytes']:.2f}")
                for k, r in packed.items() if "pruning" in r
            ),
        )  # fmt: skip


def strategy_tables(reports: Reports) -> Iterator[Table]:
    """Each study: its journal, its stages and suites, its costs."""
    for key, report in reports.get("strategy_journal", {}).items():
        unusable = ", ".join(f"{why} {count}" for why, count in report.get("unusable", {}).items())
        yield Table(
            f"Strategy journal: {key}",
            f"Teacher: {report['teacher']}" + (" (stand-in; the student attempts). " if report["stand_in"] else ". ")
            + (f"Replies that were no strategy: {unusable}. " if unusable else "")
            + f"Strategy {report['best_strategy']} did best: {report['best_text'] or 'none'}",
            ("batch", "strategy", "right", "balanced accuracy", "note"),
            tuple(
                (str(e["batch"] + 1), str(e["strategy"]), proportion(e["accuracy"]), proportion(e["balanced_accuracy"]), e["note"])
                for e in report["entries"]
            ),
        )  # fmt: skip
    for key, report in reports.get("strategy_evaluation", {}).items():
        yield Table(
            f"Strategy: {key}",
            f"{report['problems']} problems of the test split, classes balanced where answers are closed; always giving the commonest "
            f"answer has a balanced accuracy of {number(report.get('constant_balanced_accuracy'))}. Suites are of the student with adapter."
            + (f" Not told the strategy: {report['left_out']}." if report.get("left_out") else ""),
            ("stage or suite", "problems", "commonest answer", "accuracy", "easy", "medium", "hard", "in each batch", "balanced accuracy", "recall by class", "exact traces", "aims"),
            tuple(
                (
                    row.get("stage") or row["suite"], str(row["problems"]),
                    proportion((row if "suite" in row else report).get("majority")), proportion(row["accuracy"]),
                    *(right(row.get(level)) for level in ("easy", "medium", "hard")),
                    ", ".join(f"{one['successes']} of {one['count']}" for one in row.get("batches", ())),
                    proportion(row["balanced_accuracy"]),
                    ", ".join(f"{name} {proportion(recall)}" for name, recall in row["recalls"].items()) or "open answers",
                    proportion(row["exact_traces"]), _aims(row),
                )
                for row in (*report["stages"], *report["suites"])
            ),
        )  # fmt: skip
        costs = report["economics"]
        yield Table(
            f"Strategy: {key}, costs",
            f"Training {costs['training_seconds']:.0f} s and {costs['seconds_per_answer']:.2f} s an answer of this machine, at "
            f"{costs['machine_usd_per_hour']:.2f} dollars an hour (assumed): training {costs['training_usd']:.4f}, an answer "
            f"{costs['usd_per_answer']:.2e} dollars; the teacher's journal and traces {costs['teaching_usd']:.4f}. Teachers at list price for {costs['prompt_tokens']:.0f} tokens of prompt and "
            f"{costs['answer_tokens']:.0f} of answer, thinking not counted; the study's own teacher as paid; a local teacher's time is not billed and it is left out.",
            ("teacher", "dollars an answer", "times the student's", "training is paid for after"),
            tuple(
                (t["teacher"], f"{t['usd_per_answer']:.2e}", f"{t['usd_per_answer'] / costs['usd_per_answer']:.1f}" if costs["usd_per_answer"] else "",
                 f"{t['break_even']:,} answers" if t["break_even"] is not None else "never: the teacher is cheaper")
                for t in costs["teachers"]
            ),
        )  # fmt: skip


def system_table(reports: Reports) -> Iterator[Table]:
    """The routed system beside its parts."""
    if system := reports.get("system_evaluation", {}).get(None):
        rows = [(r["system"], proportion(r["accuracy"])) for r in system["systems"]]
        rows += [
            (f"{r['model']}: {r['benchmark']}", r["not_run"] or proportion(r["accuracy"])) for r in system["benchmarks"]
        ]
        yield Table(
            "Systems", f"{system['tasks']} fresh test tasks of all domains.", ("system", "accuracy"), tuple(rows)
        )


def one_for_all_table(compared: Sequence[Compared]) -> Iterator[Table]:
    """Each family's own adapter beside the one for all."""
    if compared:
        yield Table(
            "Strategies: one adapter each, and one for all",
            "On the same problems, all served.",
            ("family", "problems", "own adapter", "steps of it", "traces of it", "one for all", "steps of the one", "traces of this family", "difference", "McNemar p"),
            tuple(
                (
                    row.family, str(row.own.count), proportion(row.own.to_json()), number(row.own_steps), str(row.own_traces),
                    proportion(row.one.to_json()), number(row.one_steps), str(row.one_traces),
                    proportion(row.difference.to_json()), number(row.difference.p_value),
                )
                for row in compared
            ),
        )  # fmt: skip


def planned_table(rows: Sequence["Comparison"]) -> list[Table]:
    lines = tuple(
        (row.artifact, row.figure, number(round(row.predicted)), number(round(row.actual)), f"{row.error:+.2%}")
        for row in rows
    )
    note = "What the planner says from the student's shapes and the profile, before a run, and what the run made."
    columns = ("asset", "figure", "predicted", "actual", "difference")
    return [Table("Predicted and actual", note, columns, lines)] if lines else []


def check_table(refs: Sequence[ArtifactRef]) -> Table:
    """Every check with its figure, bound and verdict."""
    rows = []
    for ref in refs:
        for check in ref.manifest.metrics.get("checks", ()):
            interval = check.get("interval")
            shown = number(check["value"]) + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
            verdict = "pass" if check["passed"] else "fail" if check["blocking"] else "warn"
            rows.append(
                (
                    label(ref),
                    check["check"],
                    shown,
                    f"{check['bound']} {number(check['threshold'])}",
                    verdict,
                    check["description"],
                )
            )
    note = "A warning is a true figure that missed its threshold; a failed blocking check stops what is downstream."
    return Table("Checks", note, ("asset", "check", "value", "threshold", "verdict", "what it says"), tuple(rows))


def artifact_table(refs: Sequence[ArtifactRef]) -> Table:
    rows = tuple((label(r), size(r.manifest.bytes), f"{r.manifest.seconds:.1f} s", r.version[:12]) for r in refs)
    return Table("Artifacts", "Versions are SHA-256 of the contents.", ("asset", "bytes", "made in", "version"), rows)


def _aims(row: Mapping[str, Any]) -> str:
    """``accuracy 0.99 reached, recall NO 0.97 missed``; of sets also the worst."""
    missed = row.get("missed", ())
    parts = [f"{name} {aim:g} {'missed' if name in missed else 'reached'}" for name, aim in row.get("aims", {}).items()]
    if sets := row.get("sets"):
        parts.append(
            f"{len(sets)} sets, {min(one['value'] for one in sets):.3f} to {max(one['value'] for one in sets):.3f}"
        )
    return ", ".join(parts)


def _ratio(report: Mapping[str, Any]) -> str:
    """``1.007 (1.001 to 1.012)``."""
    change = report.get("perplexity_change") or {"low": None}
    interval = f" ({change['low']:.3f} to {change['high']:.3f})" if change["low"] is not None else ""
    return f"{report['perplexity_ratio']:.3f}{interval}"


def _rerun(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if not row:
        return "not measured", "not measured"
    return proportion(row["again"]), f"{proportion(row['modified'])}, p = {number(row['p_value'])}"


def _new_kinds(row: Mapping[str, Any] | None) -> tuple[str, str]:
    return (
        (proportion(row["base"]), f"{proportion(row['modified'])}, {row['kinds']} kinds") if row else ("none", "none")
    )
