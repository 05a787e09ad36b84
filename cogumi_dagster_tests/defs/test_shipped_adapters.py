import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogumi_dagster.defs.modifiers.assets import shipped_adapters
from cogumi_dagster.lib.modifiers.evaluate import GATE_FILE


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., Any]:
    def make(ship: str, **passed: bool) -> Any:
        for name, gate in passed.items():
            folder = tmp_path / "modifier_evaluation" / name
            folder.mkdir(parents=True)
            (folder / GATE_FILE).write_text(json.dumps({"passed": gate}))
        return SimpleNamespace(
            profile=SimpleNamespace(modifiers=SimpleNamespace(ship=ship)),
            paths=lambda asset: {name: tmp_path / asset / name for name in passed},
        )

    return make


@pytest.mark.parametrize(
    ("ship", "code", "reasoning", "shipped"),
    [
        ("passed", True, False, {"code"}),
        ("passed", False, False, set()),
        ("all", True, False, {"code", "reasoning"}),
    ],
)
def test_only_what_passed_its_gate_is_served_unless_all_is_asked_for(
    step: Callable[..., Any], tmp_path: Path, ship: str, code: bool, reasoning: bool, shipped: set[str]
) -> None:
    found = shipped_adapters(step(ship, code=code, reasoning=reasoning))
    assert set(found) == shipped
    assert all(path == tmp_path / "packaged_modifier" / name / "modifier.gguf" for name, path in found.items())
