"""The served system against its parts: base alone, each modifier, always-modifier, oracle, teacher."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.evaluation.answers import answer_tasks, kind_of, majority_of
from cogumi_dagster.lib.evaluation.humaneval import answer_problems, load_problems
from cogumi_dagster.lib.evaluation.statistics import SIGNIFICANCE, Proportion, grouped_mcnemar, mcnemar
from cogumi_dagster.lib.inference import Engine, Message
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.routing.examples import collect_rows, system_tasks
from cogumi_dagster.lib.serving.answering import SERVED_TOKENS, Assistant, Params, Router
from cogumi_dagster.lib.tasks import verify

SERVED_SPOT_CHECKS = 5


@dataclass(frozen=True)
class SystemRow:
    system: str
    accuracy: Proportion


@dataclass(frozen=True)
class BenchmarkRow:
    """One model on one public benchmark; ``not_run`` says why where nothing was judged."""

    benchmark: str
    model: str
    split: str
    accuracy: Proportion
    majority: str
    not_run: str


@dataclass(frozen=True)
class SystemReport:
    """All systems on the same tasks (split ``test``). ``majority`` is what each family's commonest answer gets.

    Intervals and the gain's p are over kinds of tasks (see ``ModifierReport``); a regression is tested task by task.
    ``teacher`` is the exact solver: right by construction where it exists; ``with_solution`` counts those tasks.
    """

    tasks: int
    split: str
    majority: Proportion
    routed: Proportion
    base: Proportion
    oracle: Proportion
    gain: float
    p_value: float
    regresses: bool
    escalated_to_modifier: Proportion
    win_rate: Proportion
    """Of the tasks on which routed and base differ, the share that routed gets right."""
    systems: tuple[SystemRow, ...]
    spot_checks_equal: Proportion
    """Answers through the assistant's own code path that took the route of the batch evaluation."""
    benchmarks: tuple[BenchmarkRow, ...]
    seconds_per_answer: float
    not_run: int


def evaluate_system(
    engine: Engine,
    router: Router,
    assistant: Assistant,
    out: Path,
    *,
    count: int,
    humaneval: int,
    seed: int,
    progress: Progress = silent,
) -> SystemReport:
    """Answer fresh test tasks with base and modifiers, decide each with the router, and compare.

    Decoding is greedy, so deciding over stored answers equals serving them, but for what a batch of another
    size rounds otherwise; a few tasks go through the assistant itself to see it.
    """
    tasks = system_tasks(count, seed)
    by_id = {task.id: task for task in tasks}
    rows, base, _ = collect_rows(engine, tasks, progress)
    routes, passed = [], []
    for row in rows:
        decision = router.decide(row["prompt"], row["base"]["logprobs"], row["base"]["completion_tokens"])
        chosen = row["modifiers"].get(decision.route)
        routes.append(decision.route)
        if decision.route != "base" and chosen is None:  # routed to a modifier that was not asked: ask it now
            (answer,) = answer_tasks(engine, [by_id[row["task_id"]]], adapter=decision.route, room=SERVED_TOKENS)
            chosen = row["modifiers"][decision.route] = {"passed": answer.passed, "text": answer.completion.text}
        passed.append(bool((chosen or row["base"])["passed"]))
        row["routed"] = {"route": decision.route, "confidence": decision.confidence, "passed": passed[-1]}
    write_jsonl(out / "answers.jsonl", rows)
    right = [bool(row["base"]["passed"]) for row in rows]
    won = sum(p and not b for p, b in zip(passed, right, strict=True))
    lost = sum(b and not p for p, b in zip(passed, right, strict=True))
    kinds = [kind_of(by_id[row["task_id"]]) for row in rows]
    escalated = [route != "base" for route in routes]
    seconds = [answer.completion.seconds for answer in base]
    systems = _systems(rows, passed, tasks, kinds)
    equal, spot_seconds = _spot_checks(assistant, rows, routes)
    return SystemReport(
        tasks=len(rows),
        split="test",
        majority=majority_of([by_id[row["task_id"]] for row in rows]),
        routed=Proportion.of(passed, kinds),
        base=Proportion.of(right, kinds),
        oracle=next(one.accuracy for one in systems if one.system == "oracle"),
        gain=(won - lost) / max(1, len(rows)),
        p_value=grouped_mcnemar(right, passed, kinds),
        regresses=lost > won and mcnemar(won, lost) < SIGNIFICANCE,
        escalated_to_modifier=Proportion.of(escalated),
        win_rate=Proportion(won, won + lost),
        systems=systems,
        spot_checks_equal=equal,
        benchmarks=_humaneval(engine, humaneval) if humaneval else (),
        seconds_per_answer=spot_seconds or sum(seconds) / max(1, len(seconds)),
        not_run=len(tasks) - len(rows),
    )


