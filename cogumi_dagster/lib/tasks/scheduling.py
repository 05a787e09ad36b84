"""Meeting rooms: can all meetings be held? Decided by a tally of the hours that they take.

The published mix: EASY 2 meetings and 2-3 rooms, MEDIUM 3-4 and 2-3, HARD 4-6 and 2-4; starts 9-15, lengths 1-3.
Most of its answers are YES (all of EASY: two meetings never need three rooms), so accuracy is read against
the majority, and training uses ``generate_balanced``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random

from cogumi_dagster.lib.tasks.answers import closed_answer
from cogumi_dagster.lib.tasks.base import Difficulty, Task, Verdict
from cogumi_dagster.lib.tasks.drawing import distinct, seeded

Meeting = tuple[int, int]
"""Start and end hour; a meeting that ends at T leaves its room to one that starts at T."""

MEETINGS: Mapping[Difficulty, tuple[int, int]] = {"easy": (2, 2), "medium": (3, 4), "hard": (4, 6)}
ROOMS: Mapping[Difficulty, tuple[int, int]] = {"easy": (2, 3), "medium": (2, 3), "hard": (2, 4)}
STARTS = (9, 15)
LENGTHS = (1, 3)
LONGER = (7, 10)
"""Meetings of a problem longer than any that a student is trained on."""
FEW_KINDS = 4
"""Different meetings in the lessons that repeat some. Of ten drawn freely two are repetitions, of six less than one."""

LETTERS = {hour: chr(ord("a") + hour - STARTS[0]) for hour in range(STARTS[0], STARTS[1] + LENGTHS[1])}
"""Hour 9 is a, 10 is b, ... 17 is i: one token each, where "10" is two and occurs in the problem besides."""


def peak(meetings: Sequence[Meeting]) -> int:
    """The most meetings that run at once."""
    taken = Counter(hour for start, end in meetings for hour in range(start, end))
    return max(taken.values(), default=0)


def is_feasible(meetings: Sequence[Meeting], rooms: int) -> bool:
    """Whether ``rooms`` rooms hold all meetings."""
    return peak(meetings) <= rooms


def trace(meetings: Sequence[Meeting], rooms: int) -> str:
    """The worked solution, a tally: meetings in their order, each with its hours and how many took them so far.

    It stops at the first number above ``rooms``. Nothing is sorted, every step looks at one earlier place, and
    the steps are the same for any number of meetings.
    """
    lines, taken = [f"rooms {rooms}"], Counter[int]()
    for start, end in meetings:
        line = f"[{start}-{end}]"
        for hour in range(start, end):
            taken[hour] += 1
            line += f" {LETTERS[hour]}{taken[hour]}"
            if taken[hour] > rooms:
                return "\n".join([*lines, f"{line} > {rooms}: NO"])
        lines.append(line)
    return "\n".join([*lines, f"all within {rooms}: YES"])


def prompt_for(meetings: Sequence[Meeting], rooms: int) -> str:
    listed = ", ".join(f"[{start}-{end}]" for start, end in meetings)
    return (
        f"Meetings: {listed}. Rooms: {rooms}. Can all meetings be scheduled? "
        "A meeting that ends at T does not conflict with one that starts at T. End with YES or NO."
    )


class Scheduling:
    """The family ``scheduling``."""

    name = "scheduling"
    domain = "reasoning"
    max_tokens = 150
    version = "4"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        """The published mix of one difficulty."""
        rng = seeded(self.name, difficulty, seed)
        return distinct(lambda: self._task(*_draw(rng, MEETINGS[difficulty], ROOMS[difficulty]), difficulty), count)

    def generate_balanced(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        """As many NO as YES (one more YES for an odd count), in mixed order.

        EASY problems that are not feasible need a single room, which the published mix does not have.
        """
        rooms = (1, 3) if difficulty == "easy" else ROOMS[difficulty]
        rng = seeded(self.name, "balanced", difficulty, seed)
        return self._balanced(rng, count, difficulty, MEETINGS[difficulty], rooms)

    def generate_longer(self, count: int, seed: int) -> list[Task]:
        """Class-balanced problems of 7 to 10 meetings and 2 to 4 rooms."""
        return self._balanced(seeded(self.name, "7 to 10", seed), count, "hard", LONGER, ROOMS["hard"])

    def generate_lessons(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        """``generate_balanced``, where two thirds of HARD have as many meetings as there are, and the trace goes on to
        one of the last two; half of these repeat meetings.

        Most traces of the published kind end by the fourth meeting (171 of 1,500 reach a sixth), and where a student
        has seldom been, it loses its place in the list: most of all between two equal meetings.
        """
        if difficulty != "hard":
            return self.generate_balanced(count, seed, difficulty)
        most = MEETINGS["hard"][1]
        rng = seeded(self.name, "lessons", "hard", seed)
        tasks = self.generate_balanced(count - 2 * (count // 3), seed, "hard")
        for kinds in (0, FEW_KINDS):
            tasks += self._balanced(rng, count // 3, "hard", (most, most), ROOMS["hard"], most - 1, kinds)
        tasks = list({task.id: task for task in tasks}.values())
        rng.shuffle(tasks)
        return tasks

    def verify(self, task: Task, response: str) -> Verdict:
        said = closed_answer(response, ("YES", "NO"))
        if not said:
            return Verdict(False, "neither YES nor NO was given")
        if said == task.answer:
            return Verdict(True, "right", 1.0)
        return Verdict(False, f"the answer is {task.answer}, not {said}")

    def _balanced(
        self,
        rng: Random,
        count: int,
        difficulty: Difficulty,
        meetings: tuple[int, int],
        rooms: tuple[int, int],
        reaching: int = 0,
        kinds: int = 0,
    ) -> list[Task]:
        """As many NO as YES, each with at least ``reaching`` meetings in its trace, of at most ``kinds`` (0: any)."""

        def answering(answer: str) -> Task | None:
            for _ in range(100):
                task = self._task(*_draw(rng, meetings, rooms, kinds), difficulty)
                if task.answer == answer and (task.solution or "").count("[") >= reaching:
                    return task
            return None

        tasks: list[Task] = []
        for answer, wanted in (("YES", count - count // 2), ("NO", count // 2)):
            tasks += distinct(partial(answering, answer), wanted)
        rng.shuffle(tasks)
        return tasks

    def _task(self, meetings: list[Meeting], rooms: int, difficulty: Difficulty) -> Task:
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=prompt_for(meetings, rooms),
            payload={"meetings": [list(meeting) for meeting in meetings], "rooms": rooms},
            answer="YES" if is_feasible(meetings, rooms) else "NO",
            solution=trace(meetings, rooms),
        )


def _draw(rng: Random, count: tuple[int, int], rooms: tuple[int, int], kinds: int = 0) -> tuple[list[Meeting], int]:
    """Meetings of any kind, or of ``kinds`` kinds, and rooms."""

    def meeting() -> Meeting:
        start = rng.randint(*STARTS)
        return start, start + rng.randint(*LENGTHS)

    few = [meeting() for _ in range(kinds)]
    meetings = [rng.choice(few) if few else meeting() for _ in range(rng.randint(*count))]
    return meetings, rng.randint(*rooms)


SCHEDULING = Scheduling()
