"""Task families by name, verification of any response, and draws with the specification's difficulty mix.

Cheap to import: families read their libraries on first use.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.sandbox import sandbox_available
from cogumi_dagster.lib.tasks import automation, code, logic, mathematics, reasoning, science, writing
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, DIFFICULTY_MIX, Difficulty, Family, Split, Task, Verdict
from cogumi_dagster.lib.tasks.scheduling import SCHEDULING

FAMILIES: dict[str, Family] = {
    "code_function": code.CODE_FUNCTION,
    "code_output": code.CODE_OUTPUT,
    "code_expression": code.CODE_EXPRESSION,
    "code_value": code.CODE_VALUE,
    "code_definition": code.CODE_DEFINITION,
    "scheduling": SCHEDULING,
    "spell_backward": reasoning.SPELL_BACKWARD,
    "letter_counting": reasoning.LETTER_COUNTING,
    "number_filtering": reasoning.NUMBER_FILTERING,
    "word_sorting": reasoning.WORD_SORTING,
    "needle_haystack": reasoning.NEEDLE,
    "color_cube": reasoning.COLOR_CUBE,
    "weekday_offset": reasoning.WEEKDAY_OFFSET,
    "circuit_logic": logic.CIRCUIT,
    "course_schedule": logic.COURSES,
    "chain_sum": mathematics.CHAIN_SUM,
    "products": mathematics.PRODUCTS,
    "gcd": mathematics.GCD,
    "simple_equations": mathematics.SIMPLE_EQUATIONS,
    "prime_factorization": mathematics.PRIME_FACTORS,
    "leg_counting": mathematics.LEG_COUNTING,
    "fraction_simplification": mathematics.FRACTIONS,
    "gsm_symbolic": mathematics.WORD_PROBLEMS,
    "science_mechanics": science.MECHANICS,
    "science_electricity": science.ELECTRICITY,
    "science_units": science.CONVERSION,
    "science_chemistry": science.CHEMISTRY,
    "science_matter": science.MATTER,
    "automation_calendar": automation.AUTOMATION_CALENDAR,
    "automation_files": automation.AUTOMATION_FILES,
    "automation_messages": automation.AUTOMATION_MESSAGES,
    "automation_home": automation.AUTOMATION_HOME,
    "conversation_guided": writing.CONVERSATION,
    "creative_guided": writing.CREATIVE,
}

FILE_FAMILY = "file"
"""Rows of a user's own file: they have a response but no verifier."""

Pool = Callable[[int, Difficulty], list[Task]]
"""``pool(count, difficulty)``: up to ``count`` distinct tasks; fewer means that there are no more."""

_MARGIN = 8
_MOST_DRAWN = 100_000
"""Tasks asked of one family at one difficulty; a larger demand counts as exhausted."""


def get_family(name: str) -> Family:
    """The family of that name. Raises CogumiError with the nearest known one."""
    if name not in FAMILIES:
        raise CogumiError(f"there is no task family {name!r}", nearest(name, FAMILIES))
    return FAMILIES[name]


def families_of(domain: str) -> tuple[str, ...]:
    """Names of the families of a domain, in the order of ``FAMILIES``. Raises CogumiError for an unknown domain."""
    names = tuple(name for name, family in FAMILIES.items() if family.domain == domain)
    if not names:
        raise CogumiError(
            f"there is no domain {domain!r}", nearest(domain, {family.domain for family in FAMILIES.values()})
        )
    return names


def family_version(name: str) -> str:
    """What changes when a family's problems, answers or verdicts do: the version of its code and of its data file."""
    family = get_family(name)
    version = str(getattr(family, "version", "1"))
    seeded = isinstance(family, writing.WritingFamily)
    return f"{version}:{writing.seeds_version(family.domain)}" if seeded else version


def cannot_judge(names: Collection[str]) -> bool:
    """Whether answers to one of these families are run to judge them, and there is no sandbox for it here."""
    return any(getattr(get_family(name), "executes", False) for name in names) and not sandbox_available()[0]


def verify(task: Task, response: str) -> Verdict:
    """Judge a response with the verifier of the task's family; None where the task comes from a user's file."""
    if task.family == FILE_FAMILY:
        return Verdict(None, "no verifier")
    return get_family(task.family).verify(task, response)


class Response(Protocol):
    """An answer as it came: a teacher's, or the engine's."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...


def judged(task: Task, response: Response, verify: Callable[[Task, str], Verdict] = verify) -> Verdict:
    """The verifier's verdict; never a pass for a response that is empty or was cut off."""
    if not response.text.strip():
        return Verdict(False, "empty")
    if response.finish_reason == "length":
        return Verdict(False, "truncated")
    if response.finish_reason == "content_filter":
        return Verdict(False, "refused")
    return verify(task, response.text)


