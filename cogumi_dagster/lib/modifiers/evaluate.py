"""Base against base + modifier on held-out tasks, served: repairs, keeps, the noise floor, and the double gate."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogumi_dagster.lib.curation.decontamination import decontaminate
from cogumi_dagster.lib.evaluation.answers import (
    Answered,
    accuracy,
    answer_tasks,
    by_family,
    discordant,
    kind_of,
    majority_of,
)
from cogumi_dagster.lib.evaluation.humaneval import Problem, answer_problems, benchmark_prompts, load_problems
from cogumi_dagster.lib.evaluation.statistics import (
    SIGNIFICANCE,
    Estimate,
    Proportion,
    bootstrap,
    grouped_mcnemar,
    mcnemar,
    wilson,
)
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.modifiers.failures import MODIFIER_DOMAINS, held_out_tasks
from cogumi_dagster.lib.modifiers.near import NearDuplicates, draw_distinct
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.progress import Progress, in_parts, silent
from cogumi_dagster.lib.tasks import families_of
from cogumi_dagster.lib.tasks.base import Task

GATE_FILE = "gate.json"
NOISE_TEMPERATURE = 0.7
"""Of the base's re-runs. Greedy decoding has no seeds; sampling finds some answers by luck and loses others, more than
any change of batch or machine would, so the floor is a high one."""

ALLOWED_BREAKS = 0.02
"""Share of the base's successes that a modifier may break where no noise floor was measured: the specification wants
98 % kept."""


@dataclass(frozen=True)
class FamilyRow:
    family: str
    base: Proportion
    modified: Proportion
    majority: Proportion
    """The family's commonest answer."""


@dataclass(frozen=True)
class KindsRow:
    """Held-out tasks of kinds (``Task.kind``: the words of a request, an expression's form) that no lesson had, and how
    the modifier does on them. The other held-out tasks have new values in what was taught."""

    kinds: int
    base: Proportion
    modified: Proportion
    modified_by_kind: Estimate
    """Mean over kinds, bootstrapped over them: tasks of one kind are right or wrong together."""


@dataclass(frozen=True)
class NoiseFloor:
    """What the base itself repairs when it answers again with other seeds: the mean re-run, whose interval
    is that of one (the re-runs are of the same tasks)."""

    seeds: int
    temperature: float
    repaired: Proportion


@dataclass(frozen=True)
class RerunRow:
    """How many of the base's successes a re-run of it (``again``) and the modifier keep, neither of which chose them.
    Counts are of the mean re-run; p is of a sign-flip test over tasks."""

    again: Proportion
    modified: Proportion
    p_value: float

    @property
    def regresses(self) -> bool:
        return self.modified.successes < self.again.successes and self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class CrossRow:
    """A modifier on its own held-out tasks, or on a domain that it was not made for. p is as in ModifierReport."""

    domain: str
    base: Proportion
    modified: Proportion
    p_value: float


@dataclass(frozen=True)
class BenchmarkRow:
    """Both on a public benchmark that no training task was generated from. p is McNemar's."""

    benchmark: str
    base: Proportion
    modified: Proportion
    repaired: int
    broken: int
    p_value: float
    not_run: str
    """Why, where nothing was judged."""

    @property
    def regresses(self) -> bool:
        return self.broken > self.repaired and self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class ModifierReport:
    """Both on the same held-out tasks (split ``test``). ``majority`` is what each family's commonest answer gets.
    Intervals are over kinds of tasks (``Task.kind``): those of one kind are right or wrong together. So is the test of
    repair: ``sign_flips`` of each kind's repairs less its breaks, McNemar's exact test where each task is a kind. What
    shuts the gate is tested task by task, since five kinds, all broken, would show nothing.

    The gate has two sides. Repair: more repairs than breaks (p < 0.05), and the interval of the repaired share lies
    above the noise floor's. No regression: more breaks neither here nor on a public benchmark, nor than a re-run of the
    base breaks of its successes (``rerun``) and of those that are no luck, which are right in all its re-runs but that
    one (``steady``); without re-runs the interval of the broken share does not lie above ``ALLOWED_BREAKS``. It stays
    shut where something could not be judged.
    """

    tasks: int
    split: str
    majority: Proportion
    base: Proportion
    modified: Proportion
    repaired: Proportion
    kept: Proportion
    noise: NoiseFloor | None
    rerun: RerunRow | None
    steady: RerunRow | None
    p_value: float
    net_gain: float
    improves: bool
    regresses: bool
    gate_passed: bool
    not_run: int
    families: tuple[FamilyRow, ...]
    new_kinds: KindsRow | None = None
    near_lessons: int = 0
    """Held-out tasks of which the modifier was taught a near-duplicate."""
    contaminated_lessons: int = 0
    """Lessons that share words with a problem of HumanEval (see ``decontamination``)."""
    benchmarks: tuple[BenchmarkRow, ...] = ()
    domains: tuple[CrossRow, ...] = ()


