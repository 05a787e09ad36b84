"""Finished steps of a long computation that a kill cannot spoil: written aside, hashed, renamed whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256

MANIFEST = "manifest.json"


def save_step(
    folder: Path, step: int, write: Callable[[Path], None], said: dict[str, Any], key: str, *, keep: int = 2
) -> Path:
    """Have ``write`` fill ``step-N``; keep the ``keep`` newest of this run, whose ``key`` it is. ``said`` is JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".tmp-{os.getpid()}"
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    write(aside)
    files = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps({"step": step, "key": key, "files": files, "said": said}))
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    steps = sorted(folder.glob("step-*"))
    # of older code or data: a later step of theirs is not newer
    others = [other for other in steps if _key_of(other) != key]
    for old in [*others, *[step for step in steps if step not in others][:-keep]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _key_of(step: Path) -> str | None:
    try:
        return str(json.loads((step / MANIFEST).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_step(folder: Path, key: str) -> tuple[int, Path, dict[str, Any]] | None:
    """(step, its folder, what was said) of this run's newest step whose hashes hold; None where there is none."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((candidate / MANIFEST).read_text())
            files = manifest["files"].items()
            if manifest["key"] == key and all(file_sha256(candidate / name) == digest for name, digest in files):
                return manifest["step"], candidate, manifest["said"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
