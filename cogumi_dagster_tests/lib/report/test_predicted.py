import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogumi_dagster.lib.artifacts import ArtifactRef, ArtifactStore
from cogumi_dagster.lib.profile import LoraConfig, Profile
from cogumi_dagster.lib.report.card import HTML, MARKDOWN, write_card
from cogumi_dagster.lib.report.predicted import compare_bytes, compare_training

SOURCES = Path(__file__).resolve().parents[3] / "resources" / "sources"
Keep = Callable[..., ArtifactRef]


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    """asset, folder, report -> an artifact with that folder's files."""
    store = ArtifactStore(tmp_path / "store")

    def write(asset: str, folder: Path | None = None, **report: object) -> ArtifactRef:
        with store.write(asset) as draft:
            (draft.path / "note").write_text(asset)
            if folder:
                shutil.copytree(folder, draft.path, dirs_exist_ok=True)
            draft.metrics.update(report=report)
        assert draft.ref is not None
        return draft.ref

    return write


@pytest.fixture
def profile(lora_config: LoraConfig) -> Profile:
    return Profile(name="x", training=lora_config)


@pytest.fixture
def refs(keep: Keep, student: Path, adapter: Path) -> list[ArtifactRef]:
    steps = {"steps": 2, "tokens": 300, "seconds": 1.5, "machine_flops_per_second": 1e9, "peak_memory_bytes": 9e8}
    return [
        keep("student_model", student),
        keep("base_checkpoint", student),
        keep("base_adapter", adapter, **steps),
        keep("curated_examples", rows=3),
    ]


def test_bytes_are_predicted_and_a_wrong_file_shows(refs: list[ArtifactRef], profile: Profile, keep: Keep) -> None:
    rows = compare_bytes(refs, profile)
    assert [row.artifact for row in rows] == ["student_model", "base_checkpoint", "base_adapter"]
    assert max(abs(row.error) for row in rows) < 1e-3
    other = Profile(name="x", training=profile.training.model_copy(update={"rank_attention": 8}))
    assert max(row.error for row in compare_bytes(refs, other)) > 0.2


def test_training_stands_beside_its_plan(refs: list[ArtifactRef], profile: Profile) -> None:
    with_sources = profile.model_copy(update={"teaching": Profile(name="y").teaching})
    mixed = with_sources.model_copy(
        update={"teaching": with_sources.teaching.model_copy(update={"mix": {"math": _solver()}})}
    )
    rows = {row.figure: row for row in compare_training(refs, mixed, SOURCES)}
    assert rows["steps, at most"].predicted == 2 and rows["steps, at most"].actual == 2
    assert rows["tokens, at most"].predicted == 2 * profile.training.batch_tokens
    assert 0 < rows["seconds, at most about"].predicted < 10, "with the machine's rate as the run recorded it"
    assert rows["peak memory, bytes"].actual == 9e8 and rows["peak memory, bytes"].predicted > 200e6
    assert compare_training([], mixed, SOURCES) == []


def _solver() -> tuple[object, ...]:
    from cogumi_dagster.lib.profile import DomainTeachers

    return (DomainTeachers(teacher="solver", share=1.0),)


def test_the_report_has_a_section_and_the_worst_error(
    refs: list[ArtifactRef], profile: Profile, tmp_path: Path
) -> None:
    report = write_card(refs, profile, tmp_path / "out")
    assert report.predicted_sizes == 3 and report.worst_size_error is not None and report.worst_size_error < 1e-3
    assert "<h2>Predicted and actual</h2>" in (tmp_path / "out" / HTML).read_text()
    assert "| base_adapter | bytes |" in (tmp_path / "out" / MARKDOWN).read_text()


def test_without_a_student_nothing_is_claimed(keep: Keep, profile: Profile, tmp_path: Path) -> None:
    report = write_card([keep("curated_examples", rows=3)], profile, tmp_path / "out")
    assert report.predicted_sizes == 0 and report.worst_size_error is None
    assert "Predicted and actual" not in (tmp_path / "out" / HTML).read_text()
