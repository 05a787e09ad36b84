"""JSON Lines on disk: tolerant reading that counts what it had to leave out, atomic writing."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError


@dataclass(frozen=True)
class JsonlReport:
    """What a tolerant read kept and where it stumbled (1-based line numbers)."""

    path: str
    rows: int
    broken: int
    broken_lines: tuple[int, ...]

    def describe(self) -> str:
        lines = ", ".join(str(n) for n in self.broken_lines[:10])
        more = "" if self.broken <= 10 else f" and {self.broken - 10} more"
        return f"{self.path}: {self.broken} broken line(s) left out (line {lines}{more}), {self.rows} kept"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file that we wrote: any broken line is an error."""
    rows, report = read_jsonl_tolerant(path)
    if report.broken:
        raise CogumiError(report.describe(), "materialize the asset that wrote this file again")
    return rows


def read_jsonl_tolerant(path: Path) -> tuple[list[dict[str, Any]], JsonlReport]:
    """Read a user's file: keep the objects, count and locate every line that is not one."""
    if not path.is_file():
        raise CogumiError(f"there is no file {path}", "check the path")
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                broken.append(number)
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken.append(number)
    return rows, JsonlReport(str(path), len(rows), len(broken), tuple(broken))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to ``path`` through a temporary file; return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            count += 1
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    return count
