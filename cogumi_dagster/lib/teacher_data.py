"""The version of a domain's teaching: its source files or task spec, its teachers and their prompts, the judge."""

import hashlib
import json
from pathlib import Path

from cogumi_dagster.lib.curation.judge import RUBRIC_VERSION
from cogumi_dagster.lib.curation.sources import sources_version
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DomainTeachers, Profile
from cogumi_dagster.lib.teaching.catalogue import load_catalogue, teacher_version


def domain_mix(profile: Profile, domain: str) -> tuple[DomainTeachers, ...]:
    """The teachers of a domain and their shares. Raises CogumiError where the profile names none."""
    mix: tuple[DomainTeachers, ...] = profile.teaching.mix.get(domain, ())  # type: ignore[call-overload]
    if not mix:
        raise CogumiError(
            f"profile {profile.name} names no teacher for the domain {domain}", f"add teaching.mix.{domain} to it"
        )
    return mix


def domain_examples(profile: Profile, domain: str) -> int:
    """How many tasks are drawn for a domain."""
    return max(8, round(profile.dataset.examples * profile.dataset.mix[domain]))  # type: ignore[index]


def teacher_data_version(profile: Profile, domain: str, sources: Path, catalogue: Path) -> str:
    """SHA-256 that changes exactly when this domain's teacher data would."""
    known = load_catalogue(catalogue)
    judge = [profile.teaching.judge, RUBRIC_VERSION]
    if profile.teaching.judge != "rules":
        judge.append(teacher_version(known.get(profile.teaching.judge)))
    parts = {
        "sources": sources_version(domain, sources),
        "teachers": [[t.teacher, t.share, teacher_version(known.get(t.teacher))] for t in domain_mix(profile, domain)],
        "judge": judge,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
