"""What a modifier for code is to keep: whole functions, of which no lesson of the cascade is.

Lessons of a few kinds make a small student forget the rest: taught one-line functions by the thousand, SmolLM2-135M no
longer wrote the list comprehensions that it had known (figures in docs/results.md). So documented functions of
installed libraries are learned beside them, as their authors wrote them: those that no verifier can judge, and those
that are training tasks. The base was not asked them. Source: rehearsal of what a model was trained on, Robins 1995,
doi 10.1080/09540099550039318.
"""

from typing import Any

from cogumi_dagster.lib.curation.decontamination import decontaminate
from cogumi_dagster.lib.evaluation.humaneval import benchmark_prompts
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.tasks.code import CODE_FUNCTION
from cogumi_dagster.lib.tasks.drawing import seeded
from cogumi_dagster.lib.tasks.library_functions import (
    FurtherFunction,
    LibraryFunction,
    further_functions,
    library_functions,
)

WORDINGS = (
    "Complete this Python function. Reply with one Python code block that holds the whole function.",
    "Write this Python function. Reply with one Python code block that holds the function and its imports.",
)


def rehearsal_lessons(count: int, seed: int) -> list[dict[str, Any]]:
    """Up to ``count`` requests for a function with the library's own, as rows with task and response; each function in
    each of ``WORDINGS``, and none that shares words with a benchmark."""
    if not count:
        return []
    tasks = [_request(function, wording) for wording in WORDINGS for function in _functions()]
    rows = [{"task": task.to_json(), "response": task.solution} for task in tasks]
    kept, _ = decontaminate(rows, benchmark_prompts())
    chosen = [dict(row) for row in kept]
    seeded("code_rehearsal", seed).shuffle(chosen)
    return chosen[:count]


def _functions() -> list[FurtherFunction | LibraryFunction]:
    tasks = [one for one in library_functions() if CODE_FUNCTION.task_for(one, "easy").split == "train"]
    return [*further_functions(), *tasks]


def _request(function: FurtherFunction | LibraryFunction, wording: str) -> Task:
    return Task(
        domain="code",
        family=CODE_FUNCTION.name,  # so that a held-out function is seen to be near
        difficulty="medium",
        prompt=f"{wording}\n\n```python\n{function.header}\n```",
        solution=f"```python\n{function.source}\n```",
        source=f"{function.module}.{function.name}",
        licence=function.licence,
    )
