"""Science problems: the printed steps agree with the answer, and 1 % is the tolerance."""

import re

import pytest

from cogumi_dagster.lib.tasks import families_of, get_family, verify
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Task
from cogumi_dagster.lib.tasks.science import show


@pytest.mark.parametrize("name", families_of("science"))
def test_equations_in_the_steps_hold(name: str) -> None:
    seen = 0
    for difficulty in DIFFICULTIES:
        for task in get_family(name).generate(40, 0, difficulty):
            for step in re.split(r"[;\n]", str(task.solution)):
                sides = [side for side in step.split(" = ") if re.fullmatch(r"-?[\d.]+( [-+*/] [\d.]+|\^\d)*", side)]
                values = [eval(side.replace("^", "**")) for side in sides]
                assert values == pytest.approx(values[:1] * len(values), rel=1e-4), task.solution
                seen += len(values) > 1
    assert seen > 20


def test_one_percent() -> None:
    task = Task("science", "science_units", "easy", "p", payload={"value": "250", "unit": "m"})
    assert verify(task, "Answer: 252 m").passed is True
    assert verify(task, "Answer: 253 m").passed is False
    assert verify(task, "Answer: -250 m").passed is False


def test_numbers_are_shown_plainly() -> None:
    assert [show(value) for value in (3.0, 1 / 3, 1e7, 0.1 + 0.2, 1e-6, 0.0)] == [
        "3", "0.333333", "10000000", "0.3", "0.000001", "0",
    ]  # fmt: skip
