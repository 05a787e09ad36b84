"""Answers of evaluations, kept by the model that gave them: after a kill, or a changed budget, none is asked again."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.inference.base import Completion
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant

MODELS = 4
"""Models whose answers stay in a folder; those not used for the longest time go."""


class KeptAnswers:
    """Completions by request, a line of a JSON Lines file each, written as they come; a file for each base and version
    of the engine.

    A request names its adapter by the digest of the adapter's file: what the base alone answered, or what an adapter
    answered beside others, is found again whatever else is loaded.
    """

    def __init__(self, folder: Path, gguf: Path, adapters: Mapping[str, Path]) -> None:
        """A line that a kill cut off is left out."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_sha256(gguf)[:16]}-{version('xllamacpp')}.jsonl"
        self._digests = {name: file_sha256(adapter)[:16] for name, adapter in adapters.items()}
        rows = read_jsonl_tolerant(path)[0] if path.is_file() else []
        self._found = {row["request"]: row["completion"] for row in rows}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.utime(path)
        if path.stat().st_size:
            os.write(self._file, b"\n")  # ends a line that was cut off; empty lines are read over
        self._lock = threading.Lock()
        for old in sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)[:-MODELS]:
            old.unlink(missing_ok=True)

    def get(self, request: Mapping[str, Any]) -> Completion | None:
        row = self._found.get(self._key(request))
        if row is None:
            return None
        return Completion(**{**row, "logprobs": tuple(row["logprobs"]), "adapter": request["adapter"]})

    def put(self, request: Mapping[str, Any], completion: Completion) -> None:
        key, row = self._key(request), asdict(completion)
        with self._lock:
            self._found[key] = row
            # one write: a line of another process never comes in between
            os.write(self._file, (json.dumps({"request": key, "completion": row}) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)

    def _key(self, request: Mapping[str, Any]) -> str:
        name = request["adapter"]
        named = {**request, "adapter": self._digests[name] if name else None}
        if not request["temperature"]:
            del named["seed"]  # greedy decoding has none
        return json.dumps(named, sort_keys=True)
