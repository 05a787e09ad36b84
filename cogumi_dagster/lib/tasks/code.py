"""Code: write or complete a function, say what a call returns, write an expression, work out an expression's value.

Model text runs only in the sandbox, with inputs that go in and values that are compared outside. Where there
is no sandbox the verdict is "not run", never a guess.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from cogumi_dagster.lib.sandbox import Sandbox, compare, same, sandbox_available
from cogumi_dagster.lib.tasks.base import Difficulty, Task, Verdict
from cogumi_dagster.lib.tasks.code_requests import draw_request, steps_of, value_of
from cogumi_dagster.lib.tasks.drawing import distinct, seeded
from cogumi_dagster.lib.tasks.library_functions import Example, LibraryFunction, library_functions

_LINES: Mapping[Difficulty, tuple[int, int]] = {"easy": (1, 3), "medium": (4, 8), "hard": (9, 16)}
"""Lines of the library's own body."""
_SANDBOX = Sandbox(seconds=4.0, memory_mb=256)
_NAMES = ("solve", "compute", "process", "transform", "get_result", "calculate", "find", "answer", "evaluate", "apply")
_LONGEST = 8_000
"""Characters of a response that are looked at. A right answer has a few hundred."""


def extract_code(response: str, name: str) -> str:
    """The code of a response: the last fenced block that defines ``name``, else all blocks, else the text."""
    blocks = re.findall(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:```|\Z)", response, re.DOTALL)
    defining = [block for block in blocks if f"def {name}" in block]
    if defining:
        return str(defining[-1])
    return "\n".join(blocks) if blocks else response


def run_examples(source: str, examples: Sequence[Mapping[str, str]], sandbox: Sandbox = _SANDBOX) -> Verdict:
    """Evaluate each example's ``call`` after ``source`` in the sandbox; compare with its ``value`` outside."""
    usable, reason = sandbox_available()
    if not usable:
        return Verdict(None, f"not run: {reason}")
    result = sandbox.evaluate(source, [example["call"] for example in examples])
    passed = [
        outcome.ok and compare(outcome.value, example["value"])
        for outcome, example in zip(result.outcomes, examples, strict=True)
    ]
    score = sum(passed) / len(passed)
    if all(passed):
        return Verdict(True, f"{len(passed)} of {len(passed)} examples", 1.0)
    first = passed.index(False)
    outcome, example = result.outcomes[first], examples[first]
    got = repr(outcome.value)[:80] if outcome.ok else outcome.error
    return Verdict(False, f"{example['call']} is {example['value']}, not {got}", score)


def _parses(source: str, mode: str) -> bool:
    try:
        ast.parse(source, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _rows(examples: Sequence[Example]) -> list[dict[str, str]]:
    return [{"call": example.call, "value": example.value} for example in examples]


class CodeFunction:
    """Write a library function from its signature, its description and one example."""

    name = "code_function"
    domain = "code"
    executes = True
    max_tokens = 320
    version = "2"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        least, most = _LINES[difficulty]
        functions = [
            one
            for one in library_functions()
            if least <= one.lines <= most and len({example.value for example in one.examples}) > 1
        ]  # with one value, which is shown, a constant would pass
        seeded(self.name, difficulty, seed).shuffle(functions)
        return [self.task_for(one, difficulty) for one in functions[:count]]

    def verify(self, task: Task, response: str) -> Verdict:
        source = extract_code(response[:_LONGEST], task.payload["name"])
        if not _parses(source, "exec"):
            return Verdict(False, "the code does not parse")
        return run_examples(source, task.payload["examples"])

    def task_for(self, function: LibraryFunction, difficulty: Difficulty) -> Task:
        """The task to write that function."""
        shown = function.examples[0]
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=f"Write this Python function.\n{function.signature}\n{function.doc}\n"
            f"Example: {shown.call} returns {shown.value}\n"
            "Reply with one Python code block that holds the function and its imports.",
            payload={"name": function.name, "examples": _rows(function.examples)},
            solution=f"```python\n{function.source}\n```",
            source=f"{function.module}.{function.name}",
            licence=function.licence,
        )


class CodeOutput:
    """Say what a call of a short library function returns. Nothing is executed to judge it."""

    name = "code_output"
    domain = "code"
    max_tokens = 96
    version = "2"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        least, most = _LINES[difficulty]
        pairs = [
            (function, example)
            for function in library_functions()
            for example in function.examples
            if least <= function.lines <= most and CODE_FUNCTION.task_for(function, difficulty).split == "train"
        ]  # a function that is to be written in a held-out task is shown in none
        seeded(self.name, difficulty, seed).shuffle(pairs)
        return [self._task(function, example, difficulty) for function, example in pairs[:count]]

    def verify(self, task: Task, response: str) -> Verdict:
        return judge_literal(response, task.payload["value"])

    def _task(self, function: LibraryFunction, example: Example, difficulty: Difficulty) -> Task:
        summary = function.doc.split(". ")[0].rstrip(".")
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            prompt=f"{function.source}\n\nWhat does {example.call} return?\n"
            'Say briefly what the function does, then end with a line "Answer: <Python literal>".',
            payload={"value": example.value},
            answer=example.value,
            solution=f"{summary}.\nAnswer: {example.value}",
            source=f"{function.module}.{function.name}",
            licence=function.licence,
        )


@dataclass(frozen=True)
class Asked:
    """An expression that a request asks for in ``words``. ``examples``: inputs with their values, as literals."""

    words: str
    variable: str
    expression: str
    examples: Sequence[Mapping[str, str]]


class ByRequest:
    """A family whose tasks ask for one of our expressions; it runs in the sandbox on several inputs. Tasks with one
    expression are of one split, whatever the input that is shown, and whichever family asks, ``CodeValue`` too."""

    name: str
    domain = "code"
    executes = True

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        rng = seeded(self.name, difficulty, seed)
        return distinct(lambda: self._task(rng, difficulty), count)

    def _task(self, rng: Random, difficulty: Difficulty) -> Task | None:
        request, parameters, inputs = draw_request(rng, difficulty, inputs=5)
        expression = request.expression.format(**parameters)
        examples = [
            {"input": repr(given), "value": repr(value_of(expression, request.variable, given))} for given in inputs
        ]
        if len({one["value"] for one in examples}) == 1:
            return None  # a constant would pass
        asked = Asked(request.words.format(**parameters), request.variable, expression, examples)
        return Task(
            domain=self.domain,
            family=self.name,
            difficulty=difficulty,
            answer=expression,
            split_by=f"code_expression {expression}",
            kind=request.expression,
            **self._say(asked),
        )

    def _say(self, asked: Asked) -> dict[str, Any]:
        """Prompt, payload and solution of a task."""
        raise NotImplementedError


class CodeExpression(ByRequest):
    """Write one expression for a request."""

    name = "code_expression"
    max_tokens = 96
    version = "3"

    def _say(self, asked: Asked) -> dict[str, Any]:
        shown = asked.examples[0]
        return {
            "prompt": f"Write one Python expression for {asked.words}.\n"
            f"For {asked.variable} = {shown['input']} its value is {shown['value']}.\n"
            "Reply with the expression in a Python code block.",
            "payload": {"variable": asked.variable, "examples": asked.examples},
            "solution": f"```python\n{asked.expression}\n```",
        }

    def verify(self, task: Task, response: str) -> Verdict:
        expression = _expression(response[:_LONGEST])
        if expression is None:
            return Verdict(False, "there is no single Python expression in the response")
        variable = task.payload["variable"]
        calls = [
            {"call": f"(lambda {variable}: (\n{expression}\n))({one['input']})", "value": one["value"]}
            for one in task.payload["examples"]
        ]
        return run_examples("", calls)


class CodeDefinition(ByRequest):
    """Complete a function from its header and docstring, with what an expression for a request gives."""

    name = "code_definition"
    max_tokens = 256  # with the docstring repeated
    version = "2"

    def _say(self, asked: Asked) -> dict[str, Any]:
        name = seeded(self.name, asked.expression).choice(_NAMES)
        header = f"def {name}({asked.variable}):"
        shown = "".join(f"    >>> {name}({one['input']})\n    {one['value']}\n" for one in asked.examples[:2])
        return {
            "prompt": "Complete this Python function. Reply with one Python code block that holds the whole "
            f'function.\n\n```python\n{header}\n    """Return {asked.words}.\n\n{shown}    """\n```',
            "payload": {
                "name": name,
                "examples": [{"call": f"{name}({one['input']})", "value": one["value"]} for one in asked.examples],
            },
            "solution": f"```python\n{header}\n    return {asked.expression}\n```",
        }

    def verify(self, task: Task, response: str) -> Verdict:
        return CODE_FUNCTION.verify(task, response)


class CodeValue:
    """Work out the value of an expression, step by step. Nothing is executed to judge it."""

    name = "code_value"
    domain = "code"
    max_tokens = 224
    version = "3"

    def generate(self, count: int, seed: int, difficulty: Difficulty) -> list[Task]:
        rng = seeded(self.name, difficulty, seed)

        def make() -> Task:
            request, parameters, (given,) = draw_request(rng, difficulty, inputs=1)
            expression = request.expression.format(**parameters)
            value = repr(value_of(expression, request.variable, given))
            steps = steps_of(request, parameters, given)
            return Task(
                domain=self.domain,
                family=self.name,
                difficulty=difficulty,
                prompt=f"{request.variable} = {given!r}\nWhat is the value of {expression} in Python?\n"
                'Work it out, then end with a line "Answer: <Python literal>".',
                payload={"value": value},
                answer=value,
                solution=f"{steps}\nAnswer: {value}",
                split_by=f"code_expression {expression}",
                kind=request.expression,
            )

        return distinct(make, count)

    def verify(self, task: Task, response: str) -> Verdict:
        return judge_literal(response, task.payload["value"])


def judge_literal(response: str, value: str) -> Verdict:
    """Pass when the last ``Answer:`` (else the last line) is the literal ``value``, types included."""
    expected = ast.literal_eval(value)
    stated = re.findall(r"\banswer\b[*_ \t]*[:=][*_ \t]*([^\n]+)", response[-_LONGEST:], re.IGNORECASE)
    lines = [line for line in response[-_LONGEST:].splitlines() if line.strip(" `\t")]
    text = (stated or lines or [""])[-1].strip().strip("`* \t")
    for candidate in (text, text.removesuffix(".")):
        if same(_literal(candidate), expected) or (isinstance(expected, str) and candidate == expected):
            return Verdict(True, "right", 1.0)
    return Verdict(False, f"the answer is {value}, not {text[:80]}" if text else "no answer was given")


def _literal(text: str) -> Any:
    """The literal, or a value that is the same as no literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return object()


def _expression(response: str) -> str | None:
    """The one expression of a response: of the code block, of the back-ticks, or of the last line."""
    blocks = re.findall(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:```|\Z)", response, re.DOTALL)
    ticked = re.findall(r"`([^`\n]+)`", response)
    lines = [line for line in response.splitlines() if line.strip()]
    text = blocks[-1] if blocks else ticked[-1] if ticked else lines[-1] if lines else ""
    text = re.sub(r"^(?:answer\s*:|[A-Za-z_]\w*\s*=(?!=)|return\b)", "", text.strip(), flags=re.IGNORECASE).strip()
    return text if text and len(text) <= 400 and _parses(text, "eval") else None


CODE_FUNCTION = CodeFunction()
CODE_OUTPUT = CodeOutput()
CODE_EXPRESSION = CodeExpression()
CODE_DEFINITION = CodeDefinition()
CODE_VALUE = CodeValue()
