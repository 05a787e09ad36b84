"""Sources: what a YAML file may say, users' files with broken lines, draws, and the version."""

import json
from pathlib import Path

import pytest

from cogumi_dagster.lib.curation.sources import draw_source_examples, load_sources, sources_version
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.tasks import families_of, verify

SHIPPED = Path(__file__).parents[3] / "resources" / "sources"


def _write(folder: Path, text: str, rows: list[object] | None = None) -> Path:
    (folder / "math.yaml").write_text(text)
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_sources_name_the_domain_s_families(domain: str) -> None:
    assert set(load_sources(domain, SHIPPED).families) == set(families_of(domain))
    assert len(sources_version(domain, SHIPPED)) == 64


def test_draw_keeps_mix_splits_and_weights(tmp_path: Path) -> None:
    folder = _write(tmp_path, "families:\n  - gcd\n  - name: chain_sum\n    weight: 3\n")
    tasks, report = draw_source_examples("math", folder, 40, 0)
    assert report.drawn == report.wanted == len(tasks) == 40
    assert report.families == {"chain_sum": 30, "gcd": 10}
    assert report.difficulties == {"easy": 12, "medium": 20, "hard": 8}
    assert set(report.splits) <= {"train", "validation"}
    assert draw_source_examples("math", folder, 40, 0)[0] == tasks


def test_files_broken_lines_and_rest(tmp_path: Path) -> None:
    rows: list[object] = [{"instruction": f"Question {n}?", "output": "yes", "license": "MIT"} for n in range(40)]
    rows[1:1] = ["{broken", "[]", {"instruction": ""}, {"instruction": "x", "difficulty": "extreme"}, {"output": "y"}]
    folder = _write(tmp_path, "families: [gcd]\nfiles: [mine.jsonl]\n", rows)
    tasks, report = draw_source_examples("math", folder, 30, 0)
    assert report.broken_lines == {"mine.jsonl": (2, 3, 4, 5, 6)}
    mine = [task for task in tasks if task.family == "file"]
    assert mine and all(task.licence == "MIT" and task.source == "mine.jsonl" for task in mine)
    assert mine[0].solution == "yes" and verify(mine[0], "yes").passed is None
    assert {task.payload["row"] for task in mine} <= {1, *range(7, 46)}
    assert all(task.split != "test" for task in tasks)


def test_files_of_any_kind_datasets_and_weights(tmp_path: Path) -> None:
    dataset = tmp_path / "hub"
    dataset.mkdir()
    rows = [{"query": f"{n} + 2?", "response": "It is so.", "type": "x"} for n in range(60)]
    (dataset / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.csv").write_text("question,answer\n" + "".join(f"{n} - 1?,less\n" for n in range(60)))
    folder = _write(
        tmp_path,
        f"files: [{{path: 'part/*.csv', licence: CC0, weight: 3, limit: 50}}]\n"
        f"datasets: [{{name: '{dataset}', mapping: metamath, licence: MIT, limit: 40}}]\n",
    )
    tasks, report = draw_source_examples("math", folder, 40, 0)
    assert report.sources == {"part/a.csv": 30, str(dataset): 10} and report.licences == {"CC0": 30, "MIT": 10}
    assert report.difficulties == {"medium": 40} and len({task.id for task in tasks}) == 40
    assert max(task.payload["row"] for task in tasks) <= 51


def test_rows_of_another_domain_are_counted_not_taken(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"Q{n}?", "domain": "Math" if n % 2 else "Coding"} for n in range(40)]
    _, report = draw_source_examples("math", _write(tmp_path, "files: [mine.jsonl]", rows), 10, 0)
    assert report.drawn == 10 and report.other_domains == {"code": 20}


def test_licences_that_curation_drops_are_told_before_money_is_spent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[object] = [{"instruction": f"Q{n}", "licence": "CC BY-NC 4.0"} for n in range(5)]
    draw_source_examples("math", _write(tmp_path, "files: [mine.jsonl]", rows), 4, 0)
    assert "5 row(s) are under CC BY-NC 4.0" in caplog.text and "filters.licences" in caplog.text


