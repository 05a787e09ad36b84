import pytest

from cogumi_dagster.lib.strategy.economics import economics


def test_training_pays_for_itself_after_as_many_answers_as_its_cost_is_savings() -> None:
    found = economics(
        training_seconds=3600, seconds_per_answer=1.8, prompt_tokens=100, answer_tokens=50, machine_usd_per_hour=0.10,
        prices={"dear": (3.0, 15.0), "cheap": (0.05, 0.10)},
    )  # fmt: skip
    assert found.training_usd == pytest.approx(0.10) and found.usd_per_answer == pytest.approx(0.00005)
    cheap, dear = found.teachers
    assert (cheap.teacher, dear.teacher) == ("cheap", "dear")
    assert cheap.usd_per_answer == pytest.approx(1e-5) and cheap.break_even is None
    assert dear.usd_per_answer == pytest.approx(0.00105) and dear.break_even == 100
    taught = economics(
        training_seconds=3600, teaching_usd=0.40, seconds_per_answer=1.8, prompt_tokens=100, answer_tokens=50,
        machine_usd_per_hour=0.10, prices={"dear": (3.0, 15.0)},
    )  # fmt: skip
    assert taught.teaching_usd == 0.40 and taught.teachers[0].break_even == 500, "the teacher's journal is paid for too"


def test_the_study_s_own_teacher_stands_at_what_it_took() -> None:
    found = economics(
        training_seconds=3600, seconds_per_answer=1.8, prompt_tokens=100, answer_tokens=50, machine_usd_per_hour=0.10,
        prices={"own": (3.0, 15.0)}, measured={"teacher (own)": 0.01005},
    )  # fmt: skip
    assert [(one.teacher, one.break_even) for one in found.teachers] == [("teacher (own)", 10), ("own", 100)]