def _systems(
    rows: Sequence[dict[str, Any]], passed: Sequence[bool], tasks: Sequence[Any], kinds: Sequence[str]
) -> tuple[SystemRow, ...]:
    def own(row: dict[str, Any], only: str | None = None) -> bool:
        name = row["modifier"]
        side = row["modifiers"].get(name) if only in (None, name) else None
        return bool((side or row["base"])["passed"])

    def best(row: dict[str, Any]) -> bool:
        return bool(row["base"]["passed"] or any(side["passed"] for side in row["modifiers"].values()))

    systems = [
        SystemRow("routed", Proportion.of(passed, kinds)),
        SystemRow("base alone", Proportion.of([r["base"]["passed"] for r in rows], kinds)),
    ]
    names = sorted({row["modifier"] for row in rows if row["modifier"] in row["modifiers"]})
    systems += [
        SystemRow(f"base, {n} on its own domains", Proportion.of([own(row, n) for row in rows], kinds)) for n in names
    ]
    systems.append(SystemRow("always the domain's modifier", Proportion.of([own(row) for row in rows], kinds)))
    systems.append(SystemRow("oracle", Proportion.of([best(row) for row in rows], kinds)))
    by_id = {task.id: task for task in tasks}
    solved = [by_id[row["task_id"]] for row in rows if by_id[row["task_id"]].solution is not None]
    systems.append(
        SystemRow(
            "teacher (solver, where it exists)", Proportion.of([verify(t, t.solution).passed is True for t in solved])
        )
    )
    return tuple(systems)


def _spot_checks(
    assistant: Assistant, rows: Sequence[dict[str, Any]], routes: Sequence[str]
) -> tuple[Proportion, float]:
    chosen = list(zip(rows, routes, strict=True))
    chosen = chosen[:: max(1, len(chosen) // SERVED_SPOT_CHECKS)][:SERVED_SPOT_CHECKS]
    same, started = 0, time.perf_counter()
    for row, route in chosen:
        message: Message = {"role": "user", "content": row["prompt"]}
        routed = assistant.answer([message], "cogumi", Params(max_tokens=assistant.answer_tokens))
        same += routed.route == route
    return Proportion(same, len(chosen)), (time.perf_counter() - started) / max(1, len(chosen))


def _humaneval(engine: Engine, limit: int) -> tuple[BenchmarkRow, ...]:
    problems = load_problems(limit).problems
    rows = []
    for adapter in (None, "code") if "code" in engine.adapters else (None,):
        verdicts = answer_problems(engine, problems, adapter)
        judged = [v for v in verdicts if v.passed is not None]
        rows.append(
            BenchmarkRow(
                benchmark=f"HumanEval ({len(problems)} of 164, pass@1)",
                model=f"cogumi-{adapter or 'base'}",
                split="test",
                accuracy=Proportion.of([v.passed is True for v in judged]),
                majority="0 (open answers)",
                not_run="" if judged else verdicts[0].reason,
            )
        )
    return tuple(rows)