def evaluate_modifier(
    engine: Engine,
    modifier: str,
    out: Path,
    *,
    count: int,
    noise_seeds: int = 0,
    cross_domain_tasks: int = 0,
    humaneval: int = 0,
    lessons: Sequence[tuple[Task, str]] = (),
    seed: int,
    progress: Progress = silent,
) -> ModifierReport:
    """Answer ``count`` held-out tasks with and without the modifier; write both answers to answers.jsonl, and
    whether the gate opened to ``GATE_FILE``: what is served hangs on it, so it is part of the artifact's version.

    The base answers them ``noise_seeds`` times more, sampling; both answer ``cross_domain_tasks`` of each other domain,
    and for code the first ``humaneval`` problems of HumanEval. ``lessons`` are the tasks that it learned from, with the
    answer that was taught.
    """
    tasks = held_out_tasks(modifier, count, seed)
    others = {
        domain: draw_distinct(families_of(domain), cross_domain_tasks, seed + 1, "test")
        for domain in (*DOMAINS, "automation")
        if cross_domain_tasks and domain not in MODIFIER_DOMAINS[modifier]
    }
    problems = load_problems(humaneval).problems if humaneval and modifier == "code" else ()
    part = in_parts(progress, (2 + noise_seeds) * len(tasks) + 2 * (sum(map(len, others.values())) + len(problems)))
    base, *again = _base_and_noise(engine, tasks, noise_seeds, seed, part((1 + noise_seeds) * len(tasks)))
    modified = answer_tasks(engine, tasks, adapter=modifier, progress=part(len(tasks)))
    write_jsonl(
        out / "answers.jsonl",
        ({"base": b.to_json(), "modified": m.to_json()} for b, m in zip(base, modified, strict=True)),
    )
    held_out = list(zip(base, modified, strict=True))
    crossed = [
        _cross(domain, [pair for pair in held_out if pair[0].task.domain == domain])
        for domain in MODIFIER_DOMAINS[modifier]
    ]
    for domain, drawn in others.items():
        first = answer_tasks(engine, drawn, progress=part(len(drawn)))
        second = answer_tasks(engine, drawn, adapter=modifier, progress=part(len(drawn)))
        crossed.append(_cross(domain, list(zip(first, second, strict=True))))
    taught = NearDuplicates([task for task, _ in lessons])
    benchmarks = [_humaneval(engine, modifier, problems, part)] if problems else []
    report = compare(base, modified, again, benchmarks, {task.kind for task, _ in lessons}, split="test")
    (out / GATE_FILE).write_text(json.dumps({"passed": report.gate_passed}))
    return replace(
        report,
        domains=tuple(crossed),
        near_lessons=sum(task in taught for task in tasks),
        contaminated_lessons=_contaminated(lessons),
    )


def _contaminated(lessons: Sequence[tuple[Task, str]]) -> int:
    rows = [{"instruction": task.prompt, "response": answer} for task, answer in lessons]
    return decontaminate(rows, benchmark_prompts())[1].removed if rows else 0


def _humaneval(
    engine: Engine, modifier: str, problems: Sequence[Problem], part: Callable[[int], Progress]
) -> BenchmarkRow:
    base = answer_problems(engine, problems, None, part(len(problems)))
    modified = answer_problems(engine, problems, modifier, part(len(problems)))
    pairs = [(b, m) for b, m in zip(base, modified, strict=True) if b.passed is not None and m.passed is not None]
    right = [(b.passed is True, m.passed is True) for b, m in pairs]
    repaired, broken = sum(m and not b for b, m in right), sum(b and not m for b, m in right)
    return BenchmarkRow(
        benchmark=f"HumanEval ({len(problems)} of 164, pass@1)",
        base=Proportion.of([b for b, _ in right]),
        modified=Proportion.of([m for _, m in right]),
        repaired=repaired,
        broken=broken,
        p_value=mcnemar(repaired, broken),
        not_run="" if pairs else base[0].reason,
    )


def _base_and_noise(
    engine: Engine, tasks: Sequence[Task], noise_seeds: int, seed: int, progress: Progress
) -> list[list[Answered]]:
    """The base's greedy answers, then those of each re-run; asked task by task, so that a prompt is read once."""
    heats = [0.0] + [NOISE_TEMPERATURE] * noise_seeds
    answers = answer_tasks(
        engine,
        [task for task in tasks for _ in heats],
        temperature=heats * len(tasks),
        seed=[seed + run for run in range(len(heats))] * len(tasks),
        progress=progress,
    )
    return [answers[run :: len(heats)] for run in range(len(heats))]


