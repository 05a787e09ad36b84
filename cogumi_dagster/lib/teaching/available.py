"""Whether teachers can be asked, before anything is spent: providers withdraw models without notice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.providers import TeacherError, connect

SHOWN = 3
"""Model ids and teachers that a replacement is chosen from."""
RULES = "rules"


@dataclass(frozen=True)
class Availability:
    """Whether a teacher can be asked now; if not, why and how to mend it."""

    name: str
    ok: bool
    reason: str
    mend: str = ""
    retryable: bool = False
    """Whether it may be only for now: the provider could not be reached."""


def teachers_of(profile: Profile) -> list[str]:
    """The teachers that a profile names: in its mix, as its judge, for modifiers and for strategies."""
    names = [entry.teacher for mix in profile.teaching.mix.values() for entry in mix if entry.share > 0]
    return list(dict.fromkeys([*names, *judges(profile), *profile.modifiers.cascade, profile.strategy.teacher]))


def judges(profile: Profile) -> list[str]:
    """The teacher that judges, if any: none where rules do."""
    return [] if profile.teaching.judge == RULES else [profile.teaching.judge]


def availability(
    teacher: Teacher, engine: Callable[[], Engine] | None, listed: dict[str, set[str]] | None = None
) -> Availability:
    """Ask, for free, whether a teacher can be asked. Without a key nothing goes over the network.

    The local engine is not started: that is slow, and its failure is reported by the run itself. ``listed`` keeps the
    model lists by provider, key and address, so that each is asked for once.
    """
    if teacher.provider == "solver":
        return Availability(teacher.name, True, "the exact solver is built in")
    if teacher.provider == "local":
        if engine is None:
            return Availability(teacher.name, False, "there is no local engine", "materialize student_model first")
        return Availability(teacher.name, True, "the local engine is at hand")
    if not teacher.priced:
        return Availability(teacher.name, False, "its price is unknown", "set its prices in the catalogue")
    where = f"{teacher.provider} {teacher.api_key_env} {teacher.base_url}"
    listed = {} if listed is None else listed
    try:
        served = listed.get(where) or connect(teacher).models()
    except TeacherError as error:
        return Availability(teacher.name, False, error.problem, error.mend, error.retryable)
    listed[where] = served
    if teacher.model in served:
        return Availability(teacher.name, True, f"{teacher.provider} lists {teacher.model}")
    close = get_close_matches(teacher.model, sorted(served), n=SHOWN, cutoff=0.3)
    mend = f"set its model to {' or '.join(map(repr, close))}" if close else "set another model id in the catalogue"
    reason = f"{teacher.provider} does not list model {teacher.model!r} for this key"
    return Availability(teacher.name, False, reason, mend)


def check_teachers(
    names: Sequence[str], catalogue: Catalogue, engine: Callable[[], Engine] | None
) -> list[Availability]:
    """Each teacher's availability; where one cannot be asked, ``mend`` also names those of its tier that can.

    Raises CogumiError for a name that the catalogue has not.
    """
    listed: dict[str, set[str]] = {}
    found = [availability(catalogue.get(name), engine, listed) for name in dict.fromkeys(names)]
    return [one if one.ok else _with_others(one, catalogue, engine, listed) for one in found]


def _with_others(
    lost: Availability, catalogue: Catalogue, engine: Callable[[], Engine] | None, listed: dict[str, set[str]]
) -> Availability:
    tier = catalogue.get(lost.name).tier
    same = (t for t in catalogue.teachers.values() if t.tier == tier and t.name != lost.name and not t.stand_in)
    others = [t.name for t in same if availability(t, engine, listed).ok][:SHOWN]
    if not others:
        return lost
    offer = f"or take {' or '.join(map(repr, others))} instead, of the same tier"
    return Availability(lost.name, False, lost.reason, f"{lost.mend}, {offer}", lost.retryable)


def require_teachers(names: Sequence[str], catalogue: Catalogue, engine: Callable[[], Engine] | None) -> None:
    """Stop before anything is spent where a paid teacher cannot be asked.

    Raises:
        CogumiError: names each such teacher, why, and what to configure instead.
    """
    lost = [one for one in check_teachers(names, catalogue, engine) if not one.ok]
    if lost:
        raise CogumiError(
            "nothing was spent: " + "; ".join(f"teacher {one.name!r} cannot be asked: {one.reason}" for one in lost),
            "; ".join(dict.fromkeys(f"{one.name}: {one.mend}" for one in lost if one.mend)),
            retryable=all(one.retryable for one in lost),
        )
