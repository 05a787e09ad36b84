from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.teacher_data import domain_mix, teacher_data_version

CATALOGUE = """
solver: {provider: solver, model: exact, tier: 3, usd_per_million_input: 0, usd_per_million_output: 0, stand_in: true}
other: {provider: solver, model: other, tier: 3, usd_per_million_input: 0, usd_per_million_output: 0, stand_in: true}
"""


@pytest.fixture
def profile() -> Profile:
    mix = {"mix": {"code": [{"teacher": "solver", "share": 1.0}], "math": [{"teacher": "solver", "share": 1.0}]}}
    return Profile.model_validate({"name": "x", "teaching": mix})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "code.yaml").write_text("files: [mine.jsonl]")
    (tmp_path / "math.yaml").write_text("families: [chain_sum]")
    (tmp_path / "mine.jsonl").write_text('{"instruction": "Say hi.", "response": "hi"}\n')
    (tmp_path / "teachers.yaml").write_text(CATALOGUE)
    return tmp_path, tmp_path / "teachers.yaml"


def with_teaching(profile: Profile, **changes: object) -> Profile:
    return Profile.model_validate({"name": "x", "teaching": {**profile.teaching.model_dump(), **changes}})


def test_the_version_changes_exactly_when_the_data_would(profile: Profile, files: tuple[Path, Path]) -> None:
    sources, catalogue = files
    first = teacher_data_version(profile, "code", sources, catalogue)
    assert first == teacher_data_version(profile, "code", sources, catalogue)
    assert first == teacher_data_version(with_teaching(profile, concurrency=9), "code", sources, catalogue)
    other = with_teaching(profile, mix={"code": [{"teacher": "other", "share": 1.0}]})
    assert first != teacher_data_version(other, "code", sources, catalogue)
    assert first != teacher_data_version(with_teaching(profile, judge="other"), "code", sources, catalogue)
    math = teacher_data_version(profile, "math", sources, catalogue)
    (sources / "mine.jsonl").write_text('{"instruction": "Say ho.", "response": "ho"}\n')
    assert first != teacher_data_version(profile, "code", sources, catalogue)
    assert math == teacher_data_version(profile, "math", sources, catalogue)


def test_a_domain_without_a_teacher_is_an_error(profile: Profile) -> None:
    assert domain_mix(profile, "code")[0].teacher == "solver"
    with pytest.raises(CogumiError, match="names no teacher for the domain creative") as caught:
        domain_mix(profile, "creative")
    assert "teaching.mix.creative" in caught.value.mend
