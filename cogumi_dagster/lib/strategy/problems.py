"""The families of the strategy study: problems, an exact trace, and written strategies."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.evaluation.answers import Answered
from cogumi_dagster.lib.strategy.courses import check_and_take
from cogumi_dagster.lib.tasks import FAMILIES, verify
from cogumi_dagster.lib.tasks.answers import closed_answer
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Split, Task
from cogumi_dagster.lib.tasks.scheduling import SCHEDULING

Name = TypeVar("Name")
Mix = Mapping[Difficulty, float]
EVEN: Mix = dict.fromkeys(DIFFICULTIES, 1 / len(DIFFICULTIES))
UPPER: Mix = {"medium": 1 / 2, "hard": 1 / 2}
TO_LEARN: Mix = {"easy": 1 / 6, "medium": 2 / 6, "hard": 3 / 6}
"""Traces of the longer problems teach more."""


@dataclass(frozen=True)
class Suite:
    """A named set of problems on which the trained student is measured besides the stages' own."""

    name: str
    size: int
    draw: Callable[[int, int], list[Task]]
    """(count, seed) -> problems; one may come more than once."""
    aims: Mapping[str, float] = field(default_factory=dict)
    """What the student should reach: figure (``accuracy``, ``balanced accuracy``, ``recall NO``) -> at least."""
    set_size: int = 0
    """Problems of a set, where it is drawn in sets."""
    of: "Suite | None" = None
    """The suite of another adapter of whose problems these are some, so that the two can be compared on them."""

    def problems(self, share: float, seed: int) -> list[Task]:
        """``share`` of its size."""
        count = round(share * self.size)
        if self.of is None:
            return self.draw(count, seed)
        whole = self.of.problems(share, seed)
        return Random(seed).sample(whole, min(count, len(whole)))


@dataclass(frozen=True)
class StrategyFamily:
    """One family of tasks, or several that one adapter learns (``parts``).

    ``strategies[0]`` is no strategy at all; later ones are what the teacher writes after seeing failures.
    ``classes`` are the answers where there are only so many: problems are then balanced over them.
    """

    name: str
    strategies: tuple[str, ...]
    classes: tuple[str, ...] = ()
    generate: Callable[[int, int, Difficulty], list[Task]] | None = None
    """The task family's own, unless given: (count, seed, difficulty) -> problems, all classes about as often."""
    generate_lessons: Callable[[int, int, Difficulty], list[Task]] | None = None
    """What the student learns from, where that is not drawn as the problems are."""
    execute: Callable[[Task], str] | None = None
    """The trace of the last strategy on a problem, where that is not the task family's own solution."""
    suites: tuple[Suite, ...] = ()
    parts: tuple["StrategyFamily", ...] = ()

    def each(self) -> tuple["StrategyFamily", ...]:
        """The families that it is made of: itself, unless it has parts."""
        return self.parts or (self,)

    def problems(self, count: int, seed: int, split: Split, mix: Mix = EVEN) -> list[Task]:
        """``count`` problems of one split, distinct at each level; levels in equal parts or in ``mix``."""
        return [task for one, size in self._shares(count) for task in one._drawn(one._generate, size, seed, split, mix)]

    def lessons(self, count: int, seed: int, apart: Sequence[Task] = ()) -> list[Task]:
        """``count`` problems of the training split to learn from; none has the trace of one of ``apart``, on which the
        student is measured (a trace may end before its problem does)."""
        shares, traces = self._shares(count), {task.solution for task in apart}
        drawn = (
            one._drawn(one.generate_lessons or one._generate, size, seed + 7, "train", TO_LEARN, traces)
            for one, size in shares
        )
        return [task for tasks in drawn for task in tasks]

    def stage_problems(self, count: int, seed: int) -> list[Task]:
        """What all stages are measured on: ``count`` problems of the test split.

        Raises:
            CogumiError: there are fewer, or they cannot be judged.
        """
        tasks = self.problems(count, seed + 13, "test")
        refuse_too_few(tasks, count, "strategy.test_problems")
        refuse_unjudged(tasks)
        return tasks

    def drawn_suites(self, share: float, seed: int) -> list[tuple[Suite, list[Task]]]:
        """The suites with their problems, ``share`` of each."""
        return [(suite, suite.problems(share, seed + 17)) for suite in self.suites if share]

    def measured_on(self, count: int, share: float, seed: int) -> list[Task]:
        """All that a student is measured on: ``count`` problems of the stages, and ``share`` of each suite.

        Raises:
            CogumiError: see ``stage_problems``.
        """
        suites = self.drawn_suites(share, seed)
        return [*self.stage_problems(count, seed), *(task for _, drawn in suites for task in drawn)]

    @property
    def _generate(self) -> Callable[[int, int, Difficulty], list[Task]]:
        return self.generate or FAMILIES[self.name].generate

    def _shares(self, count: int) -> list[tuple["StrategyFamily", int]]:
        sizes = _parts(count, {family.name: 1 / len(self.each()) for family in self.each()})
        return [(family, sizes[family.name]) for family in self.each()]

    def _drawn(
        self,
        generate: Callable[[int, int, Difficulty], list[Task]],
        count: int,
        seed: int,
        split: Split,
        mix: Mix,
        apart: Collection[str | None] = (),
    ) -> list[Task]:
        chosen: list[Task] = []
        counts: Counter[str | None] = Counter()
        short = 0  # easy problems may run out: harder ones take their place
        for level, share in _parts(count, mix).items():
            wanted = share + short
            # a split holds 80 % or 10 % of all problems: draw until all classes are full
            drawn = self._executed(generate(40 + wanted * (4 if split == "train" else 30), seed, level))
            inside = [task for task in drawn if task.split == split and task.solution not in apart]
            behind = sorted(self.classes, key=counts.__getitem__)  # first in an odd number
            taken = _balanced(inside, behind, wanted) if behind else inside[:wanted]
            counts.update(task.answer for task in taken)
            short = wanted - len(taken)
            chosen += taken
        return chosen

    def _executed(self, tasks: list[Task]) -> list[Task]:
        return [replace(task, solution=self.execute(task)) for task in tasks] if self.execute else tasks


