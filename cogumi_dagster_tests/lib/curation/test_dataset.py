"""The dataset from rows to files and back, and its checks against files that were tampered with."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.curation import dataset_checks
from cogumi_dagster.lib.curation.dataset import DatasetReport, build_dataset, load_examples
from cogumi_dagster.lib.curation.dataset_checks import near_duplicate_pairs, record_problem, verify_dataset
from cogumi_dagster.lib.curation.mix import CLOSE, choose_counts
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DatasetConfig, DedupConfig
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, DIFFICULTY_MIX, split_of

CONFIG = DatasetConfig()
TARGETS = {str(name): share for name, share in CONFIG.mix.items()}
LEVELS = {str(name): share for name, share in DIFFICULTY_MIX.items()}
LEAK = (
    "How many of the nine hundred lanterns that the village hung in spring were still alight by the end of the night?"
)


def prose(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 9))) for _ in range(count))


def row(draw: random.Random, difficulty: str, prompt: str = "", **more: Any) -> dict[str, Any]:
    prompt = prompt or prose(draw, 12)
    task = {"id": hashlib.sha256(prompt.encode()).hexdigest()[:16], "prompt": prompt, "difficulty": difficulty}
    return {
        "task": {**task, "source": "generated", "licence": "MIT", "family": "toy", "domain": "elsewhere"},
        "teacher": more.get("teacher", "solver"),
        "response": more.get("response", prose(draw, 20)),
        "quality": {"total": more.get("total", draw.choice([7.0, 8, 9.5])), "judge": "rules"},
        "tokens": 40,
    }


def trainable(draw: random.Random, words: int = 12) -> str:
    return next(text for text in iter(lambda: prose(draw, words), "") if split_of(text) != "test")


def corpus(seed: int, size: int = 300) -> dict[str, list[dict[str, Any]]]:
    """Rows in the very mix asked for, but for what is of split test."""
    draw = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {domain: [] for domain in TARGETS}
    for domain, share in TARGETS.items():
        for difficulty, part in LEVELS.items():
            rows[domain] += [row(draw, difficulty, trainable(draw)) for _ in range(round(size * share * part))]
    return rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetReport]:
    """A dataset from rows with one of everything that must go."""
    draw = random.Random(7)
    rows = corpus(1)
    twin = rows["code"][0]
    rows["math"].append({**twin, "response": twin["response"] + " x", "quality": {"total": 6.0}})
    rows["science"].append(row(draw, "easy", LEAK))
    rows["science"].append(
        row(draw, "easy", next(t for t in iter(lambda: prose(draw, 9), "") if split_of(t) == "test"))
    )
    held = trainable(draw)
    rows["creative"].append(row(draw, "hard", held))
    out = tmp_path_factory.mktemp("dataset") / "out"
    assert split_of(LEAK) != "test"
    return out, build_dataset(rows, out, CONFIG, {"lamps": [LEAK]}, 0, held_out_prompts=[f" {held.upper()} "])


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the built dataset


def test_what_must_go_is_gone_and_every_row_is_accounted_for(built: tuple[Path, DatasetReport]) -> None:
    _, report = built
    assert (report.test_rows, report.held_out_rows) == (1, 1)
    assert report.dedup.removed_by_domain == {"math": 1}
    assert report.contamination.by_benchmark == {"lamps": 1}
    gone = report.test_rows + report.held_out_rows + report.dedup.removed + report.contamination.removed
    assert report.rows_in == gone + report.left_for_mix + report.rows
    assert report.dedup.recall_at_threshold > 0.999


def test_the_files_hold_the_specifications_record_in_both_formats(built: tuple[Path, DatasetReport]) -> None:
    out, report = built
    for split, count in report.splits.items():
        records = read(out / f"{split}.jsonl")
        assert len(records) == count > 0
        assert records == pq.read_table(out / f"{split}.parquet").to_pylist()
        for record in records:
            assert set(record) == {"instruction", "response", "metadata"}
            assert set(record["metadata"]) == {"domain", "difficulty", "teacher", "quality_score", "tokens", "source"}
            assert split_of(record["instruction"]) == split
            assert record["metadata"]["domain"] in TARGETS
    assert sum(report.splits.values()) == report.rows


def test_the_checks_come_from_the_files_and_are_clean(built: tuple[Path, DatasetReport]) -> None:
    _, report = built
    assert report.checks.clean and report.checks.records == report.rows and report.checks.schema_valid == 1.0


def test_provenance_names_task_family_and_licence_of_each_record(built: tuple[Path, DatasetReport]) -> None:
    out, report = built
    entries = {entry["id"]: entry for entry in read(out / "provenance.jsonl")}
    assert len(entries) == report.rows
    for record in read(out / "train.jsonl"):
        text = f"{record['instruction']}\n{record['response']}"
        entry = entries[hashlib.sha256(text.encode()).hexdigest()[:16]]
        assert entry["licence"] == "MIT" and entry["family"] == "toy" and entry["split"] == "train"
        assert entry["task_id"] == hashlib.sha256(record["instruction"].encode()).hexdigest()[:16]


def test_checksums_are_those_of_the_files(built: tuple[Path, DatasetReport]) -> None:
    out, report = built
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    assert sums == report.sha256
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*sums, "SHA256SUMS"}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())


def test_the_card_shows_mix_and_checks(built: tuple[Path, DatasetReport]) -> None:
    out, report = built
    card = (out / "README.md").read_text()
    code = next(item for item in report.mix if item.name == "code")
    assert f"| code | 30% | {code.actual:.1%} |" in card
    assert "| contaminated, lamps | 1 |" in card
    assert f"| **kept** | {report.rows} |" in card


def test_the_same_rows_in_any_order_give_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    rows = corpus(2, 60)
    first = build_dataset(rows, tmp_path / "a", CONFIG, {}, 0)
    for group in rows.values():
        group.reverse()
    again = build_dataset(dict(reversed(rows.items())), tmp_path / "b", CONFIG, {}, 0)
    other = build_dataset(rows, tmp_path / "c", CONFIG, {}, 1)
    assert first.sha256 == again.sha256
    assert first.sha256["train.jsonl"] != other.sha256["train.jsonl"]


def test_examples_are_read_back(built: tuple[Path, DatasetReport], tmp_path: Path) -> None:
    out, report = built
    examples = load_examples(out / "train.jsonl")
    assert len(examples) == report.splits["train"]
    record = read(out / "train.jsonl")[0]
    assert (examples[0].instruction, examples[0].domain) == (record["instruction"], record["metadata"]["domain"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(record) + "\n" + json.dumps({**record, "response": " "}) + "\n")
    with pytest.raises(CogumiError, match="record 2: response is empty"):
        load_examples(broken)


# --- checks that must find what is wrong


def tamper(built: tuple[Path, DatasetReport], tmp_path: Path, split: str, change: Any) -> Any:
    """A copy of the dataset with the records of a split changed in both formats."""
    import pyarrow as pa

    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    records = change(read(copy / f"{split}.jsonl"))
    schema = pq.read_schema(copy / f"{split}.parquet")
    (copy / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records, schema=schema), copy / f"{split}.parquet")
    return verify_dataset(copy, CONFIG.dedup, {"lamps": [LEAK]}, (), ["a held out prompt of the evaluation"])


def test_a_near_duplicate_is_found_by_the_second_look(built: tuple[Path, DatasetReport], tmp_path: Path) -> None:
    def change(records: list[Any]) -> list[Any]:
        return [*records, {**records[0], "response": records[0]["response"] + " z"}]

    found = tamper(built, tmp_path, "train", change)
    assert found.near_duplicates_left == 1 and not found.clean


def test_a_leak_a_held_out_prompt_and_a_wrong_split_are_found(
    built: tuple[Path, DatasetReport], tmp_path: Path
) -> None:
    train = read(built[0] / "train.jsonl")

    def change(records: list[Any]) -> list[Any]:
        held = {**records[0], "instruction": "A held out  prompt of the evaluation", "response": "one"}
        leak = {**records[0], "instruction": LEAK, "response": "two"}
        stray = {**train[0], "response": "something else entirely, so that it is no duplicate of the other"}
        return [*records, held, leak, stray]

    found = tamper(built, tmp_path, "validation", change)
    assert found.contaminated == 1
    assert found.held_out >= 1
    assert found.split_overlap == 1 + (split_of(LEAK) != "validation") + (
        split_of("a held out prompt of the evaluation") != "validation"
    )


def test_a_record_off_the_schema_or_unlike_its_parquet_twin_is_found(
    built: tuple[Path, DatasetReport], tmp_path: Path
) -> None:
    count = built[1].rows

    def change(records: list[Any]) -> list[Any]:
        return [{**records[0], "metadata": {**records[0]["metadata"], "difficulty": "tricky"}}, *records[1:]]

    assert tamper(built, tmp_path, "train", change).schema_valid == pytest.approx(1 - 1 / count)
    copy = tmp_path / "copy"
    records = read(built[0] / "train.jsonl")
    records[3]["response"] += "!"
    (copy / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert verify_dataset(copy, CONFIG.dedup, {}, ()).schema_valid == pytest.approx(1 - 2 / count)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("tokens", True, "tokens is True"),
        ("tokens", 0, "tokens is 0"),
        ("quality_score", 11.0, "not within 0 to 10"),
        ("quality_score", 9, "not float"),
        ("domain", "cooking", "domain is 'cooking'"),
        ("teacher", None, "teacher is None"),
    ],
)
def test_the_schema_is_strict(built: tuple[Path, DatasetReport], name: str, value: object, problem: str) -> None:
    record = read(built[0] / "train.jsonl")[0]
    assert record_problem(record) is None
    assert problem in str(record_problem({**record, "metadata": {**record["metadata"], name: value}}))
    assert record_problem({**record, "extra": 1}) and record_problem([]) and record_problem({**record, "metadata": {}})


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=3, max_size=9).map("".join), max_size=12))
def test_the_second_look_counts_the_pairs_that_a_naive_count_finds(texts: list[str]) -> None:
    def shingles(text: str) -> set[str]:
        return {text[n : n + 3] for n in range(len(text) - 2)}

    sets = [shingles(text) for text in texts]
    pairs = [(a, b) for n, a in enumerate(sets) for b in sets[:n]]
    # At 0.95 a pair is missed with probability 1e-12.
    assert near_duplicate_pairs(texts, DedupConfig(threshold=0.95)) == sum(
        len(a & b) / len(a | b) >= 0.95 for a, b in pairs
    )


# --- the mix


def shares(cells: dict[tuple[str, str], int], axis: int) -> dict[str, float]:
    total = sum(cells.values())
    return {
        name: sum(count for cell, count in cells.items() if cell[axis] == name) / total
        for name in (TARGETS if axis == 0 else LEVELS)
    }


def test_a_good_mix_loses_nothing() -> None:
    cells = {(d, f): round(1000 * s * p) for d, s in TARGETS.items() for f, p in LEVELS.items()}
    assert choose_counts(cells, TARGETS, LEVELS) == cells


def test_a_skewed_mix_is_mended_at_a_small_price() -> None:
    cells = {(d, f): round(1000 * s * p) for d, s in TARGETS.items() for f, p in LEVELS.items()}
    cells["creative", "easy"] += 200
    chosen = choose_counts(cells, TARGETS, LEVELS)
    assert 1000 <= sum(chosen.values()) <= 1060
    assert chosen["creative", "easy"] < 80
    assert sum(abs(shares(chosen, 0)[d] - s) for d, s in TARGETS.items()) / 2 <= CLOSE


def test_most_of_the_data_is_never_thrown_away_and_a_missing_domain_costs_nothing() -> None:
    lopsided = {("code", "easy"): 1000, ("math", "hard"): 10}
    assert sum(choose_counts(lopsided, TARGETS, LEVELS).values()) >= 505
    three = {"code": 0.30, "reasoning": 0.25, "math": 0.15}
    cells = {(d, f): round(1000 * s * p) for d, s in three.items() for f, p in LEVELS.items()}
    assert sum(choose_counts(cells, TARGETS, LEVELS).values()) >= 0.93 * sum(cells.values())


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(sorted(TARGETS)), st.sampled_from(DIFFICULTIES)), st.integers(0, 60), max_size=18
    )
)
def test_chosen_counts_are_available_and_no_further_from_the_targets(available: dict[tuple[str, str], int]) -> None:
    chosen = choose_counts(available, TARGETS, LEVELS)
    total = sum(available.values())
    assert all(0 <= count <= available[cell] for cell, count in chosen.items())
    assert sum(chosen.values()) >= total / 2
    if total:

        def apart(cells: dict[tuple[str, str], int]) -> float:
            return sum(
                abs(shares(cells, axis)[name] - share) / 2
                for axis, want in enumerate((TARGETS, LEVELS))
                for name, share in want.items()
            )

        assert apart(chosen) <= max(CLOSE, apart(available)) + 1e-9


def test_the_best_rows_of_a_cell_stay(tmp_path: Path) -> None:
    rows = corpus(3, 60)
    draw = random.Random(1)
    rows["creative"] += [row(draw, "easy", trainable(draw), total=7.25) for _ in range(40)]
    build_dataset(rows, tmp_path, CONFIG, {}, 0)
    scores = [
        example.quality_score
        for name in ("train", "validation")
        for example in load_examples(tmp_path / f"{name}.jsonl")
        if (example.domain, example.difficulty) == ("creative", "easy")
    ]
    better = sum(item["quality"]["total"] > 7.25 for item in rows["creative"] if item["task"]["difficulty"] == "easy")
    assert 0 < len(scores) < 40 and sum(score > 7.25 for score in scores) == better


# --- what is refused


def test_bad_input_is_named(tmp_path: Path) -> None:
    draw = random.Random(0)
    good = row(draw, "easy", trainable(draw))
    with pytest.raises(CogumiError, match=r"unknown domain 'maths'\n.*'math'"):
        build_dataset({"maths": [good]}, tmp_path, CONFIG, {}, 0)
    with pytest.raises(CogumiError, match="a row of math is no curated row: KeyError\\('tokens'\\)"):
        build_dataset({"math": [{k: v for k, v in good.items() if k != "tokens"}]}, tmp_path, CONFIG, {}, 0)
    with pytest.raises(CogumiError, match="difficulty is 'tricky'"):
        build_dataset({"math": [row(draw, "tricky", trainable(draw))]}, tmp_path, CONFIG, {}, 0)
    with pytest.raises(CogumiError, match="no row left"):
        build_dataset({"math": []}, tmp_path, CONFIG, {}, 0)
    with pytest.raises(CogumiError, match="decontamination left no row"):
        build_dataset({"math": [good]}, tmp_path, CONFIG, {"bench": [good["task"]["prompt"]]}, 0)
    with pytest.raises(CogumiError, match=r"mix adds up to 0\.5"):
        build_dataset({"math": [good]}, tmp_path, DatasetConfig(mix={"math": 0.5}), {}, 0)
    assert not list(tmp_path.iterdir())


def test_of_many_records_a_sample_that_keeps_pairs_together_is_rechecked(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    lines = [" ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(40)) for _ in range(120)]
    texts = [text for line in lines for text in (line, line + " x")]
    monkeypatch.setattr(dataset_checks, "RECHECKED", 24)
    sample = dataset_checks._sample(texts, CONFIG.dedup)
    assert len(sample) == 24
    assert near_duplicate_pairs(sample, CONFIG.dedup) >= 9
