"""Mappings of the known datasets, and records with their provenance."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.curation.mappings import KNOWN_DATASETS, MAPPINGS, mapping_for
from cogumi_dagster.lib.curation.records import SourceRecord, Tally, read_records
from cogumi_dagster.lib.errors import CogumiError

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is a kettle?\n\nAssistant: A pot that boils water."
CASES: list[tuple[dict[str, Any], str, str, str | None, str | None, str | None]] = [
    # row, mapping, instruction, response, domain, difficulty
    (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is"},
        "alpaca",
        "Add.\n1 and 2",
        "3",
        None,
        None,
    ),
    ({"instruction": "Add.", "input": "", "output": "3"}, "code-alpaca", "Add.", "3", "code", None),
    (
        {"chosen": HH, "rejected": "\n\nHuman: x\n\nAssistant: y"},
        "anthropic-hh",
        "What is a kettle?",
        "A pot that boils water.",
        "conversation",
        None,
    ),
    (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"},
        "dolly",
        "Who?\n\nAda wrote it.",
        "Ada",
        "reasoning",
        None,
    ),
    (
        {"instruction": "Write.", "context": "", "response": "Once", "category": "creative_writing"},
        "dolly",
        "Write.",
        "Once",
        "creative",
        None,
    ),
    (
        {"query": "2+2?", "response": "4", "type": "GSM_Rephrased", "original_question": "x"},
        "metamath",
        "2+2?",
        "4",
        "math",
        None,
    ),
    (
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."},
        "openorca",
        "Be brief.\n\nWhy?",
        "So.",
        None,
        None,
    ),
    (
        {"id": "cot.2", "system_prompt": "", "question": "Why?", "response": "So."},
        "openorca",
        "Why?",
        "So.",
        None,
        None,
    ),
    (
        {"question": "Eggs?", "answer": "16-3 = <<16-3=13>>13.\n#### 13"},
        "question-answer",
        "Eggs?",
        "16-3 = 13.\n#### 13",
        "math",
        "easy",
    ),
    (
        {"question": "Reverse it.", "difficulty": "hard", "domain": "Coding", "model_used": "m"},
        "question-answer",
        "Reverse it.",
        None,
        "code",
        "hard",
    ),
    (
        {
            "prompt": "Why?",
            "response": "<response>So.</response>",
            "metadata": {"domain": "Math", "difficulty": "easy"},
        },
        "prompt-response",
        "Why?",
        "So.",
        "math",
        "easy",
    ),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "mapping", "instruction", "response", "domain", "difficulty"), CASES)
def test_each_mapping_reads_its_rows(
    tmp_path: Path,
    row: dict[str, Any],
    mapping: str,
    instruction: str,
    response: str | None,
    domain: str | None,
    difficulty: str | None,
) -> None:
    (record,) = read_records("rows.jsonl", mapping, folder=write(tmp_path / "rows.jsonl", [row]).parent)
    assert record == SourceRecord(instruction, response, domain, difficulty, "rows.jsonl", "not stated", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "mapping"), [(case[0], case[1]) for case in CASES if case[1] != "code-alpaca"])
def test_each_mapping_is_found_by_the_fields(row: dict[str, Any], mapping: str) -> None:
    assert mapping_for(row) is MAPPINGS[mapping]


def test_the_known_datasets_have_a_mapping_and_a_licence() -> None:
    assert {known.mapping for known in KNOWN_DATASETS.values()} <= set(MAPPINGS)
    assert len(KNOWN_DATASETS) == 7 and all(known.licence for known in KNOWN_DATASETS.values())


def test_rows_that_say_nothing_are_broken_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"instruction": "a", "output": "b", "text": "x", "id": 4},
        {"instruction": ""},
        {"output": "y"},
        {"instruction": 7},
        {"instruction": "a", "difficulty": "extreme"},
        [],
        {"instruction": "c", "license": "MIT", "domain": "Coding", "difficulty": "Hard"},
    ]
    tally = Tally()
    found = list(read_records(write(tmp_path / "rows.jsonl", rows), tally=tally, licence="CC0", domain="math"))
    assert [(one.instruction, one.row, one.licence, one.domain, one.difficulty) for one in found] == [
        ("a", 1, "CC0", "math", None),
        ("c", 7, "MIT", "code", "hard"),
    ]
    assert tally.broken == {"rows.jsonl": [2, 3, 4, 5, 6]} and tally.records == 2


@pytest.mark.parametrize("chosen", ["Hello there", "\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", 5])
def test_dialogues_that_do_not_end_with_an_answer_are_broken(tmp_path: Path, chosen: Any) -> None:
    tally = Tally()
    assert list(read_records(write(tmp_path / "hh.jsonl", [{"chosen": chosen}]), tally=tally)) == []
    assert tally.broken == {"hh.jsonl": [1]}


def test_rows_of_no_known_kind_are_told_the_mappings(tmp_path: Path) -> None:
    for number in (1, 30):
        path = write(tmp_path / "rows.jsonl", [{"task": "a", "result": "b"}] * number)
        with pytest.raises(CogumiError, match=r"rows\.jsonl: rows with the fields task, result") as caught:
            list(read_records(path))
        assert all(name in caught.value.mend for name in MAPPINGS)
    with pytest.raises(CogumiError, match="'doly'") as caught:
        list(read_records(path, "doly"))
    assert "dolly" in caught.value.mend


def test_records_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"instruction": "a"}] * 3)
    records = read_records(path)
    assert next(records).row == 1
    path.write_text("")  # what was not read yet may change: nothing was loaded whole
    assert sum(1 for _ in records) <= 2


def test_gsm8k_s_difficulty_follows_its_steps(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "<<1+1=2>>2 " * steps + "\n#### 2"} for steps in (1, 3, 5)]
    found = read_records(write(tmp_path / "g.jsonl", rows))
    assert [one.difficulty for one in found] == ["easy", "medium", "hard"]
