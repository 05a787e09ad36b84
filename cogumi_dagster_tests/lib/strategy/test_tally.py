import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi_dagster.lib.strategy import tally
from cogumi_dagster.lib.strategy.problems import TO_LEARN, room_for_trace, strategy_family
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.scheduling import LENGTHS, STARTS, is_feasible

FAMILY = strategy_family("scheduling")
MEETING = st.builds(lambda s, n: (s, s + n), st.integers(*STARTS), st.integers(*LENGTHS))


def test_the_trace_as_the_strategy_has_it() -> None:
    assert tally.listed_trace([(9, 11), (10, 12)], 2) == (
        "rooms 2: B[9-11] C[10-12]\n B a1 b1\n C b2 c1\nall within 2: YES"
    )
    assert tally.listed_trace([(15, 17), (15, 16)], 1) == "rooms 1: T[15-17] U[15-16]\n T g1 h1\n U g2 > 1: NO"
    example = tally.STRATEGY.partition("rooms 2 gives ")[2]
    assert re.split(r", (?:then |(?=all))", example) == [
        "rooms 2: B[9-11] C[10-12]", "B a1 b1", "C b2 c1", "all within 2: YES."
    ]  # fmt: skip


@given(st.lists(MEETING, min_size=1, max_size=10), st.integers(1, 4))
def test_it_is_right_and_every_meeting_has_a_letter_of_its_own(meetings: list[tuple[int, int]], rooms: int) -> None:
    text = tally.listed_trace(meetings, rooms)
    assert text.endswith("YES" if is_feasible(meetings, rooms) else "NO")
    listed = re.findall(r" ([A-Z])\[(\d+)-(\d+)\]", text.partition("\n")[0])
    assert [(int(start), int(end)) for _, start, end in listed] == meetings
    names = [name for name, _, _ in listed]
    assert len(set(names)) == len(names)
    tallied = re.findall(r"^ ([A-Z])", text, re.MULTILINE)
    assert tallied == names[: len(tallied)]
    assert all((ord(b) - ord(a)) % 26 == 1 for a, b in pairwise(names))


def test_letters_of_all_places_are_taught() -> None:
    tasks = FAMILY.problems(600, 7, "train", TO_LEARN)
    seen = {name for task in tasks for name in re.findall(r"([A-Z])\[", task.solution or "")}
    assert len(seen) == 26


@pytest.mark.parametrize("suite", FAMILY.suites, ids=lambda suite: suite.name)
def test_suites_have_these_traces_and_room_for_them(suite: Any, imported: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported[0])
    for task in suite.draw(150, 3)[-60:]:  # a set of the published mix ends with the hard ones
        assert task.solution == tally.listed_trace_of(task) and verify(task, task.solution).passed
        assert len(tokenizer(task.solution).input_ids) < room_for_trace(task) == tally.ROOM
