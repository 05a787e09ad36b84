"""What a modifier is to leave as it is: requests that no lesson is about, with the base's own answers.

Lessons of a few kinds teach a small student that every answer is of these kinds: taught one-line functions by the
thousand, SmolLM2-135M completed HumanEval's in one line too (figures in docs/results.md). No verifier judges these
answers, and none need be right: learned beside the lessons, they keep the adapter from moving what the base does there.
Source: rehearsal of a model's own answers, Huang et al. 2024, arXiv 2403.01244; after Li and Hoiem 2016,
arXiv 1606.09282.
"""

import ast
from collections.abc import Sequence
from typing import Any

from cogumi_dagster.lib.curation.decontamination import decontaminate
from cogumi_dagster.lib.evaluation.humaneval import benchmark_prompts
from cogumi_dagster.lib.inference import Engine
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.tasks.code import extract_code
from cogumi_dagster.lib.tasks.drawing import seeded
from cogumi_dagster.lib.tasks.library_functions import Header, unjudged_headers

ANSWER_TOKENS = 320
FAMILY = "code_request"
WORDINGS = (
    "Complete this Python function. Reply with one Python code block that holds the whole function.",
    "Write this Python function. Reply with one Python code block that holds the function and its imports.",
)


def rehearse(engine: Engine, count: int, seed: int, progress: Progress = silent) -> list[dict[str, Any]]:
    """Up to ``count`` requests for code with the base's greedy answers, as rows with task and response.

    Answers that were cut off, or hold no function of that name that parses, are left out.
    """
    requests = _requests(count, seed) if count else []
    answers = engine.chat_many(
        [[{"role": "user", "content": task.prompt}] for task in requests], max_tokens=ANSWER_TOKENS, progress=progress
    )
    return [
        {"task": task.to_json(), "response": answer.text}
        for task, answer in zip(requests, answers, strict=True)
        if answer.finish_reason == "stop" and _defines(answer.text, task.payload["name"])
    ]


def _requests(count: int, seed: int) -> list[Task]:
    """Functions in either wording, none of which shares words with a benchmark."""
    asked = [_request(header, wording) for wording in WORDINGS for header in unjudged_headers()]
    rows: Sequence[Any] = [{"task": task.to_json()} for task in asked]
    new, _ = decontaminate(rows, benchmark_prompts())
    tasks = [Task.from_json(row["task"]) for row in new]
    seeded(FAMILY, seed).shuffle(tasks)
    return tasks[:count]


def _request(header: Header, wording: str) -> Task:
    return Task(
        domain="code",
        family=FAMILY,
        difficulty="medium",
        prompt=f"{wording}\n\n```python\n{header.text}\n```",
        payload={"name": header.name},
        source=f"{header.module}.{header.name}",
        licence=header.licence,
    )


def _defines(response: str, name: str) -> bool:
    try:
        tree = ast.parse(extract_code(response, name))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))
