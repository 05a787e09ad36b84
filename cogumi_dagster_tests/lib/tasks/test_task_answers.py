"""Reading answers: lenient about the form, never about being right."""

from decimal import Decimal

import pytest

from cogumi_dagster.lib.tasks.answers import final_number, final_text, judge_number, stated_answer


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("Answer: 42", "42"),
        ("so the answer is\n**Answer:** 1,234.50 kg.", "1234.50"),
        ("Answer: 12 + 30 = 42", "42"),
        ("Answer: -7", "-7"),
        ("Answer: \u22127", "-7"),
        ("Answer: 6.02 x 10^23 1/mol", None),
        ("Answer: 3 x 10^4 J", "30000"),
        ("Answer: 2.5e3", "2500"),
        ("Answer: 9.8 m/s^2", "9.8"),
        ("Answer: 41 or 42", None),
        ("Answer: 1\nAnswer: 2", "2"),
        ("first 3, then 5-3", "3"),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(response: str, number: str | None) -> None:
    assert final_number(response) == (None if number is None else Decimal(number))


def test_stated_answer_wins_over_later_numbers() -> None:
    assert judge_number("Answer: 5\nThat took 3 steps.", "5").passed is True
    assert judge_number("That took 5 steps.\nAnswer: 3", "5").passed is False


def test_tolerance_is_relative_and_off_by_default() -> None:
    assert judge_number("Answer: 100.9", "100", 0.01).passed is True
    assert judge_number("Answer: 101.1", "100", 0.01).passed is False
    assert judge_number("Answer: 100.0001", "100").passed is False


def test_text_loses_markup_but_not_its_own_signs() -> None:
    assert final_text("Answer: **Rome**.") == "Rome"
    assert final_text("a\n\n  last line. \n") == "last line"
    assert stated_answer("Answer:\nAnswer: x") == "x"


def test_a_very_long_number_is_not_parsed() -> None:
    assert final_number("Answer: " + "9" * 100_000) is None
