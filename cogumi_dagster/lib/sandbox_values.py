"""The values that a sandboxed program sends back: parsed as untrusted data, compared strictly, outside."""

import ast
import json
from dataclasses import dataclass
from typing import Any

_DEPTH = 40


@dataclass(frozen=True)
class Opaque:
    """A value that is no plain literal: ``tag`` is ``iterator`` (with its items) or ``object`` (with its type).

    It is equal to no literal.
    """

    tag: str
    content: Any


@dataclass(frozen=True)
class Outcome:
    """The value of one expression, or why it has none."""

    ok: bool
    value: Any
    error: str = ""


def parse_outcomes(data: bytes, count: int) -> tuple[Outcome, ...] | None:
    """The program's outcome and those of ``count`` expressions; None when not even the program reported.

    Whatever is missing, broken or too much counts as an expression without a value.
    """
    rows = [_outcome(line) for line in data.split(b"\n")[: count + 1] if line]
    if not rows:
        return None
    absent = Outcome(False, None, rows[0].error or "no value came back")
    return (*rows, *[absent] * (count + 1 - len(rows)))


def _outcome(line: bytes) -> Outcome:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and "value" in row:
            return Outcome(True, _untag(row["value"], 0))
        if isinstance(row, dict):
            return Outcome(False, None, str(row.get("error"))[:300] or "error")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError, AttributeError):
        pass
    return Outcome(False, None, "a broken value came back")


def _untag(tagged: Any, depth: int) -> Any:
    """A tagged value as the plain Python value. Raises ValueError or TypeError for anything else."""
    tag, content = tagged
    if depth > _DEPTH:
        raise ValueError("too deep")
    if tag in ("NoneType", "bool", "int", "str"):
        if type(content).__name__ != tag:
            raise ValueError(f"{tag} expected")
        return content
    if tag == "float":
        return float(content)
    if tag == "complex":
        return complex(float(content[0]), float(content[1]))
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "range":
        return range(*(int(part) for part in content))
    if tag == "dict":
        return {_untag(key, depth + 1): _untag(value, depth + 1) for key, value in content}
    if tag == "object":
        return Opaque("object", str(content)[:100])
    items = [_untag(item, depth + 1) for item in content]
    if tag == "iterator":
        return Opaque("iterator", items)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)


def compare(value: Any, expected_literal: str) -> bool:
    """Whether ``value`` is exactly what the literal says: same types throughout, so ``1``, ``1.0`` and ``True``
    differ, and so do ``[1]`` and ``(1,)``. The order of a dict does not count.

    Raises:
        ValueError: ``expected_literal`` is not a Python literal.
    """
    try:
        expected = ast.literal_eval(expected_literal)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a literal: {expected_literal[:80]!r}") from error
    return same(value, expected)


def same(left: Any, right: Any) -> bool:
    """Equality with equal types throughout. NaN is the same as NaN."""
    if type(left) is not type(right) or isinstance(left, Opaque):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        keys = {_typed(key): key for key in right}
        return len(left) == len(right) and all(
            _typed(key) in keys and same(value, right[keys[_typed(key)]]) for key, value in left.items()
        )
    if isinstance(left, set | frozenset):
        return {_typed(item) for item in left} == {_typed(item) for item in right}
    return bool(left == right) or (isinstance(left, float) and left != left and right != right)


def _typed(item: Any) -> Any:
    """A hashable stand-in that keeps types apart: ``1``, ``1.0`` and ``True`` are equal keys in Python."""
    if isinstance(item, tuple):
        return ("tuple", tuple(map(_typed, item)))
    if isinstance(item, frozenset):
        return ("frozenset", frozenset(map(_typed, item)))
    return (type(item).__name__, item)
