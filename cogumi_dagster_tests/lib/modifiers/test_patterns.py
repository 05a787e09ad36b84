from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.modifiers.patterns import find_patterns

TOPICS = {"sorting": "sort the numbers ascending", "parsing": "parse this date string", "poems": "rhyme about rivers"}


def failures(each: int) -> list[dict[str, Any]]:
    return [
        {"task": {"id": f"{family}-{n}", "family": family, "prompt": f"{text}, please, {n}"}, "reason": "it is wrong"}
        for n in range(each)
        for family, text in TOPICS.items()
    ]


def embed(texts: list[str]) -> Any:
    """One direction for each topic, with a little noise."""
    noise = np.random.default_rng(0).normal(0, 0.05, (len(texts), 3))
    return noise + [[float(word in text) for word in ("sort", "parse", "rhyme")] for text in texts]


def test_the_clusters_are_the_topics_and_are_named_by_their_words(tmp_path: Path) -> None:
    rows = failures(8)
    report = find_patterns(rows, embed, tmp_path, clusters=(2, 5), seed=0)
    assert report.failures == 24 and report.clusters == 3
    assert set(report.silhouettes) == {"2", "3", "4", "5"}
    assert report.silhouette == max(report.silhouettes.values()) > 0.8
    assert (report.smallest, report.largest) == (8, 8)
    assert sorted(pattern.name.split(":")[0] for pattern in report.patterns) == sorted(TOPICS)
    for pattern in report.patterns:
        family = pattern.name.split(":")[0]
        assert set(pattern.name.split(": ")[1].split()) <= set(TOPICS[family].split()) | {"ascending"}
        assert len(set(pattern.centre_examples)) == 3
        assert all(one.startswith(TOPICS[family]) and one.endswith("[it is wrong]") for one in pattern.centre_examples)
    assigned = {row["task_id"]: row["cluster"] for row in read_jsonl(tmp_path / "assignments.jsonl")}
    assert set(assigned) == {row["task"]["id"] for row in rows}
    assert len({(name.split("-")[0], cluster) for name, cluster in assigned.items()}) == 3
    assert len(report.points) == 24


@pytest.mark.parametrize("count", [1, 4])
def test_fewer_failures_than_clusters_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(CogumiError, match=f"{count} failures cannot make 4 clusters"):
        find_patterns(failures(2)[:count], embed, tmp_path, clusters=(4, 5), seed=0)


def test_no_more_clusters_are_tried_than_failures_allow(tmp_path: Path) -> None:
    report = find_patterns(failures(2)[:5], embed, tmp_path, clusters=(2, 50), seed=0)
    assert set(report.silhouettes) == {"2", "3", "4"}


def test_a_long_prompt_shows_its_end(tmp_path: Path) -> None:
    rows = failures(3)
    for row in rows:
        row["task"]["prompt"] = f"{row['task']['prompt']} {'and so on ' * 90} what is it?"
    report = find_patterns(rows, embed, tmp_path, clusters=(3, 3), seed=0)
    shown = [example for pattern in report.patterns for example in pattern.centre_examples]
    assert len(shown) == 9 and all(one.endswith("what is it? [it is wrong]") and len(one) < 300 for one in shown)
