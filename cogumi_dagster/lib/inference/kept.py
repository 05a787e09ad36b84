"""Answers of a step that may be killed: what was answered before is not asked again."""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.inference.base import Completion
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant


class KeptAnswers:
    """Completions by request, a line of a JSON Lines file each, written as they come. For one base and its adapters."""

    def __init__(self, path: Path) -> None:
        """A last line that a kill cut off is left out."""
        rows = read_jsonl_tolerant(path)[0] if path.is_file() else []
        self._found = {row["request"]: row["completion"] for row in rows}
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size:
            self._file.write("\n")  # ends a line that was cut off; empty lines are read over
        self._lock = threading.Lock()

    def get(self, request: Mapping[str, Any]) -> Completion | None:
        row = self._found.get(_key(request))
        return Completion(**{**row, "logprobs": tuple(row["logprobs"])}) if row else None

    def put(self, request: Mapping[str, Any], completion: Completion) -> None:
        with self._lock:
            self._file.write(json.dumps({"request": _key(request), "completion": asdict(completion)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _key(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)
