"""A profile of its own for each test: tiny, with its own store, sources and teachers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import resources

HERE = Path(resources.__file__).resolve().parent

EditProfile = Callable[..., None]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The path of a profile whose store, ``sources`` and ``teachers.yaml`` lie beside it."""
    shutil.copytree(HERE / "sources", tmp_path / "sources")
    shutil.copy(HERE / "teachers.yaml", tmp_path / "teachers.yaml")
    data = yaml.safe_load((HERE / "profiles" / "tiny.yaml").read_text())
    data["store"] = {"path": str(tmp_path / "cogumi" / "store")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def edit_profile(profile: Path) -> EditProfile:
    """``edit_profile(training__max_steps=7)`` changes one value of the profile."""

    def edit(**values: Any) -> None:
        data = yaml.safe_load(profile.read_text())
        for dotted, value in values.items():
            *parents, last = dotted.split("__")
            section = data
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        profile.write_text(yaml.safe_dump(data))

    return edit
