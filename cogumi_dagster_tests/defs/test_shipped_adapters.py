from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogumi_dagster.defs.modifiers.assets import shipped_adapters


def step(ship: str, **passed: bool) -> Any:
    reports = {name: {"report": {"gate_passed": gate}} for name, gate in passed.items()}
    return SimpleNamespace(
        profile=SimpleNamespace(modifiers=SimpleNamespace(ship=ship)),
        inputs={
            "modifier_evaluation": {
                name: SimpleNamespace(manifest=SimpleNamespace(metrics=report)) for name, report in reports.items()
            }
        },
        paths=lambda asset: {name: Path(asset) / name for name in passed},
    )


@pytest.mark.parametrize(
    ("ship", "code", "reasoning", "shipped"),
    [
        ("passed", True, False, {"code"}),
        ("passed", False, False, set()),
        ("all", True, False, {"code", "reasoning"}),
    ],
)
def test_only_what_passed_its_gate_is_served_unless_all_is_asked_for(
    ship: str, code: bool, reasoning: bool, shipped: set[str]
) -> None:
    found = shipped_adapters(step(ship, code=code, reasoning=reasoning))
    assert set(found) == shipped
    assert all(path == Path("packaged_modifier") / name / "modifier.gguf" for name, path in found.items())
