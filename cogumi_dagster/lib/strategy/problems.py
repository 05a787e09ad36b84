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


@dataclass(frozen=True)
class StrategyFamily:
    """``strategies[0]`` is no strategy at all; later ones are what the teacher writes after seeing failures."""

    name: str
    generate_balanced: Callable[[int, int, Difficulty], list[Task]]
    strategies: tuple[str, ...]
    max_tokens: int

    def problems(self, count: int, seed: int, split: Split, levels: Sequence[Difficulty] = DIFFICULTIES) -> list[Task]:
        """``count`` class-balanced problems of one split, the levels in equal parts."""
        chosen: list[Task] = []
        for index, level in enumerate(levels):
            wanted = count // len(levels) + (index < count % len(levels))
            half: dict[str, list[Task]] = {"YES": [], "NO": []}
            # a split holds 80 % or 10 % of all problems: draw until both classes are full
            pool = self.generate_balanced(wanted * (4 if split == "train" else 30), seed, level)
            for task in pool:
                if task.split == split and len(half[str(task.answer)]) < (wanted + 1) // 2:
                    half[str(task.answer)].append(task)
            pairs = [task for pair in zip(half["YES"], half["NO"], strict=False) for task in pair]
            chosen += pairs[:wanted]
        return chosen


SWEEP = (
    "Write every start as T+ and every end as T-, sorted by time, ends before starts at the same time. "
    "Keep a running count: + adds one, - takes one away; write the count after each event. "
    "The largest count is the peak. If the peak is at most the number of rooms say YES, else NO."
)

STRATEGY_FAMILIES: Mapping[str, StrategyFamily] = {
    "scheduling": StrategyFamily(
        name="scheduling",
        generate_balanced=SCHEDULING.generate_balanced,
        strategies=(
            "",
            "Count how many meetings run at the same time. If that is ever more than the rooms, say NO, else YES.",
            SWEEP + " Example: [9-11], [10-12], rooms 2 gives 9+ 1; 10+ 2; 11- 1; 12- 0; peak 2, rooms 2: YES.",
        ),
        max_tokens=SCHEDULING.max_tokens,
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
