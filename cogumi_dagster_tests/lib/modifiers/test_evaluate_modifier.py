import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.evaluation.answers import Answered
from cogumi_dagster.lib.evaluation.humaneval import load_problems
from cogumi_dagster.lib.evaluation.statistics import Proportion, mcnemar
from cogumi_dagster.lib.inference.base import Completion
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.modifiers.evaluate import (
    GATE_FILE,
    NOISE_TEMPERATURE,
    BenchmarkRow,
    ModifierReport,
    RerunRow,
    compare,
    evaluate_modifier,
)
from cogumi_dagster.lib.modifiers.failures import held_out_tasks, training_tasks
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.tasks.base import Task, Verdict


def answers(passed: Sequence[bool | None]) -> list[Answered]:
    return [
        Answered(Task("math", f"family{n % 2}", "easy", f"task {n}"), Completion("x", "stop", 1, 1), Verdict(p, ""))
        for n, p in enumerate(passed)
    ]


def pattern(both: int, repaired: int, broken: int, neither: int) -> tuple[list[Answered], list[Answered]]:
    base = [True] * both + [False] * repaired + [True] * broken + [False] * neither
    modified = [True] * both + [True] * repaired + [False] * broken + [False] * neither
    return answers(base), answers(modified)


@pytest.mark.parametrize(
    ("table", "improves", "regresses"),
    [
        ((10, 0, 0, 10), False, False),  # the same answers
        ((10, 5, 0, 5), False, False),  # p = 0.0625
        ((10, 6, 0, 4), True, False),  # p = 0.03125
        ((0, 20, 5, 5), True, True),  # all that was right is broken
        ((400, 20, 5, 5), True, False),  # 5 of 405
        ((10, 0, 6, 4), False, True),
        ((10, 12, 11, 4), False, True),
    ],
)
def test_the_gate_opens_only_for_more_repairs_than_chance(
    table: tuple[int, int, int, int], improves: bool, regresses: bool
) -> None:
    report = compare(*pattern(*table), split="test")
    assert (report.improves, report.regresses) == (improves, regresses)
    assert report.gate_passed == (improves and not regresses)


def test_the_figures_are_those_of_the_two_by_two_table() -> None:
    report = compare(*pattern(both=4, repaired=3, broken=2, neither=1), split="test")
    assert (report.base.successes, report.base.count) == (6, 10)
    assert (report.modified.successes, report.modified.count) == (7, 10)
    assert (report.repaired.successes, report.repaired.count) == (3, 4)
    assert (report.kept.successes, report.kept.count) == (4, 6)
    assert report.net_gain == pytest.approx(0.1)
    assert report.p_value == pytest.approx(1.0)
    assert [row.family for row in report.families] == ["family0", "family1"]
    assert sum(row.base.count for row in report.families) == sum(row.modified.count for row in report.families) == 10


def of_kinds(kinds: Sequence[str], passed: Sequence[bool | None]) -> list[Answered]:
    return [replace(a, task=replace(a.task, kind=k)) for a, k in zip(answers(passed), kinds, strict=True)]


def test_kinds_that_no_lesson_had_stand_apart() -> None:
    kinds = ["write", "write", "write", "move", "", "known"]
    base, modified = of_kinds(kinds, [False] * 6), of_kinds(kinds, [True, True, True, False, True, True])
    report = compare(base, modified, taught=["known", ""], split="test")
    assert report.new_kinds is not None
    assert (report.new_kinds.kinds, report.new_kinds.modified.successes, report.new_kinds.modified.count) == (2, 3, 4)
    assert report.new_kinds.modified_by_kind.value == 0.5 and report.new_kinds.modified_by_kind.count == 2
    assert compare(answers([True]), answers([True]), split="test").new_kinds is None


def test_one_kind_repaired_is_one_repair() -> None:
    """Eight tasks filled into one template are no more evidence than one."""
    kinds = [f"template {n // 8}" for n in range(96)]
    base = of_kinds(kinds, [False] * 96)
    one = compare(base, of_kinds(kinds, [n < 8 for n in range(96)]), [base, base], split="test")
    assert one.p_value == 1.0 and not one.improves and one.repaired.interval[0] < 0.02
    most = compare(base, of_kinds(kinds, [n < 80 for n in range(96)]), [base, base], split="test")
    assert most.p_value == pytest.approx(2 / 2**10) and most.gate_passed
    assert one.families[0].modified.effective == pytest.approx(one.modified.effective)


def test_five_kinds_all_broken_shut_the_gate() -> None:
    """A test over so few kinds could not."""
    kinds = [f"template {n // 12}" for n in range(60)] + [f"other {n}" for n in range(240)]
    base = of_kinds(kinds, [True] * 60 + [False] * 240)
    report = compare(base, of_kinds(kinds, [False] * 60 + [True] * 200 + [False] * 40), [base, base], split="test")
    assert report.improves and report.regresses and not report.gate_passed


