"""The four stages side by side: untrained student, student told the strategy, student with adapter, teacher."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.evaluation.answers import (
    Answered,
    accuracy,
    answer_tasks,
    kind_of,
    machine_seconds,
    majority_of,
    share_of,
)
from cogumi_dagster.lib.evaluation.statistics import Estimate, Proportion, grouped_mcnemar
from cogumi_dagster.lib.inference import Completion, Engine
from cogumi_dagster.lib.inference.base import PromptTooLong
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, in_parts, silent
from cogumi_dagster.lib.strategy.economics import Economics, economics
from cogumi_dagster.lib.strategy.journal import balanced_accuracy, constant_baseline
from cogumi_dagster.lib.strategy.problems import StrategyFamily, Suite, classes_of
from cogumi_dagster.lib.strategy.teacher import StrategyTeacher
from cogumi_dagster.lib.tasks import verify
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Task

ADAPTER = "strategy"
ANSWERS_FILE = "answers.jsonl"
SUITES = "suites"
"""In place of a stage, with the answers to the suites."""


@dataclass(frozen=True)
class StageRow:
    """One stage. ``exact_traces`` is the share whose whole answer is the solver's; None where a model was the teacher,
    whose traces are its own."""

    stage: str
    problems: int
    accuracy: Proportion
    balanced_accuracy: Estimate
    recalls: dict[str, Proportion]
    """By class; empty where answers are open."""
    exact_traces: Proportion | None
    easy: Proportion
    medium: Proportion
    hard: Proportion
    batches: tuple[Proportion, ...]
    """Accuracy on each batch of the problems; all levels are in each."""


@dataclass(frozen=True)
class SuiteRow:
    """The student with adapter on one suite. ``majority`` is what always giving the commoner answer gets.

    Shares are of distinct problems: one that comes again is no further evidence. ``sets`` are as drawn.
    """

    suite: str
    drawn: int
    problems: int
    """Distinct ones."""
    accuracy: Proportion
    majority: Proportion
    balanced_accuracy: Estimate
    recalls: dict[str, Proportion]
    exact_traces: Proportion | None
    easy: Proportion
    medium: Proportion
    hard: Proportion
    sets: tuple[Proportion, ...]
    """Accuracy on each set, where the suite is drawn in sets."""
    aims: dict[str, float]
    missed: tuple[str, ...]
    """Aims that were not reached, by the figure itself and not by its interval."""


@dataclass(frozen=True)
class StrategyEvaluation:
    """All stages on the same problems of split ``test``, served. Classes are balanced where answers are closed."""

    family: str
    split: str
    problems: int
    majority: Proportion
    constant_balanced_accuracy: float
    """Of always giving each family's commonest answer."""
    stages: tuple[StageRow, ...]
    suites: tuple[SuiteRow, ...]
    economics: Economics
    adapter_balanced_accuracy: Estimate
    untrained_balanced_accuracy: Estimate
    p_value: float
    """Of the student with adapter against the untrained one: McNemar's, over kinds of tasks (``grouped_mcnemar``)."""
    left_out: str
    """Why the student was not told the strategy, where it was not."""


@dataclass(frozen=True)
class Taught:
    """What a model as teacher answered to the problems of the stages."""

    stages: Mapping[str, Sequence[Answered]]
    """Without its strategy, and with it where it has one."""
    usd: Mapping[str, float]
    """Dollars an answer, by stage. A local teacher's time is not billed, and it is left out."""


def evaluate_strategy(
    engine: Engine,
    family: StrategyFamily,
    out: Path,
    *,
    count: int,
    strategy: str,
    batch: int = 24,
    unquantized: Sequence[Answered] = (),
    taught: Taught | None = None,
    suite_share: float = 0.0,
    training_seconds: float = 0.0,
    teaching_usd: float = 0.0,
    machine_usd_per_hour: float = 0.0,
    prices: Mapping[str, tuple[float, float]] | None = None,
    seed: int,
    progress: Progress = silent,
) -> StrategyEvaluation:
    """``engine`` has the trained adapter loaded under the name ``strategy``, whose text is ``strategy`` too.

    ``taught`` are the teacher's answers (see ``ask_teacher``); without them the solver's stand. ``unquantized`` are
    those of the trained student in 16 bit (see ``answer_stages``). The trained student also takes ``suite_share`` of
    each of the family's suites. ``training_seconds`` are the adapter's, ``teaching_usd`` what the teacher's calls cost,
    ``prices`` those of the teachers that it is to be compared with (see ``economics``).

    Raises:
        CogumiError: there are too few problems, or they cannot be judged.
    """
    tasks = family.stage_problems(count, seed)
    suites = family.drawn_suites(suite_share, seed)
    distinct = {task.id: task for _, drawn in suites for task in drawn}
    part = in_parts(progress, 3 * len(tasks) + len(distinct))
    untrained = answer_tasks(engine, tasks, progress=part(len(tasks)))
    told: Sequence[Answered] = ()
    left_out = "" if strategy else "there is none in words"
    if strategy:
        try:
            told = answer_tasks(engine, tasks, before=strategy, progress=part(len(tasks)))
        except PromptTooLong as error:
            left_out = error.problem
    trained = answer_tasks(engine, tasks, adapter=ADAPTER, progress=part(len(tasks)))
    answered = answer_tasks(engine, list(distinct.values()), adapter=ADAPTER, progress=part(len(distinct)))
    stages: dict[str, Sequence[Answered]] = {
        "untrained student": untrained,
        **({"student, strategy in the prompt": told} if told else {}),
        "student with adapter": trained,
        **({"student with adapter, served weights in 16 bit": unquantized} if unquantized else {}),
        **(taught.stages if taught else {"teacher (solver, exact)": [_solved(task) for task in tasks]}),
    }
    exact = taught is None
    rows = [_row(name, answers, batch, exact) for name, answers in stages.items()]
    by_id = {answer.task.id: answer for answer in answered}
    kept = {**stages, SUITES: answered}
    write_jsonl(out / ANSWERS_FILE, ({"stage": n, **a.to_json()} for n, answers in kept.items() for a in answers))
    return StrategyEvaluation(
        family=family.name,
        split="test",
        problems=len(tasks),
        majority=majority_of(tasks),
        constant_balanced_accuracy=constant_baseline(tasks),
        stages=tuple(rows),
        suites=tuple(_suite(suite, [by_id[task.id] for task in drawn], exact) for suite, drawn in suites),
        economics=economics(
            training_seconds=training_seconds,
            teaching_usd=teaching_usd,
            seconds_per_answer=machine_seconds(engine, trained) / len(tasks),
            prompt_tokens=sum(answer.completion.prompt_tokens for answer in trained) / len(tasks),
            answer_tokens=sum(answer.completion.completion_tokens for answer in trained) / len(tasks),
            machine_usd_per_hour=machine_usd_per_hour,
            prices=prices or {},
            measured=taught.usd if taught else {},
        ),
        adapter_balanced_accuracy=balanced_accuracy(trained),
        untrained_balanced_accuracy=balanced_accuracy(untrained),
        p_value=grouped_mcnemar(
            [one.passed for one in untrained], [one.passed for one in trained], [kind_of(task) for task in tasks]
        ),
        left_out=left_out,
    )