def compare(
    base: Sequence[Answered],
    modified: Sequence[Answered],
    again: Sequence[Sequence[Answered]] = (),
    benchmarks: Sequence[BenchmarkRow] = (),
    taught: Collection[str] = (),
    *,
    split: str,
) -> ModifierReport:
    """The figures of two lists of answers to the same tasks; ``again`` are the base's re-runs of them, ``taught`` the
    kinds of tasks that there were lessons of."""
    pairs = _judged(zip(base, modified, strict=True))
    repaired, broken = _changes(pairs)
    of_failures, of_successes = [m for b, m in pairs if not b.passed], [m for b, m in pairs if b.passed]
    noise = _noise(base, again) if again else None
    rerun, steady = (_against_reruns(base, modified, again, only) for only in (False, True)) if again else (None, None)
    p_value = _p_value(pairs, kind_of)
    improves = repaired > broken and p_value < SIGNIFICANCE
    regresses = broken > repaired and mcnemar(repaired, broken) < SIGNIFICANCE
    regresses |= any(row.regresses for row in benchmarks)
    if noise is not None and rerun is not None and steady is not None:
        improves &= accuracy(of_failures).interval[0] > noise.repaired.interval[1]
        regresses |= rerun.regresses or steady.regresses
    else:
        regresses |= bool(of_successes) and wilson(broken, len(of_successes))[0] > ALLOWED_BREAKS
    not_run = len(base) - len(pairs)
    judged = not not_run and not any(row.not_run for row in benchmarks)
    first: Mapping[str, Proportion] = by_family(base)
    second = by_family(modified)
    return ModifierReport(
        tasks=len(pairs),
        split=split,
        majority=majority_of([b.task for b, _ in pairs]),
        base=accuracy([b for b, _ in pairs]),
        modified=accuracy([m for _, m in pairs]),
        repaired=accuracy(of_failures),
        kept=accuracy(of_successes),
        noise=noise,
        rerun=rerun,
        steady=steady,
        p_value=p_value,
        net_gain=(repaired - broken) / max(1, len(pairs)),
        improves=improves,
        regresses=regresses,
        gate_passed=improves and not regresses and judged,
        not_run=not_run,
        families=tuple(
            FamilyRow(name, first[name], second[name], majority_of([b.task for b, _ in pairs if b.task.family == name]))
            for name in sorted(first)
        ),
        new_kinds=_kinds([(b, m) for b, m in pairs if b.task.kind and b.task.kind not in taught]),
        benchmarks=tuple(benchmarks),
    )


Pairs = Sequence[tuple[Answered, Answered]]


def _kinds(pairs: Pairs) -> KindsRow | None:
    kinds: dict[str, list[bool]] = {}
    for _, answer in pairs:
        kinds.setdefault(answer.task.kind, []).append(answer.passed)
    if not kinds:
        return None
    shares = [sum(passed) / len(passed) for passed in kinds.values()]
    return KindsRow(
        len(kinds),
        accuracy([b for b, _ in pairs]),
        accuracy([m for _, m in pairs]),
        bootstrap(shares, lambda drawn: float(drawn.mean()), seed=0),
    )


def _judged(pairs: Iterable[tuple[Answered, Answered]]) -> Pairs:
    """What was run on both sides."""
    return [(b, o) for b, o in pairs if b.verdict.passed is not None and o.verdict.passed is not None]


def _changes(pairs: Pairs) -> tuple[int, int]:
    """(repaired, broken)."""
    return discordant([o for _, o in pairs], [b for b, _ in pairs])


def _p_value(pairs: Pairs, alike: Callable[[Task], str]) -> float:
    """Of as many repairs as breaks, where tasks that are ``alike`` come out together."""
    return grouped_mcnemar(
        [b.passed for b, _ in pairs], [o.passed for _, o in pairs], [alike(b.task) for b, _ in pairs]
    )


def _noise(base: Sequence[Answered], again: Sequence[Sequence[Answered]]) -> NoiseFloor:
    pairs = [pair for run in again for pair in _judged(zip(base, run, strict=True))]
    failed = [(b, o) for b, o in pairs if not b.passed]
    return NoiseFloor(
        len(again),
        NOISE_TEMPERATURE,
        _mean_run(failed, [o.passed for _, o in failed], len(again)),
    )


def _against_reruns(
    base: Sequence[Answered], modified: Sequence[Answered], again: Sequence[Sequence[Answered]], steady: bool
) -> RerunRow:
    """On the base's successes; the ``steady`` ones are right in all its re-runs but the one that they are kept by."""
    chosen: list[tuple[Answered, Answered]] = []
    for left_out, run in enumerate(again):
        others = [base, *again[:left_out], *again[left_out + 1 :]] if steady else [base]
        right = [all(answer.passed for answer in answers) for answers in zip(*others, strict=True)]
        chosen += [pair for pair, of in zip(zip(run, modified, strict=True), right, strict=True) if of]
    pairs, runs = _judged(chosen), len(again)
    by_run, by_modifier = (_mean_run(pairs, [pair[side].passed for pair in pairs], runs) for side in (0, 1))
    return RerunRow(by_run, by_modifier, _p_value(pairs, lambda task: task.id))


def _mean_run(pairs: Pairs, flags: Sequence[bool], runs: int) -> Proportion:
    """The share of all re-runs, in tasks of one: as much evidence as one run is, since they are of the same tasks."""
    count, share = round(len(pairs) / runs), Proportion.of(flags, [kind_of(b.task) for b, _ in pairs])
    tells = share.effective if share.effective is not None else len(pairs)
    return Proportion(round(share.successes / runs), count, min(count, tells))


def _cross(domain: str, answers: Pairs) -> CrossRow:
    pairs = _judged(answers)
    return CrossRow(domain, accuracy([b for b, _ in pairs]), accuracy([m for _, m in pairs]), _p_value(pairs, kind_of))
