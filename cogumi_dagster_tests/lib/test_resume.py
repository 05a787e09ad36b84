import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.resume import newest_step, save_step


def content(value: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / "state").write_bytes(bytes([value]) * 300)


def test_the_two_newest_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_step(tmp_path, step, content(step), {"log": [step]}, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    found = newest_step(tmp_path, "run")
    assert found is not None
    assert found[0] == 15 and (found[1] / "state").read_bytes() == bytes([15]) * 300
    assert found[2] == {"log": [15]}


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "half a manifest", "no state", "a list"])
def test_a_corrupted_newest_step_is_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (5, 10):
        save_step(tmp_path, step, content(step), {}, "run")
    data, manifest = tmp_path / "step-000010" / "state", tmp_path / "step-000010" / "manifest.json"
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
    found = newest_step(tmp_path, "run")
    assert found is not None and found[0] == 5


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none", "run") is None
    (tmp_path / ".tmp-1").mkdir()
    assert newest_step(tmp_path, "run") is None


def test_a_state_of_another_run_is_not_taken_and_does_not_push_ours_out(tmp_path: Path) -> None:
    save_step(tmp_path, 200, content(5), {}, "other data")
    save_step(tmp_path, 220, content(5), {}, "other data")
    assert newest_step(tmp_path, "run") is None
    save_step(tmp_path, 20, content(1), {}, "run")
    found = newest_step(tmp_path, "run")
    assert found is not None and found[0] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["step-000020"]
