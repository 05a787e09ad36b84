"""Datasets through ``datasets``, streamed from a local folder of the hub's form; and a hub that is not there."""

import json
from pathlib import Path

import pytest

from cogumi_dagster.lib.curation.hub import HubDataset, read_dataset
from cogumi_dagster.lib.curation.records import Tally
from cogumi_dagster.lib.errors import CogumiError


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    folder = tmp_path / "dolly"
    folder.mkdir()
    rows = [
        {"instruction": f"Who wrote {n}?", "context": "", "response": "Ada", "category": "open_qa"} for n in range(9)
    ]
    rows[1]["instruction"] = ""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return folder


def test_rows_are_mapped_limited_and_keep_their_provenance(dolly: Path) -> None:
    tally = Tally()
    named = HubDataset(str(dolly), limit=4, revision="v1", licence="CC-BY-SA-3.0")
    found = list(read_dataset(named, "science", tally))
    assert [one.row for one in found] == [1, 3, 4] and tally.broken == {str(dolly): [2]}
    assert found[0].instruction == "Who wrote 0?" and found[0].domain == "conversation"
    assert (found[0].source, found[0].revision, found[0].licence) == (str(dolly), "v1", "CC-BY-SA-3.0")
    assert len(list(read_dataset(HubDataset(str(dolly), split="test")))) == 1


def test_a_split_that_is_not_there_and_a_hub_out_of_reach_are_explained(dolly: Path) -> None:
    with pytest.raises(CogumiError, match="dolly") as caught:
        list(read_dataset(HubDataset(str(dolly), split="trian")))
    assert "split" in caught.value.mend and not caught.value.retryable
    with pytest.raises(CogumiError, match=r"dataset 'tatsu-lab/alpaca': .*reach") as caught:
        list(read_dataset(HubDataset("tatsu-lab/alpaca")))
    assert caught.value.retryable and "network" in caught.value.mend