def test_doubles_are_drawn_once(tmp_path: Path) -> None:
    rows: list[object] = [{"instruction": "Add.", "input": f"1 + {n}", "output": "more"} for n in range(20)]
    tasks, _ = draw_source_examples("math", _write(tmp_path, "files: [mine.jsonl]", rows * 2), 50, 0)
    prompts = [task.prompt for task in tasks]
    assert 10 < len(prompts) == len(set(prompts)) <= 20 and set(prompts) <= {f"Add.\n1 + {n}" for n in range(20)}
    assert tasks[0].licence == "not stated" and tasks[0].difficulty == "medium"


def test_a_short_source_gives_what_it_has(tmp_path: Path) -> None:
    folder = _write(tmp_path, "files: [mine.jsonl]", [{"instruction": f"Q {n}", "output": "a"} for n in range(20)])
    tasks, report = draw_source_examples("math", folder, 50, 0)
    assert 0 < len(tasks) <= 20 and report.drawn == len(tasks) < report.wanted


@pytest.mark.parametrize(
    ("text", "problem", "mend"),
    [
        ("familys: [gcd]", "unknown key 'familys'", "families"),
        ("families: [gdc]", "'gdc'", "gcd"),
        ("families: [{name: gcd, wieght: 2}]", "'wieght'", "weight"),
        ("families: [{name: gcd, weight: 0}]", "weight of gcd", "greater than 0"),
        ("families: [{name: gcd, weight: true}]", "weight of gcd", "greater than 0"),
        ("families: gcd", "not a list", "- "),
        ("files: [none.jsonl]", "none.jsonl", "known"),
        ("files: [{mapping: dolly}]", "has no path", "path"),
        ("files: [{path: mine.jsonl, maping: dolly}]", "unknown key 'maping'", "mapping"),
        ("files: [{path: '*.x', mapping: doly}]", "no mapping 'doly'", "dolly"),
        ("files: [{path: a.jsonl, limit: 1.5}]", "limit is 1.5", "whole number"),
        ("datasets: [{name: a/b, weight: -1}]", "weight is -1", "greater than 0"),
        ("datasets: [{name: a/b, revision: 3}]", "revision is 3", "quotation marks"),
        ("datasets: [3]", "3 has no name", "name"),
        ("files: []", "names no source", "family"),
        ("[1]", "no mapping", "families"),
        ("a: [", "not YAML", "line"),
    ],
)
def test_mistakes_are_named_with_their_mend(tmp_path: Path, text: str, problem: str, mend: str) -> None:
    with pytest.raises(CogumiError) as caught:
        load_sources("math", _write(tmp_path, text))
    assert problem in caught.value.problem and "math.yaml" in caught.value.problem
    assert mend in caught.value.mend


def test_missing_domain_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CogumiError) as caught:
        load_sources("maths", _write(tmp_path, "families: [gcd]"))
    assert "math" in caught.value.mend


def test_version_follows_yaml_files_and_family_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path, "families: [scheduling]\nfiles: [mine.jsonl]\n", [{"instruction": "a"}])
    versions = [sources_version("math", folder), sources_version("math", folder)]
    (folder / "mine.jsonl").write_text('{"instruction": "b"}\n')
    versions.append(sources_version("math", folder))
    (folder / "math.yaml").write_text("families: [scheduling, gcd]\nfiles: [mine.jsonl]\n")
    versions.append(sources_version("math", folder))
    monkeypatch.setattr("cogumi_dagster.lib.tasks.scheduling.Scheduling.version", "another")
    versions.append(sources_version("math", folder))
    (folder / "math.yaml").write_text("files: ['*.jsonl']\ndatasets: [{name: a/b, revision: v1}]\n")
    versions.append(sources_version("math", folder))  # no network for a dataset
    (folder / "more.jsonl").write_text('{"instruction": "c"}\n')
    versions.append(sources_version("math", folder))
    assert versions[0] == versions[1] and len(set(versions)) == 6
