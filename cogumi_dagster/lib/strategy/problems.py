"""The families of the strategy study: problems with two classes, an exact trace, and written strategies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.evaluation.answers import Answered
from cogumi_dagster.lib.inference import Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Split, Task
from cogumi_dagster.lib.tasks.scheduling import SCHEDULING

EVEN: Mapping[Difficulty, float] = dict.fromkeys(DIFFICULTIES, 1 / len(DIFFICULTIES))
UPPER: Mapping[Difficulty, float] = {"medium": 1 / 2, "hard": 1 / 2}
TO_LEARN: Mapping[Difficulty, float] = {"easy": 1 / 6, "medium": 2 / 6, "hard": 3 / 6}
"""Traces of the longer problems teach more."""


@dataclass(frozen=True)
class Suite:
    """A named set of problems on which the trained student is measured besides the stages' own."""

    name: str
    size: int
    draw: Callable[[int, int], list[Task]]
    """(count, seed) -> problems; one may come more than once."""


@dataclass(frozen=True)
class StrategyFamily:
    """``strategies[0]`` is no strategy at all; later ones are what the teacher writes after seeing failures."""

    name: str
    generate_balanced: Callable[[int, int, Difficulty], list[Task]]
    strategies: tuple[str, ...]
    max_tokens: int
    suites: tuple[Suite, ...] = ()

    def problems(
        self, count: int, seed: int, split: Split, mix: Mapping[Difficulty, float] | None = None
    ) -> list[Task]:
        """``count`` distinct class-balanced problems of one split, the levels in equal parts or in ``mix``."""
        return balanced(self.generate_balanced, count, seed, split, mix or EVEN)


def balanced(
    generate: Callable[[int, int, Difficulty], list[Task]],
    count: int,
    seed: int,
    split: Split,
    mix: Mapping[Difficulty, float],
) -> list[Task]:
    """As many YES as NO at each level, from a generator that gives both in equal parts."""
    chosen: list[Task] = []
    for level, wanted in _parts(count, mix).items():
        half: dict[str, list[Task]] = {"YES": [], "NO": []}
        # a split holds 80 % or 10 % of all problems: draw until both classes are full
        for task in generate(wanted * (4 if split == "train" else 30), seed, level):
            if task.split == split and len(half[str(task.answer)]) < (wanted + 1) // 2:
                half[str(task.answer)].append(task)
        pairs = [task for pair in zip(half["YES"], half["NO"], strict=False) for task in pair]
        chosen += pairs[:wanted]
    return chosen


def _parts(count: int, mix: Mapping[Difficulty, float]) -> dict[Difficulty, int]:
    """``count`` in whole parts near the shares."""
    ends = [round(count * sum(list(mix.values())[: place + 1])) for place in range(len(mix))]
    return {level: end - start for level, end, start in zip(mix, ends, [0, *ends], strict=False)}


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


def _medium_and_hard(count: int, seed: int) -> list[Task]:
    return balanced(SCHEDULING.generate_balanced, count, seed, "test", UPPER)


TALLY = (
    "Give each hour a letter: 9 is a, 10 is b, and so on to 17, which is i. Go through the meetings in their order. "
    "Write each, and behind it, for every hour from its start to the one before its end, the letter and how many "
    "meetings have taken that hour so far. As soon as a number is above the rooms, stop: NO. If none ever is: YES."
)

STRATEGY_FAMILIES: Mapping[str, StrategyFamily] = {
    "scheduling": StrategyFamily(
        name="scheduling",
        generate_balanced=SCHEDULING.generate_balanced,
        strategies=(
            "",
            "Count how many meetings run at the same time. If that is ever more than the rooms, say NO, else YES.",
            TALLY + " Example: [9-11], [10-12], rooms 2 gives [9-11] a1 b1, [10-12] b2 c1, all within 2: YES.",
        ),
        max_tokens=SCHEDULING.max_tokens,
        suites=(
            Suite("medium and hard, class-balanced", 1000, _medium_and_hard),
            Suite("published mix, sets of 150", 10 * PUBLISHED_SET, published_sets),
            Suite("7 to 10 meetings, class-balanced", 300, SCHEDULING.generate_longer),
        ),
    ),
}


def strategy_family(name: str) -> StrategyFamily:
    if name not in STRATEGY_FAMILIES:
        raise CogumiError(f"there is no strategy family {name!r}", nearest(name, STRATEGY_FAMILIES))
    return STRATEGY_FAMILIES[name]


def attempt(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    strategy: str = "",
    adapter: str | None = None,
    progress: Progress = silent,
) -> list[Answered]:
    """Answer problems, with a strategy before the question where one is given."""
    conversations: list[list[Message]] = [
        [{"role": "user", "content": f"{strategy}\n\n{task.prompt}" if strategy else task.prompt}] for task in tasks
    ]
    completions = engine.chat_many(conversations, adapter=adapter, max_tokens=SCHEDULING.max_tokens, progress=progress)
    return [Answered(t, c, verify(t, c.text)) for t, c in zip(tasks, completions, strict=True)]