def _balanced(tasks: Sequence[Task], classes: Sequence[str], wanted: int) -> list[Task]:
    """As many of each class, one of each in turn."""
    by_class = {label: [task for task in tasks if task.answer == label] for label in classes}
    turns = [task for group in zip(*by_class.values(), strict=False) for task in group]
    return turns[:wanted]


def _parts(count: int, mix: Mapping[Name, float]) -> dict[Name, int]:
    """``count`` in whole parts near the shares."""
    shares = list(mix.values())
    ends = [round(count * sum(shares[: place + 1])) for place in range(len(shares))]
    return {name: end - start for name, end, start in zip(mix, ends, [0, *ends], strict=False)}


SHARED = 300
"""Problems of a family on which the adapter for all and its own are compared."""
PUBLISHED_SET = 150


def published_sets(count: int, seed: int) -> list[Task]:
    """The study's own mix, in sets of 50 easy, 50 medium and 50 hard problems of split ``test``.

    There are some 90 easy problems in that split: a set's are distinct, the sets share them.
    """
    problems: list[Task] = []
    for number in range(max(1, round(count / PUBLISHED_SET))):
        for level in DIFFICULTIES:
            drawn = SCHEDULING.generate(40 * PUBLISHED_SET // 3, seed + 1009 * number, level)
            problems += [task for task in drawn if task.split == "test"][: PUBLISHED_SET // 3]
    return problems


def longer(count: int, seed: int) -> list[Task]:
    """Scheduling with 7 to 10 meetings, class-balanced, of split ``test``."""
    drawn = [task for task in SCHEDULING.generate_longer(40 + 15 * count, seed) if task.split == "test"]
    return _balanced(drawn, ("YES", "NO"), count)


def fresh(name: str, mix: Mix = EVEN) -> Callable[[int, int], list[Task]]:
    """Problems of the test split of a family."""
    return lambda count, seed: strategy_family(name).problems(count, seed, "test", mix)


TALLY = (
    "Give each hour a letter: 9 is a, 10 is b, and so on to 17, which is i. Go through the meetings in their order. "
    "Write each, and behind it, for every hour from its start to the one before its end, the letter and how many "
    "meetings have taken that hour so far. As soon as a number is above the rooms, stop: NO. If none ever is: YES."
)
_SINGLE = (
    StrategyFamily(
        "scheduling",
        strategies=(
            "",
            "Count how many meetings run at the same time. If that is ever more than the rooms, say NO, else YES.",
            TALLY + " Example: [9-11], [10-12], rooms 2 gives [9-11] a1 b1, [10-12] b2 c1, all within 2: YES.",
        ),
        classes=("YES", "NO"),
        generate=SCHEDULING.generate_balanced,
        generate_lessons=SCHEDULING.generate_lessons,
        suites=(
            Suite("medium and hard, class-balanced", 1000, fresh("scheduling", UPPER), {"balanced accuracy": 0.995}),
            Suite(
                "published mix, sets of 150",
                10 * PUBLISHED_SET,
                published_sets,
                {"accuracy": 0.99, "recall NO": 0.97},
                PUBLISHED_SET,
            ),
            Suite("7 to 10 meetings, class-balanced", 300, longer, {"balanced accuracy": 0.95}),
        ),
    ),
    StrategyFamily(
        "circuit_logic",
        strategies=(
            "",
            "Replace each input by its bit, then work out gate after gate.",
            "Take the gates in their order. Write each with its inputs, then with their bits (not A is 1 where A "
            "is 0), then its bit; of an xor of more than two bits, first the xor of the first two and the rest, again "
            "and again. Then write the output gate with these bits, and its bit. "
            "Example: A=0, B=1, gate and(A, not B), output or: and(A, not B) = and(0, 0) = 0, or(0) = 0.",
        ),
        classes=("0", "1"),
        suites=(Suite("fresh, class-balanced", 300, fresh("circuit_logic"), {"balanced accuracy": 0.95}),),
    ),
    StrategyFamily(
        "course_schedule",
        strategies=(
            "",
            "Look for a circle of courses that wait for each other. If there is one, say False, else True.",
            "Write the courses to do and the pairs a>b that are left. For each course, the lowest first, write a pair "
            "that ends in it. The first course in which none ends is free: take it, strike it and its pairs, and write "
            "again what is to do and left. None to do: True. A pair for every course, stuck: False. "
            "Example: 0>1, 2>0: 0 1 2; 0>1 2>0, 2>0 0>1 take 2, 0 1; 0>1, take 0, 1; none, take 1, all taken: True.",
        ),
        classes=("True", "False"),
        execute=check_and_take,
        suites=(Suite("fresh, class-balanced", 300, fresh("course_schedule"), {"balanced accuracy": 0.95}),),
    ),
    StrategyFamily(
        "chain_sum",
        strategies=(
            "",
            "Add the terms one after the other.",
            "Write behind plus what is added, behind minus what is taken away, and add up each of the two, digit by "
            "digit from the right: both digits and the 1 that is carried, their sum, and the digits so far. Then write "
            "the two totals with as many digits, and the nines of the second: 9 less each of its digits. Add these to "
            "the first total. If the sum has a digit more, it is over: strike the 1 in front and add 1. If not, it is "
            "under: the nines of the sum, with a minus, are the answer. Example: 57 - 12 + 68: plus 57 68; 57+68: "
            "7+8=15 5, 5+6+1=12 125; minus 12; 125 - 012, nines 987; 125+987: 5+7=12 2, 2+8+1=11 12, 1+9+1=11 1112; "
            "over 112; 112+1: 2+1=3 3, 1+0=1 13, 1+0=1 113; Answer: 113.",
        ),
        suites=(Suite("fresh", 300, fresh("chain_sum"), {"accuracy": 0.95}),),
    ),
)
_ALL = StrategyFamily(
    "all",
    strategies=tuple(
        "\n".join(f"{part.name}: {text}" for part, text in zip(_SINGLE, texts, strict=True)) if any(texts) else ""
        for texts in zip(*(part.strategies for part in _SINGLE), strict=True)
    ),
    suites=tuple(
        replace(part.suites[0], name=part.name, size=min(SHARED, part.suites[0].size), of=part.suites[0])
        for part in _SINGLE
    ),
    parts=_SINGLE,
)
STRATEGY_FAMILIES: Mapping[str, StrategyFamily] = {family.name: family for family in (*_SINGLE, _ALL)}


UNVERIFIED = ("conversation", "creative")
"""Domains of tasks that only a judge can score."""


def strategy_family(name: str) -> StrategyFamily:
    """The study's family of that name, or any other task family with a verifier: without written strategies, so that a
    model must be the teacher if there is to be one, and with open answers.

    Raises:
        CogumiError: there is none.
    """
    if name in STRATEGY_FAMILIES:
        return STRATEGY_FAMILIES[name]
    others = [other for other, family in FAMILIES.items() if family.domain not in UNVERIFIED]
    if name not in others:
        raise CogumiError(f"there is no strategy family {name!r}", nearest(name, [*STRATEGY_FAMILIES, *others]))
    return StrategyFamily(name, ("",), suites=(Suite("fresh", SHARED, fresh(name)),))


def classes_of(task: Task) -> tuple[str, ...]:
    """The answers that a task's family knows; none where answers are open."""
    found = STRATEGY_FAMILIES.get(task.family)
    return found.classes if found else ()


def refuse_too_few(tasks: Sequence[Task], wanted: int, setting: str) -> None:
    """Raises CogumiError where there are fewer than ``wanted``, which ``setting`` says, or all problems of a family of
    closed answers have the same one, so that always saying it would be right."""
    labels: dict[str, set[str | None]] = {}
    for task in tasks:
        if classes_of(task):
            labels.setdefault(task.family, set()).add(task.answer)
    if alone := [name for name, found in labels.items() if len(found) < 2]:
        raise CogumiError(f"the problems of {alone[0]} have one class only", f"raise {setting}")
    if len(tasks) < wanted:
        raise CogumiError(
            f"there are only {len(tasks)} problems of that split, {wanted} are wanted ({setting})",
            f"lower {setting}, or take another family",
        )


def refuse_unjudged(tasks: Sequence[Task]) -> None:
    """Raises CogumiError where the verdicts of a family cannot be had: all of its answers would count as wrong."""
    for task in {task.family: task for task in reversed(tasks)}.values():
        verdict = verify(task, task.solution or "")
        if verdict.passed is None:
            raise CogumiError(
                f"answers to {task.family} cannot be judged: {verdict.reason}", "install bubblewrap (make sandbox)"
            )


def said_in(answer: Answered) -> str:
    """The class that a wrong answer gives; nothing where it gives none (nor where it names the right one, but not as
    the family's answers must), or where answers are open."""
    said = closed_answer(answer.completion.text, classes_of(answer.task)) if classes_of(answer.task) else ""
    return "" if said == answer.task.answer and not answer.passed else said
