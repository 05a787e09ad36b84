import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cogumi_dagster.lib.compression import gradual
from cogumi_dagster.lib.compression.gradual import PruningReport, prune
from cogumi_dagster.lib.compression.prune import class_weights, zero_share
from cogumi_dagster.lib.compression.pruning_steps import PruningRecord
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import load_checkpoint

SCHEDULE = PruningConfig.model_validate(
    {
        "method": "wanda", "sparsity_attention": 0.6, "sparsity_feed_forward": 0.7, "sparsity_embeddings": 0.5,
        "schedule": (0.2, 0.4, 0.6), "calibration_samples": 4, "calibration_tokens": 32, "benchmark_tasks": 3,
        "between": {"steps": 3, "learning_rate": 2e-3},
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(
    student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PruningReport, list[str]]:
    folder = tmp_path_factory.mktemp("whole")
    said: list[str] = []
    report = prune(
        student, pairs, pairs[:4], folder / "out", SCHEDULE, scratch=folder / "scratch",
        progress=lambda done, total, note="": said.append(f"{done}/{total} {note}"),
    )  # fmt: skip
    return folder, report, said


def test_one_step_prunes_and_does_not_train(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    config = PruningConfig(
        sparsity_attention=0.3, sparsity_feed_forward=0.6, calibration_samples=4, calibration_tokens=32
    )
    report = prune(student, pairs, pairs[:4], tmp_path / "out", config, scratch=tmp_path / "scratch")
    model, _ = load_checkpoint(tmp_path / "out")
    weights = class_weights(model)
    assert (report.sparsity_attention, report.sparsity_feed_forward) == (
        zero_share(weights["attention"]),
        zero_share(weights["feed_forward"]),
    )
    assert report.sparsity_missing < 0.02
    assert report.zeros == sum(int((p == 0).sum()) for p in model.parameters())
    assert (report.calibration_samples, set(report.calibration_tokens)) == (4, {"sums"})
    assert report.perplexity_after != report.perplexity_before
    assert [row.step for row in report.pruning] == [0, 1]
    assert PruningRecord.load(tmp_path / "out").pruned == ("attention", "feed_forward")  # type: ignore[union-attr]
    assert not (tmp_path / "scratch").exists(), "nothing to go on from"


def test_nothing_asked_is_nothing_pruned(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    config = PruningConfig(sparsity_attention=0, sparsity_feed_forward=0, calibration_samples=4, calibration_tokens=32)
    report = prune(student, pairs, pairs[:2], tmp_path / "out", config, scratch=tmp_path / "scratch")
    assert report.perplexity_after == report.perplexity_before
    assert report.sparsity_missing == 0


def test_a_schedule_has_a_row_for_the_parent_and_for_each_step(whole: tuple[Path, PruningReport, list[str]]) -> None:
    folder, report, said = whole
    rows = report.pruning
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert [row.sparsity for row in rows[1:]] == pytest.approx([0.2, 0.4, 0.6], abs=0.03)
    assert all(row.perplexity_recovered < row.perplexity for row in rows[1:3]), "training brings some of it back"
    assert rows[3].perplexity_recovered != rows[3].perplexity_recovered, "the last recovery is another artifact"
    assert all(row.score.count == 3 for row in rows)
    assert [row.score_recovered.count for row in rows] == [0, 3, 3, 0]
    assert report.masks_intact
    assert all(row.mask_intact for row in rows)
    assert report.sparsity_missing < 0.02
    assert set(report.loss_by_sparsity.series) == {"pruned", "after recovery"}
    assert json.loads(json.dumps(report_json(report)))["pruning"][3]["perplexity_recovered"] is None
    record = PruningRecord.load(folder / "out")
    assert record is not None
    assert (record.pruned, record.tasks) == (("attention", "feed_forward", "embeddings"), 3)
    assert said[0].startswith("1/9 step 1: loss")
    assert len(said) == 6
    assert [path.name for path in (folder / "scratch").iterdir()] == ["step-000002"], "only the newest step is kept"


def test_a_killed_run_goes_on_from_its_last_finished_step_to_the_same_weights(
    whole: tuple[Path, PruningReport, list[str]],
    student: Path,
    pairs: list[Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, wanted, _ = whole
    trained: list[int] = []
    real = gradual.train_masked

    def killed_in_step_two(*arguments: Any, **options: Any) -> Any:
        trained.append(options["seed"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(gradual, "train_masked", killed_in_step_two)
    with pytest.raises(KeyboardInterrupt):
        prune(student, pairs, pairs[:4], tmp_path / "out", SCHEDULE, scratch=tmp_path / "scratch")
    report = prune(student, pairs, pairs[:4], tmp_path / "out", SCHEDULE, scratch=tmp_path / "scratch")
    assert trained == [1, 2, 2], "step 1 is not trained twice"
    assert report.resumed_from == 1
    assert load_file(folder / "out/model.safetensors").keys() == load_file(tmp_path / "out/model.safetensors").keys()
    for name, weight in load_file(folder / "out/model.safetensors").items():
        assert weight.equal(load_file(tmp_path / "out/model.safetensors")[name]), name
    same = [(row.sparsity, row.perplexity) for row in report.pruning]
    assert same == [(row.sparsity, row.perplexity) for row in wanted.pruning]


def test_a_damaged_step_is_not_gone_on_from(
    whole: tuple[Path, PruningReport, list[str]], student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    shutil.copytree(whole[0] / "scratch", tmp_path / "scratch")
    weights = tmp_path / "scratch/step-000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    key = f"{SCHEDULE.model_dump_json()} 0"
    assert gradual._newest(tmp_path / "scratch", key) == ([], None)
    assert gradual._newest(whole[0] / "scratch", "another configuration") == ([], None)
    rows, folder = gradual._newest(whole[0] / "scratch", key)
    assert (len(rows), folder) == (3, whole[0] / "scratch/step-000002")


def test_a_mask_that_is_broken_shows(
    student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gradual.prune_model
    steps = 0

    def forgets_the_first_mask(model: Any, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            weight = model.model.layers[0].mlp.up_proj.weight
            weight.data[weight == 0] = 1.0
        else:
            real(model, *arguments)

    monkeypatch.setattr(gradual, "prune_model", forgets_the_first_mask)
    config = SCHEDULE.model_copy(update={"benchmark_tasks": 0})
    report = prune(student, pairs, pairs[:2], tmp_path / "out", config, scratch=tmp_path / "scratch")
    assert [row.mask_intact for row in report.pruning] == [True, True, False, True]
    assert not report.masks_intact


@pytest.mark.parametrize("bad", ["nan", "missing", "truncated", "no config"])
def test_an_unsound_checkpoint_is_refused(student: Path, pairs: list[Pair], tmp_path: Path, bad: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(student, damaged)
    file = damaged / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    if bad == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif bad == "no config":
        (damaged / "config.json").unlink()
    else:
        tensors = load_file(file)
        if bad == "nan":
            tensors[name][0, 0] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    problem = {
        "nan": f"tensor {name} holds NaN or infinite values",
        "missing": rf"lacks 1 tensor\(s\), {name} first",
        "truncated": "cannot be loaded",
        "no config": "is not a checkpoint",
    }[bad]
    with pytest.raises(CogumiError, match=problem):
        prune(damaged, pairs, pairs[:2], tmp_path / "out", SCHEDULE, scratch=tmp_path / "scratch")
    assert not (tmp_path / "out").exists()


def test_too_little_calibration_text_is_refused(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="the calibration set is too small"):
        config = PruningConfig(calibration_tokens=500)
        prune(student, pairs[:1], pairs[:2], tmp_path / "out", config, scratch=tmp_path / "scratch")
    assert not (tmp_path / "out").exists()


def test_a_report_shows_its_steps_as_a_table_and_a_plot(whole: tuple[Path, PruningReport, list[str]]) -> None:
    from cogumi_dagster.defs.metadata import metadata_of

    shown = metadata_of(report_json(whole[1]))
    table = shown["pruning"].md_str.splitlines()
    assert table[0].startswith("| step | sparsity | attention |")
    assert len(table) == 2 + 4
    assert "–" in table[-1], "the last step has no recovery here"
    assert shown["loss_by_sparsity"].md_str.startswith("![plot](data:image/svg+xml;base64,")
