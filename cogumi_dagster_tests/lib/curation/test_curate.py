"""From a user's files to a dataset: every row is accounted for, and no teacher is asked."""

import json
import random
from pathlib import Path

import pytest

from cogumi_dagster.lib.curation.curate import curate_files
from cogumi_dagster.lib.curation.dataset import ALL_SPLITS
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DatasetConfig, FilterConfig

CONFIG = DatasetConfig(filters=FilterConfig(min_tokens=5, max_tokens=400), quality_threshold=5.0)
NOUNS = "apple river engine teacher window garden planet bridge pencil castle winter signal basket harbour".split()  # noqa: SIM905


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def answered(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    verbs = ["counted", "moved", "painted", "measured", "hidden", "carried", "counted again", "weighed"]
    rows = []
    for number in range(count):
        things = draw.sample(NOUNS, 10)
        how = [draw.choice(verbs) for _ in things]
        steps = [
            f"The {thing} was {done} in hour {draw.randint(1, 24)}." for thing, done in zip(things, how, strict=True)
        ]
        asked = f"Explain how the {things[0]} and the {things[1]} of house {number} were {how[0]}."
        rows.append({"instruction": asked, "output": " ".join(steps)})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_is_accounted_for_and_all_three_splits_are_written(tmp_path: Path) -> None:
    rows = answered(150)
    extra = [rows[0] | {"output": rows[0]["output"] + " Yes."}, {"instruction": "Who?", "output": ""}]
    mail = {
        "instruction": rows[1]["instruction"] + " Please.",
        "output": f"Write to jo.doe@mailbox.org. {rows[2]['output']}",
    }
    source = write(tmp_path / "mine.jsonl", [*rows, *extra, mail])
    with source.open("a") as out:
        out.write("{broken\n")
    report = curate_files([str(source)], tmp_path / "out", CONFIG, count_words, domain="science")
    made = report.dataset
    assert sum(report.read.values()) == 153 and report.broken == {str(source.name): (154,)}
    assert report.without_response == 1
    assert report.quality.rows == 152
    assert any(reason.startswith("pii") for reason in report.filters.dropped)
    assert report.filters.rows - report.filters.kept == sum(report.filters.dropped.values())
    assert made.rows == report.filters.kept - made.dedup.removed - made.contamination.removed
    assert made.dedup.removed >= 1
    assert made.checks.clean and set(made.splits) == set(ALL_SPLITS) and made.splits["test"] > 0
    written = [json.loads(line) for split in ALL_SPLITS for line in (tmp_path / "out" / f"{split}.jsonl").open()]
    assert len(written) == made.rows
    assert {row["metadata"]["domain"] for row in written} == {"science"}
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("mix.svg", "tokens.svg", "quality.svg", "rows.svg"):
        assert f"plots/{name}" in card and (tmp_path / "out" / "plots" / name).read_text().startswith("<svg")


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.jsonl", answered(60))
    for name in ("one", "two"):
        curate_files([str(source)], tmp_path / name, CONFIG, count_words, domain="science")
    assert (tmp_path / "one" / "SHA256SUMS").read_bytes() == (tmp_path / "two" / "SHA256SUMS").read_bytes()


def test_questions_without_answers_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "asked.jsonl", [{"instruction": "Why?", "output": ""}])
    with pytest.raises(CogumiError, match="none of 1 rows has a response"):
        curate_files([str(source)], tmp_path / "out", CONFIG, count_words)


def test_an_interrupted_run_leaves_the_older_dataset_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "mine.jsonl", answered(60)), tmp_path / "out"
    curate_files([str(source)], out, CONFIG, count_words, domain="science")
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write(source, answered(60, seed=1))

    def stopped(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogumi_dagster.lib.curation.dataset.dataset_card", stopped)
    with pytest.raises(KeyboardInterrupt):
        curate_files([str(source)], out, CONFIG, count_words, domain="science")
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out"]
    monkeypatch.undo()
    curate_files([str(source)], out, CONFIG, count_words, domain="science")
    assert (out / "SHA256SUMS").read_bytes() != before[Path("SHA256SUMS")]
