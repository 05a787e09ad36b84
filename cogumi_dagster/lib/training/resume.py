"""Training checkpoints that a kill cannot spoil: written aside, renamed, manifest last."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256


def save_state(folder: Path, step: int, state: dict[str, Any], log: list[dict[str, float]]) -> None:
    """Write ``step-N`` atomically and keep the two newest."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".tmp-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    torch.save(state, aside / "state.pt")
    manifest = {"step": step, "sha256": file_sha256(aside / "state.pt"), "log": log}
    (aside / "manifest.json").write_text(json.dumps(manifest))
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def newest_state(folder: Path) -> tuple[int, dict[str, Any], list[dict[str, float]]] | None:
    """(step, state, log) of the newest checkpoint whose hash holds; None where there is none."""
    import torch

    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((candidate / "manifest.json").read_text())
            if file_sha256(candidate / "state.pt") == manifest["sha256"]:
                state = torch.load(candidate / "state.pt", weights_only=True, map_location="cpu")
                return manifest["step"], state, manifest["log"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
