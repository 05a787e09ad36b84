"""What the teachers of modifiers and strategies are asked at most. (The dataset's: ``teaching.estimate``.)

How often they are asked depends on what the base fails, what verifiers reject and when a strategy no longer helps,
which nobody knows beforehand. So these are bounds: every task fails, every cheaper teacher is rejected in every try,
every batch is attempted.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from cogumi_dagster.lib.evaluation.answers import prompt_of, room_for
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.modifiers.failures import families_for
from cogumi_dagster.lib.modifiers.near import draw_distinct
from cogumi_dagster.lib.profile import MODIFIERS, Profile
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.strategy.teacher import DISTIL, LONGEST_STRATEGY, SHOWN_CHARACTERS, WRITING_TOKENS
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.estimate import PlannedCalls, planned_calls
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.teach import chat_messages

SAMPLE = 100
"""Tasks drawn for the mean length of a prompt."""


def plan_modifiers_and_strategies(
    profile: Profile, catalogue: Catalogue, journal: Journal | None
) -> tuple[PlannedCalls, ...]:
    """The most calls of the paid teachers in ``modifiers.cascade`` and of ``strategy.teacher``. Sends nothing.

    Answers are as long as that teacher's were so far in that domain, else as long as they may be. What the journal of
    calls has already is not taken off.

    Raises CogumiError for a teacher that the catalogue does not have.
    """
    habits = journal.habits() if journal else {}
    return tuple(
        planned_calls(
            teacher, domain, step, len(sample), sample, count / len(sample), room, habits.get((teacher.name, domain))
        )
        for teacher, domain, step, count, sample, room in chain(
            _cascade(profile, catalogue), _strategies(profile, catalogue)
        )
    )


Calls = tuple[Teacher, str, str, int, Sequence[Sequence[Message]], int]
"""Teacher, domain, step, number of calls, a sample of their messages, and the room of an answer in tokens."""


def _cascade(profile: Profile, catalogue: Catalogue) -> Iterator[Calls]:
    modifiers = profile.modifiers
    teachers = [teacher for teacher in map(catalogue.get, modifiers.cascade) if teacher.paid]
    for name in MODIFIERS if teachers else ():
        tasks = draw_distinct(families_for(name), min(modifiers.training_tasks, SAMPLE), profile.seed, "train")
        for teacher in teachers:
            calls = modifiers.training_tasks * (modifiers.tier1_samples if teacher.tier == 1 else 1)
            sample = _asked(teacher, tasks)
            yield teacher, name, f"tier {teacher.tier}", calls, sample, profile.teaching.max_tokens


def _strategies(profile: Profile, catalogue: Catalogue) -> Iterator[Calls]:
    strategy, teacher = profile.strategy, catalogue.get(profile.strategy.teacher)
    for name in strategy.families if teacher.paid else ():
        family = strategy_family(name)
        parts = len(family.each())
        tasks = family.problems(min(strategy.traces, SAMPLE), profile.seed, "train")
        room = max(profile.teaching.max_tokens, *map(room_for, tasks))
        text = "x" * LONGEST_STRATEGY * parts
        first = min(strategy.distil_every, strategy.journal_batches)
        untold = first * strategy.batch_problems + strategy.test_problems
        told = (strategy.journal_batches - first) * strategy.batch_problems + strategy.traces + strategy.test_problems
        yield teacher, name, "attempts", untold, _asked(teacher, tasks), room
        yield teacher, name, "with strategy", told, _asked(teacher, tasks, text), room
        written = strategy.journal_batches + (strategy.journal_batches - 1) // strategy.distil_every
        writing = [chat_messages(teacher, "x" * 2 * SHOWN_CHARACTERS + text + DISTIL)]
        yield teacher, name, "writing", written, writing, WRITING_TOKENS * parts


def _asked(teacher: Teacher, tasks: Sequence[Task], strategy: str = "") -> list[Sequence[Message]]:
    return [chat_messages(teacher, prompt_of(task, strategy)) for task in tasks]
