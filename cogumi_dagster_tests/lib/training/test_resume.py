import json
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.training.resume import newest_state, save_state


def state(value: float) -> dict[str, Any]:
    import torch

    return {"adapter": {"w": torch.full((3,), value)}}


def test_the_two_newest_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_state(tmp_path, step, state(step), {"log": [step]}, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    found = newest_state(tmp_path, "run")
    assert found is not None
    assert found[0] == 15 and found[1]["adapter"]["w"].tolist() == [15.0] * 3
    assert found[2] == {"log": [15]}


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "half a manifest", "no state", "a list"])
def test_a_corrupted_newest_state_is_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (5, 10):
        save_state(tmp_path, step, state(step), {}, "run")
    data, manifest = tmp_path / "step-000010" / "state.pt", tmp_path / "step-000010" / "manifest.json"
    match damage:
        case "flip":
            data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        case "truncate":
            data.write_bytes(data.read_bytes()[:100])
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:20])
        case "no state":
            data.unlink()
        case _:
            manifest.write_text(json.dumps([1]))
    found = newest_state(tmp_path, "run")
    assert found is not None and found[0] == 5


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "none", "run") is None
    (tmp_path / ".tmp-1").mkdir()
    assert newest_state(tmp_path, "run") is None


def test_a_state_of_another_run_is_not_taken(tmp_path: Path) -> None:
    save_state(tmp_path, 5, state(5), {}, "other data")
    assert newest_state(tmp_path, "run") is None
