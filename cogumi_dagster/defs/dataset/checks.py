"""What the dataset's assets must show."""

import dagster as dg

from cogumi_dagster.defs.artifact import TEACHER_DATA
from cogumi_dagster.defs.claims import Claim, ratio
from cogumi_dagster.lib.teaching.available import check_teachers, teachers_of
from resources.settings import ProfileResource
from resources.teachers import TeachersResource

SOURCE_EXAMPLES = (
    Claim(
        "drawn_as_asked", ratio("drawn", "wanted"), "share of the wanted examples that the sources gave", at_least=0.9
    ),
    Claim(
        "no_broken_lines",
        lambda m: sum(len(lines) for lines in m["broken_lines"].values()),
        "lines of source files that could not be read",
        at_most=0,
    ),
)
TEACHER_RESPONSES = (
    Claim("some_answers", "rows", "answers kept", at_least=1, blocking=True),
    Claim("answered", lambda m: 1 - m["unanswered"] / m["tasks"], "share of tasks with an answer", at_least=0.8),
    Claim("verified", "verified_share", "share of checked answers that their verifier accepts", at_least=0.7),
    Claim(
        "nothing_in_doubt", lambda m: len(m["in_doubt"]), "calls that may have been paid and not recorded", at_most=0
    ),
    Claim(
        "teachers_available", lambda m: len(m["unavailable"]), "teachers of the mix that could not be asked", at_most=0
    ),
    Claim("cost_within_budget", lambda m: m["run_usd"] - m["cap_usd"], "dollars spent over the run's cap", at_most=0),
)
QUALITY_SCORES = (
    Claim("mean_quality", "mean", "mean score before filtering", at_least="min_mean_quality"),
    Claim("scores_spread", "spread", "standard deviation: a judge that never differs judges nothing", at_least=0.01),
)
CURATED_EXAMPLES = (
    Claim("some_kept", "kept", "examples kept", at_least=1, blocking=True),
    Claim("kept_share", ratio("kept", "rows"), "share of scored answers kept", at_least=0.5),
)
DISTILLATION_DATASET = (
    Claim("schema_valid", "checks.schema_valid", "share of records of exactly the specified form", at_least=1.0, blocking=True),
    Claim("no_near_duplicates", "checks.near_duplicates_left", "verified near-duplicates, found by datasketch", at_most=0, blocking=True),
    Claim("not_contaminated", "checks.contaminated", "records that overlap a benchmark", at_most=0, blocking=True),
    Claim("splits_disjoint", "checks.split_overlap", "instructions that are in two splits", at_most=0, blocking=True),
    Claim("mix_within_tolerance", lambda m: max(abs(row["deviation"]) for row in m["mix"] + m["difficulty"]), "largest deviation of a domain or difficulty share", at_most="mix_tolerance"),
    Claim("mean_quality", "mean_quality", "mean score after filtering", at_least="min_mean_quality"),
)  # fmt: skip


@dg.asset_check(
    asset=TEACHER_DATA,
    description="every teacher and judge that the profile names can be asked: its key is set, its price known, and its "
    "provider lists its model. Spends nothing; offline it needs no network",
)
def teachers_available(settings: ProfileResource, teachers: TeachersResource) -> dg.AssetCheckResult:
    with teachers.local() as local:
        found = check_teachers(teachers_of(settings.profile), teachers.catalogue, local)
    lost = [one for one in found if not one.ok]
    said = "; ".join(f"teacher {one.name!r} cannot be asked: {one.reason}. Mend: {one.mend}" for one in lost)
    return dg.AssetCheckResult(
        passed=not lost,
        severity=dg.AssetCheckSeverity.WARN,
        description=said or f"{len(found)} teacher(s) can be asked",
        metadata={one.name: one.reason for one in found},
    )


CHECKS = [teachers_available]
"""Those that hold no figure of an artifact's report."""