def ask_teacher(
    teacher: StrategyTeacher,
    family: StrategyFamily,
    strategy: str,
    *,
    count: int,
    seed: int,
    progress: Progress = silent,
) -> Taught:
    """The teacher's answers to the problems of the stages, without and with the strategy.

    To be had before the student's: what fails here fails before its hours, and what was answered is kept.

    Raises:
        CogumiError: there are too few problems, or they cannot be judged; what the teacher raises.
    """
    tasks = family.stage_problems(count, seed)
    texts = {f"teacher ({teacher.name})": "", **({"teacher, strategy in the prompt": strategy} if strategy else {})}
    part = in_parts(progress, len(texts) * len(tasks))
    stages: dict[str, Sequence[Answered]] = {}
    usd: dict[str, float] = {}
    for stage, text in texts.items():
        before = teacher.usd
        stages[stage] = teacher.attempt(tasks, text, part(len(tasks)))
        if teacher.usd > before:
            usd[stage] = (teacher.usd - before) / len(tasks)
    return Taught(stages, usd)


def answer_stages(
    engine: Engine, family: StrategyFamily, *, count: int, seed: int, progress: Progress = silent
) -> list[Answered]:
    """The answers of ``engine`` with the adapter to the problems of the stages; raises CogumiError as these do."""
    return answer_tasks(engine, family.stage_problems(count, seed), adapter=ADAPTER, progress=progress)


def _solved(task: Task) -> Answered:
    text = task.solution or ""
    return Answered(task, Completion(text, "stop", 0, 0), verify(task, text))


def _row(stage: str, answers: Sequence[Answered], batch: int, exact: bool) -> StageRow:
    easy, medium, hard = _by_level(answers)
    return StageRow(
        stage, len(answers), accuracy(answers), balanced_accuracy(answers), _recalls(answers),
        _exact(answers) if exact else None, easy, medium, hard,
        tuple(map(accuracy, _batches(answers, max(1, round(len(answers) / batch))))),
    )  # fmt: skip


def _batches(answers: Sequence[Answered], number: int) -> list[list[Answered]]:
    """In turn, two at a time: problems go by level, and within one from class to class."""
    return [[answer for at, answer in enumerate(answers) if at // 2 % number == one] for one in range(number)]


def _by_level(answers: Sequence[Answered]) -> Iterator[Proportion]:
    return (accuracy([answer for answer in answers if answer.task.difficulty == level]) for level in DIFFICULTIES)


def _suite(suite: Suite, drawn: Sequence[Answered], exact: bool) -> SuiteRow:
    answers = list({answer.task.id: answer for answer in drawn}.values())
    right, balanced, recalls = accuracy(answers), balanced_accuracy(answers), _recalls(answers)
    figures = {"accuracy": right.value, "balanced accuracy": balanced.value}
    figures |= {f"recall {label}": share.value for label, share in recalls.items()}
    starts = range(0, len(drawn), suite.set_size) if suite.set_size else ()
    easy, medium, hard = _by_level(answers)
    return SuiteRow(
        suite=suite.name,
        drawn=len(drawn),
        problems=len(answers),
        accuracy=right,
        majority=majority_of([answer.task for answer in answers]),
        balanced_accuracy=balanced,
        recalls=recalls,
        exact_traces=_exact(answers) if exact else None,
        easy=easy,
        medium=medium,
        hard=hard,
        sets=tuple(accuracy(drawn[start : start + suite.set_size]) for start in starts),
        aims=dict(suite.aims),
        missed=tuple(name for name, aim in suite.aims.items() if not figures.get(name, 0.0) >= aim),
    )


def _recalls(answers: Sequence[Answered]) -> dict[str, Proportion]:
    closed = [answer for answer in answers if classes_of(answer.task)]
    classes = sorted({str(answer.task.answer) for answer in closed})
    return {label: accuracy([a for a in closed if a.task.answer == label]) for label in classes}


def _exact(answers: Sequence[Answered]) -> Proportion:
    return share_of(answers, [a.completion.text.strip() == (a.task.solution or "").strip() for a in answers])