def test_what_was_not_run_counts_on_neither_side_and_shuts_the_gate() -> None:
    report = compare(answers([True, None, False, True]), answers([True, True, None, False]), split="test")
    assert (report.tasks, report.not_run) == (2, 2)
    assert (report.base.successes, report.modified.successes) == (2, 1)
    base, modified = pattern(both=10, repaired=60, broken=0, neither=30)
    assert compare(base, modified, split="test").gate_passed
    unjudged = compare([*base, *answers([None])], [*modified, *answers([None])], split="test")
    assert unjudged.improves and not unjudged.regresses and not unjudged.gate_passed
    benchmark = BenchmarkRow("HumanEval", Proportion(0, 0), Proportion(0, 0), 0, 0, 1.0, "no sandbox")
    assert not compare(base, modified, [], [benchmark], split="test").gate_passed


def test_both_answer_the_same_held_out_tasks(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    tasks = held_out_tasks("automation", 10, 5)
    known = solutions(tasks)
    engine = scripted_engine(lambda adapter, prompt: known[prompt] if adapter else "no idea", ("automation",))
    seen: list[tuple[int, int]] = []
    report = evaluate_modifier(
        engine, "automation", tmp_path, count=10, seed=5, progress=lambda done, total, note: seen.append((done, total))
    )
    assert report.split == "test" and report.tasks == 10
    assert report.gate_passed and report.repaired.value == 1.0
    assert json.loads((tmp_path / GATE_FILE).read_text()) == {"passed": True}
    assert engine.asked == [(a, task.prompt) for a in (None, "automation") for task in tasks]
    assert seen[-1] == (20, 20)
    rows = read_jsonl(tmp_path / "answers.jsonl")
    assert len(rows) == 10 and all(row["modified"]["passed"] and not row["base"]["passed"] for row in rows)


def test_repairs_must_rise_above_what_the_base_repairs_by_itself() -> None:
    base, modified = pattern(both=10, repaired=8, broken=0, neither=12)
    quiet = compare(base, modified, [base, base], split="test")
    assert quiet.noise is not None and quiet.noise.repaired.successes == 0 and quiet.noise.repaired.count == 20
    assert quiet.improves and quiet.gate_passed
    again = answers([True] * 10 + [True] * 10 + [False] * 10)  # half of the failures, without any modifier
    noisy = compare(base, modified, [again], split="test")
    assert noisy.noise is not None and noisy.noise.repaired.value == 0.5
    assert noisy.p_value < 0.05 and not noisy.improves and not noisy.gate_passed
    assert compare(base, modified, split="test").noise is None


def test_a_regression_above_the_noise_floor_closes_the_gate() -> None:
    base, modified = pattern(both=20, repaired=30, broken=8, neither=0)
    report = compare(base, modified, [base], split="test")
    assert report.p_value < 0.05 and report.regresses and not report.gate_passed
    assert not compare(base, modified, split="test").gate_passed, "nor is 8 of 28 within what is allowed"


def test_luck_that_the_base_loses_again_hides_no_regression() -> None:
    """40 successes are the base's for good; of 28 lucky ones each re-run gives up half, whatever the other does."""
    base = answers([True] * 68 + [False] * 120)
    again = [answers([True] * 40 + [n >> run & 1 == 0 for n in range(28)] + [False] * 120) for run in range(2)]

    def gate_of(steady: int, lucky: int) -> tuple[ModifierReport, RerunRow]:
        """A modifier that keeps so many of each."""
        kept = [True] * steady + [False] * (40 - steady) + [True] * lucky + [False] * (28 - lucky)
        report = compare(base, answers(kept + [True] * 110 + [False] * 10), again, split="test")
        assert report.rerun is not None and report.rerun.again == Proportion(54, 68, 68) and report.steady is not None
        return report, report.steady

    def counts(row: RerunRow | None) -> tuple[int, int, int]:
        assert row is not None
        return row.again.successes, row.modified.successes, row.modified.count

    report, row = gate_of(steady=40, lucky=12)  # breaks 16 of 68, all of them luck: about what a re-run breaks
    assert counts(row) == (47, 46, 54) and counts(report.rerun) == (54, 52, 68) and report.gate_passed
    report, row = gate_of(steady=28, lucky=16)  # 12 of what it breaks the base never gave up
    assert counts(row) == (47, 36, 54) and counts(report.rerun) == (54, 44, 68)
    assert row.p_value < 0.05 and report.improves and report.regresses and not report.gate_passed
    report, row = gate_of(steady=40, lucky=2)  # more luck than a re-run loses
    assert report.rerun is not None and report.rerun.p_value < 0.05 and not report.gate_passed


def test_all_luck_broken_is_more_than_the_base_loses_of_it() -> None:
    """No success is steady, so that only all of them can tell."""
    base = answers([True] * 20 + [False] * 120)
    again = [answers([n % 2 == run for n in range(20)] + [False] * 120) for run in range(2)]
    report = compare(base, answers([False] * 20 + [True] * 110 + [False] * 10), again, split="test")
    assert report.steady is not None and report.steady.again.successes == 0
    assert report.improves and report.regresses and not report.gate_passed


def test_what_breaks_on_a_public_benchmark_closes_the_gate() -> None:
    base, modified = pattern(both=99, repaired=60, broken=1, neither=40)
    for repaired, broken, opens in ((0, 7, False), (0, 5, True), (7, 0, True)):
        row = BenchmarkRow(
            "HumanEval", Proportion(9, 20), Proportion(9, 20), repaired, broken, mcnemar(repaired, broken), ""
        )
        assert compare(base, modified, [base, base], [row], split="test").gate_passed is opens


def test_intervals_are_over_kinds_of_tasks() -> None:
    def of(answered: list[Answered], kinds: int) -> list[Answered]:
        return [
            replace(a, task=replace(a.task, kind=f"kind {n * kinds // len(answered)}")) for n, a in enumerate(answered)
        ]

    base, modified = pattern(both=0, repaired=48, broken=0, neither=52)
    alone = compare(base, modified, split="test").repaired
    grouped = compare(of(base, 25), of(modified, 25), split="test").repaired
    assert (grouped.successes, grouped.count) == (alone.successes, alone.count) == (48, 100)
    assert alone.interval == Proportion(48, 100).interval
    assert grouped.interval == pytest.approx(Proportion(12, 25).interval, abs=0.01)


def test_the_base_answers_again_and_other_domains_are_asked(
    scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    engine = scripted_engine(lambda adapter, prompt: "no idea", ("automation",))
    seen: list[tuple[int, int]] = []
    report = evaluate_modifier(
        engine, "automation", tmp_path, count=4, noise_seeds=2, cross_domain_tasks=2, seed=5,
        progress=lambda done, total, note: seen.append((done, total)),
    )  # fmt: skip
    assert report.noise is not None and report.noise.seeds == 2 and report.noise.repaired.count == 4
    own, *others = report.domains
    assert (own.domain, own.base, own.modified) == ("automation", report.base, report.modified)
    assert [row.domain for row in others] == list(DOMAINS)
    assert all(row.base.count == row.modified.count <= 2 for row in others)
    assert seen[-1][0] == seen[-1][1] == len(engine.asked) == 4 * 4 + 2 * 12


def test_the_greedy_answers_are_the_base_and_the_sampled_ones_the_noise(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    known = solutions(held_out_tasks("automation", 6, 5))
    engine = scripted_engine(lambda adapter, prompt: "no idea", ("automation",))
    plain, heats = engine.chat_many, []

    def sampled_is_right(conversations: Any, *, temperature: Any = 0.0, **how: Any) -> Any:
        found = plain(conversations, **how)
        if isinstance(temperature, float):
            return found
        heats.extend(temperature)
        return [
            replace(answer, text=known[messages[-1]["content"]]) if heat else answer
            for answer, messages, heat in zip(found, conversations, temperature, strict=True)
        ]

    engine.chat_many = sampled_is_right
    report = evaluate_modifier(engine, "automation", tmp_path, count=6, noise_seeds=2, seed=5)
    assert report.base.successes == 0 and report.noise is not None and report.noise.repaired.value == 1.0
    assert heats == [0.0, NOISE_TEMPERATURE, NOISE_TEMPERATURE] * 6


def test_a_held_out_task_that_was_taught_is_counted(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    engine = scripted_engine(lambda adapter, prompt: "no idea", ("automation",))
    held_out = held_out_tasks("automation", 6, 5)
    for lessons, near in ((held_out[:2], 2), (training_tasks("automation", 20, 5, held_out), 0)):
        taught = [(task, task.solution or "") for task in lessons]
        report = evaluate_modifier(engine, "automation", tmp_path, count=6, lessons=taught, seed=5)
        assert report.near_lessons == near and report.contaminated_lessons == 0


def test_a_taught_answer_of_a_public_benchmark_is_counted(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    engine = scripted_engine(lambda adapter, prompt: "no idea", ("automation",))
    (task,) = training_tasks("automation", 1, 5, [])
    lessons = [(task, load_problems(1).problems[0].prompt), (task, "a plain answer")]
    report = evaluate_modifier(engine, "automation", tmp_path, count=2, lessons=lessons, seed=5)
    assert report.contaminated_lessons == 1


def test_one_broken_answer_of_many_is_no_regression() -> None:
    base, modified = pattern(both=99, repaired=60, broken=1, neither=40)
    assert compare(base, modified, [base, base], split="test").gate_passed
