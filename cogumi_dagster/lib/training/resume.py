"""Training checkpoints that a kill cannot spoil: written aside, hashed, renamed whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256


def save_state(folder: Path, step: int, state: dict[str, Any], said: dict[str, Any], key: str) -> None:
    """Write ``step-N`` atomically and keep the two newest. ``said`` is JSON; ``key`` names the run it belongs to."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".tmp-{os.getpid()}"
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    torch.save(state, aside / "state.pt")
    manifest = {"step": step, "key": key, "sha256": file_sha256(aside / "state.pt"), "said": said}
    (aside / "manifest.json").write_text(json.dumps(manifest))
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def newest_state(folder: Path, key: str) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """(step, state, said) of this run's newest checkpoint whose hash holds; None where there is none."""
    import torch

    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((candidate / "manifest.json").read_text())
            if manifest["key"] == key and file_sha256(candidate / "state.pt") == manifest["sha256"]:
                state = torch.load(candidate / "state.pt", weights_only=True, map_location="cpu")
                return manifest["step"], state, manifest["said"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
