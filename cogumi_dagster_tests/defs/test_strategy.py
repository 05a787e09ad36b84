"""The strategy study in the graph."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cogumi_dagster.defs.strategy import assets
from cogumi_dagster.lib.errors import CogumiError
from resources import build_resources


def test_the_teacher_is_asked_before_the_student(
    profile: Path, edit_profile: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_profile(strategy__teacher="local")
    resources = build_resources(str(profile))
    store = resources["store"].open()
    inputs = {"learned_strategy": "scheduling", "strategy_adapter": "scheduling", "gguf_model": None}
    for asset, partition in inputs.items():
        with store.write(asset, partition) as draft:
            (draft.path / "strategy.json").write_text(json.dumps({"text": "Count."}))

    def refuses(teacher: Any, family: Any, strategy: str, **more: Any) -> Any:
        raise CogumiError(f"{teacher.name} was asked to {strategy}", "nothing")

    monkeypatch.setattr(assets, "ask_teacher", refuses)
    with pytest.raises(dg.Failure, match="local was asked to Count"):  # of files that are no models none is unpacked
        dg.materialize(
            assets.ASSETS, selection=[assets.strategy_evaluation], resources=resources, partition_key="scheduling"
        )
