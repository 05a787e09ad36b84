"""Runs inside the sandbox, as text given to ``python -c``: standard library only, no import of this package.

Reads a job (JSON) from stdin, runs the program, evaluates the expressions and writes one line of JSON for the
program and one for each expression to the descriptor named by the last argument. Values are tagged, so that
tuple and list, int and bool, 1 and 1.0 stay apart: ``["int", 1]``, ``["list", [["str", "a"]]]``.
"""

import builtins
import itertools
import json
import os
import sys
import types
from typing import Any

DEPTH = 30
ITEMS = 20_000
TEXT = 200_000


class Budget(Exception):
    pass


def tagged(value: Any, depth: int, left: list[int]) -> list[Any]:
    """``value`` as tagged JSON. Exact types only: a subclass may lie about what it is."""
    left[0] -= 1
    if depth > DEPTH or left[0] < 0:
        raise Budget("the value is too deep or too large")
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return [kind.__name__, value]
    if kind is float:
        return ["float", repr(value)]
    if kind is complex:
        return ["complex", [repr(value.real), repr(value.imag)]]
    if kind is str:
        if len(value) > TEXT:
            raise Budget("the text is too long")
        return ["str", value]
    if kind is bytes:
        return ["bytes", value[:TEXT].hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [tagged(item, depth + 1, left) for item in value]]
    if kind is dict:
        return ["dict", [[tagged(k, depth + 1, left), tagged(v, depth + 1, left)] for k, v in value.items()]]
    if kind is range:
        return ["range", [value.start, value.stop, value.step]]
    if hasattr(kind, "__next__"):
        return ["iterator", [tagged(item, depth + 1, left) for item in itertools.islice(value, ITEMS)]]
    return ["object", kind.__name__[:100]]


def brief(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an error that cannot be shown"


def main() -> None:
    out = int(sys.argv[-1])

    def send(row: bytes) -> None:
        while row:
            row = row[os.write(out, row) :]

    def line(**row: Any) -> bytes:
        return json.dumps(row).encode() + b"\n"

    job = json.loads(sys.stdin.buffer.read())
    sys.argv = ["program"]
    program = types.ModuleType("program")
    sys.modules["program"] = program
    space = program.__dict__
    space["__builtins__"] = builtins
    try:
        exec(compile(job["source"], "<program>", "exec"), space)
    except BaseException as error:
        send(line(error=brief(error)))
        os._exit(0)
    send(line(value=["NoneType", None]))
    for expression in job["expressions"]:
        try:
            row = line(value=tagged(eval(compile(expression, "<input>", "eval"), space), 0, [ITEMS]))
        except BaseException as error:
            row = line(error=brief(error))
        send(row)
    os._exit(0)  # threads of the program must not keep the run open


if __name__ == "__main__":
    main()