def draw_tasks(
    families: Sequence[str] | Mapping[str, float],
    count: int,
    seed: int,
    split: Split | Collection[Split] | None = None,
) -> list[Task]:
    """``count`` distinct tasks, 30/50/20 easy/medium/hard, the families in turn (or by weight), only of ``split``.

    The same for the same arguments. Where families are finite, others and then other difficulties make up
    for them; fewer than ``count`` come back only when all are exhausted.

    Raises:
        CogumiError: an unknown family, or none.
    """
    weights = families if isinstance(families, Mapping) else dict.fromkeys(families, 1.0)
    pools: dict[str, tuple[float, Pool]] = {name: (weight, family_pool(name, seed)) for name, weight in weights.items()}
    return draw_from(pools, count, {split} if isinstance(split, str) else split)


def family_pool(name: str, seed: int) -> Pool:
    """A family as a pool."""
    family = get_family(name)
    return lambda number, difficulty: family.generate(number, seed, difficulty)


def draw_from(pools: Mapping[str, tuple[float, Pool]], count: int, splits: Collection[Split] | None) -> list[Task]:
    """``count`` distinct tasks from weighted pools, with the specification's difficulty mix."""
    if not pools:
        raise CogumiError("there is nothing to draw tasks from", "name at least one family or file")
    draw = _Draw(pools, splits)
    for difficulty, quota in zip(DIFFICULTIES, shares(count, [DIFFICULTY_MIX[d] for d in DIFFICULTIES]), strict=True):
        draw.take(quota, difficulty)
    for difficulty in DIFFICULTIES:  # what a level could not give, the others do, the easier first
        draw.take(count - len(draw.tasks), difficulty)
    return list(draw.tasks.values())


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """``count`` split by weight into whole numbers that add up to it (largest remainders)."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for index in by_remainder[: count - sum(whole)]:
        whole[index] += 1
    return whole


class _Draw:
    """The state of one draw: what was taken, from whom, and what each pool still offers."""

    def __init__(self, pools: Mapping[str, tuple[float, Pool]], splits: Collection[Split] | None) -> None:
        self.pools = pools
        self.splits = splits
        self.tasks: dict[str, Task] = {}
        self.taken: Counter[tuple[str, Difficulty]] = Counter()
        self.asked: dict[tuple[str, Difficulty], int] = {}
        self.offers: dict[tuple[str, Difficulty], list[Task]] = {}
        self.exhausted: set[tuple[str, Difficulty]] = set()

    def take(self, quota: int, difficulty: Difficulty) -> None:
        """Take up to ``quota`` tasks, each from the pool that is furthest behind its share of this level, then of all:
        what a pool gave in others' place at one level takes nothing from it at the next."""
        open_pools = [name for name, (weight, _) in self.pools.items() if weight > 0]
        first = math.ceil(quota / max(1, len(open_pools)) * 1.4) + _MARGIN
        while quota > 0 and open_pools:
            name = min(open_pools, key=lambda one: self._ahead(one, difficulty))
            task = self._next(name, difficulty, first)
            if task is None:
                open_pools.remove(name)
                continue
            self.tasks[task.id] = task
            self.taken[name, difficulty] += 1
            quota -= 1

    def _ahead(self, name: str, difficulty: Difficulty) -> tuple[float, float]:
        weight, everywhere = self.pools[name][0], sum(self.taken[name, level] for level in DIFFICULTIES)
        return (self.taken[name, difficulty] + 1) / weight, (everywhere + 1) / weight

    def _next(self, name: str, difficulty: Difficulty, first: int) -> Task | None:
        key = (name, difficulty)
        while True:
            offers = self.offers.get(key, [])
            while offers:
                task = offers.pop()
                if task.id not in self.tasks:
                    return task
            if key in self.exhausted:
                return None
            self._refill(key, first)

    def _refill(self, key: tuple[str, Difficulty], first: int) -> None:
        """Ask the pool for more than before. A pool that gives less than asked has no more."""
        number = 4 * self.asked[key] if key in self.asked else first
        self.asked[key] = number
        tasks = self.pools[key[0]][1](number, key[1])
        if len(tasks) < number or number > _MOST_DRAWN:
            self.exhausted.add(key)
        wanted = [task for task in tasks if self.splits is None or task.split in self.splits]
        self.offers[key] = wanted[::-1]
