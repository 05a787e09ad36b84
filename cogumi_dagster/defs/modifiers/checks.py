"""What a modifier must earn."""

from collections.abc import Mapping
from typing import Any

from cogumi_dagster.defs.claims import Claim, ratio


def _keeps(report: Mapping[str, Any]) -> float | None:
    """Not evaluated where the base had nothing right that could be broken."""
    rows = (report["kept"]["count"], *(row["base"]["successes"] for row in report["benchmarks"]))
    return 1.0 - float(report["regresses"]) if any(rows) else None


def _unjudged(report: Mapping[str, Any]) -> int:
    return int(report["not_run"] + sum(bool(row["not_run"]) for row in report["benchmarks"]))


def _off_target(report: Mapping[str, Any]) -> int | None:
    """Not evaluated where a tier is missing: the wanted shares are of three."""
    if report["missing_tiers"]:
        return None
    return sum(not tier["low"] <= tier["share"] <= tier["high"] for tier in report["tiers"])


DOMAIN_FAILURES = (
    Claim("all_judged", lambda m: m["not_run"] / m["tasks"], "share of tasks that could not be judged (no sandbox)", at_most=0.0),
)  # fmt: skip
FAILURE_PATTERNS = (
    Claim("silhouette", "silhouette", "how well the clusters are apart (-1 to 1)", at_least=0.05),
    Claim("sizes", "smallest", "failures in the smallest pattern", at_least=2),
)
CASCADE_EXAMPLES = (
    Claim("verified_share", "verified_share", "failed tasks with a verified answer", at_least=0.9),
    Claim("tier_1_share", lambda m: m["tiers"][0]["share"], "share accepted at the cheapest tier (60-70 % wanted)", at_least=0.6),
    Claim("tiers_on_target", _off_target, "tiers whose share of the accepted answers is not as wanted (60-70, 20-25, 10-15 %)", at_most=0),
)  # fmt: skip
MODIFIER_ADAPTER = (
    Claim("loss_fell", ratio("loss_last", "loss_first"), "training loss, last fifth of the steps over the first", at_most=0.999),
)  # fmt: skip
PACKAGED_MODIFIER = (
    Claim("pruned_share", "pruning.chosen", "share of the adapter's weights left out with its gain kept (78-85 % wanted)", at_least=0.78),
    Claim("packed_share", ratio("package.bytes_after", "unpruned_bytes"), "packed bytes, of those of the whole adapter as the same kind of file (0.18 wanted)", at_most=0.18),
    Claim("bit_identical", "package.bit_identical", "unpacking gives the same bytes", at_least=1.0, blocking=True),
    Claim("parity", "parity.mean_kl", "mean KL of llama.cpp with the packaged adapter against transformers", at_most="served_kl"),
    Claim("within_budget", lambda m: m["package"]["bytes_after"] / 1e6, "packed bytes, in MB", at_most="modifier_mb"),
)  # fmt: skip
MODIFIER_EVALUATION = (
    Claim("repairs_failures", "improves", "more repairs than breaks, beyond chance (p < 0.05) and above the noise floor", at_least=1.0),
    Claim("keeps_successes", _keeps, "no more breaks than repairs beyond chance, here and on a public benchmark, nor than a re-run of the base breaks (without one: 2 %)", at_least=1.0),
    Claim("all_judged", _unjudged, "held-out tasks and benchmarks that could not be judged (no sandbox); the gate is then shut", at_most=0),
    Claim("repaired_share", "repaired", "share of the base's failures repaired", at_least=0.30),
    Claim("kept_share", "kept", "share of the base's successes kept", at_least=0.98),
    Claim("held_out_is_new", "near_lessons", "held-out tasks of which it was taught a near-duplicate", at_most=0),
    Claim("benchmark_is_new", "contaminated_lessons", "lessons that share words with a problem of HumanEval", at_most=0),
)  # fmt: skip
