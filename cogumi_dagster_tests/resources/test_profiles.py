"""The profiles that ship, and how resources read them."""

import shutil
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS, MODIFIERS, PROFILES, Profile, load_profile, profile_path
from cogumi_dagster.lib.teacher_data import teacher_data_version
from cogumi_dagster.lib.teaching.catalogue import load_catalogue
from resources import build_resources
from resources.settings import ProfileResource

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))
OFFLINE = {"tiny", "quick", "local"}


def test_the_profiles_that_the_documents_name_are_there() -> None:
    assert {"tiny", "quick", "local", "gpu", "cluster"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_it_loads_and_says_what_it_is_for(self, name: str) -> None:
        profile = load_profile(profile_path(name))
        assert profile.name == name
        assert len(profile.description) > 10

    def test_its_resources_are_built_without_touching_the_world(self, name: str, tmp_path: Path) -> None:
        assert set(build_resources(name)) == {"settings", "store", "compute", "inference", "teachers", "embeddings"}

    def test_every_domain_has_sources_and_teachers_whose_shares_sum_to_one(self, name: str) -> None:
        settings: ProfileResource = build_resources(name)["settings"]
        versions = {
            teacher_data_version(settings.profile, domain, settings.sources, settings.catalogue) for domain in DOMAINS
        }
        assert len(versions) == len(DOMAINS)
        for mix in settings.profile.teaching.mix.values():
            assert sum(entry.share for entry in mix) == pytest.approx(1.0)
        assert sum(settings.profile.dataset.mix.values()) == pytest.approx(1.0)
        assert set(settings.profile.modifiers.rank) == set(MODIFIERS)

    def test_its_teachers_are_in_the_catalogue(self, name: str) -> None:
        settings: ProfileResource = build_resources(name)["settings"]
        catalogue = load_catalogue(settings.catalogue)
        for teacher in _teachers(settings.profile):
            assert catalogue.get(teacher)

    def test_an_offline_profile_asks_only_teachers_that_are_here(self, name: str) -> None:
        teachers = _teachers(load_profile(profile_path(name)))
        assert (teachers <= {"solver", "local"}) == (name in OFFLINE)


def _teachers(profile: Profile) -> set[str]:
    named = {entry.teacher for mix in profile.teaching.mix.values() for entry in mix}
    return named | set(profile.modifiers.cascade) | ({profile.teaching.judge} - {"rules"})


def test_the_environment_chooses_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGUMI_PROFILE", raising=False)
    assert build_resources()["settings"].profile.name == "local"
    monkeypatch.setenv("COGUMI_PROFILE", "tiny")
    assert build_resources()["settings"].profile.name == "tiny"
    assert build_resources("quick")["settings"].profile.name == "quick"


def test_an_edited_profile_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    settings = ProfileResource(path=str(path))
    assert (settings.profile.name, settings.profile.seed) == ("mine", 1)
    path.write_text("seed: 2\n# longer\n")
    assert settings.profile.seed == 2


def test_sources_and_catalogue_lie_beside_the_profile_or_where_it_says(tmp_path: Path) -> None:
    shipped = PROFILES.parent
    path = tmp_path / "near" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("seed: 1\n")
    settings = ProfileResource(path=str(path))
    assert (settings.sources, settings.catalogue) == (shipped / "sources", shipped / "teachers.yaml")
    shutil.copy(shipped / "teachers.yaml", path.parent)
    assert settings.catalogue == path.parent / "teachers.yaml"
    path.write_text(f"dataset: {{sources: {tmp_path / 'far'}}}\n")
    (tmp_path / "far").mkdir()
    assert settings.sources == tmp_path / "far"


def test_the_store_is_below_the_home_and_named_after_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COGUMI_HOME", str(tmp_path))
    assert build_resources("tiny")["store"].open().root == tmp_path / ".cogumi" / "tiny"
    monkeypatch.delenv("COGUMI_HOME")
    monkeypatch.chdir(tmp_path)
    assert build_resources("quick")["store"].open().root == tmp_path / ".cogumi" / "quick"


def test_s3_without_a_bucket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("store: {kind: s3}\n")
    with pytest.raises(CogumiError, match=r"store.kind is s3 but store.bucket is not set"):
        build_resources(str(path))["store"].open()
