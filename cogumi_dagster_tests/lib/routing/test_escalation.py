"""The dissatisfaction detector and its hand-written messages."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.routing import escalation as e
from cogumi_dagster.lib.routing.features import hash_text

DATA = Path(__file__).parents[3] / "resources" / "sources" / "escalation.jsonl"


def embed(texts: Any) -> np.ndarray:
    """A stand-in for sentence embeddings: hashed n-grams, 64 wide."""
    return np.array([hash_text(text, 64, (3, 4)) for text in texts])


@pytest.fixture(scope="module")
def messages() -> list[dict[str, Any]]:
    return read_jsonl(DATA)


@pytest.fixture(scope="module")
def fitted(messages: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, e.EscalationReport]:
    out = tmp_path_factory.mktemp("escalation") / "escalation.npz"
    return out, e.fit_escalation(some_groups(messages), embed, out, seed=0)


def some_groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every second group: enough to learn from, and seconds faster."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    kept = set(groups[::2])
    return [row for row in rows if row["group"] in kept]


def test_the_messages_are_many_varied_and_labelled_once(messages: list[dict[str, Any]]) -> None:
    counts = Counter(row["label"] for row in messages)
    assert len(messages) >= 300 and set(counts) == set(e.LABELS) and min(counts.values()) >= 100
    assert len({row["text"].casefold() for row in messages}) == len(messages)
    labels: dict[str, set[str]] = {}
    for row in messages:
        labels.setdefault(row["group"], set()).add(row["label"])
    assert all(len(found) == 1 for found in labels.values()) and len(labels) >= 100
    known = {row["text"]: row["label"] for row in messages}
    assert known["no problem, thanks"] == "satisfied"
    assert known["wrong number format in my CSV, how do I fix it?"] == "neutral"


def test_it_tells_complaints_from_thanks_and_questions(fitted: tuple[Path, e.EscalationReport]) -> None:
    detector = e.EscalationDetector.load(fitted[0])
    for text in ("that's wrong", "wrong answer, try again", "no, that's not what I asked", "THAT IS WRONG!!"):
        assert detector.score(text) > 0.5, text
    for text in ("perfect, thanks", "write a function that sorts a list", "thanks, it works now"):
        assert detector.score(text) < 0.5, text


def test_the_report_beats_the_majority_on_groups_that_were_held_out(fitted: tuple[Path, e.EscalationReport]) -> None:
    out, report = fitted
    assert report.accuracy.interval[0] > report.majority.value
    assert report.recall_dissatisfied.value > 0.65
    assert report.accuracy.count == report.held_out and report.train > report.held_out
    assert report.agreement.value > 0.7
    assert report.bytes == out.stat().st_size < 3_000_000
    json.dumps(report_json(report), allow_nan=False)


def test_a_held_out_group_is_never_trained_on(
    messages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, trained, fit_student = some_groups(messages)[::4], [], e._fit_student

    def spy(texts: Any, targets: Any) -> e.EscalationDetector:
        trained.extend(texts)
        return fit_student(texts, targets)

    monkeypatch.setattr(e, "_fit_student", spy)
    report = e.fit_escalation(rows, embed, tmp_path / "x.npz", seed=0)
    groups = {text: row["group"] for row in rows for text in [row["text"]]}
    in_training = {groups[text] for text in trained if text in groups}
    held_out = set(groups.values()) - in_training
    assert len(held_out) == report.held_out_groups > 10
    assert sum(row["group"] in held_out for row in rows) == report.held_out


def test_random_labels_score_like_chance(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    label = {group: str(draw.choice(e.LABELS)) for group in sorted({row["group"] for row in messages})}
    rows = [{**row, "label": label[row["group"]]} for row in some_groups(messages)[::3]]
    report = e.fit_escalation(rows, embed, tmp_path / "x.npz", seed=0)
    assert report.auroc.low < 0.5 < report.auroc.high


def test_any_text_has_a_score(fitted: tuple[Path, e.EscalationReport]) -> None:
    detector = e.EscalationDetector.load(fitted[0])
    for text in ("", " ", "\ud800", "🤬", "x" * 100_000, "nein, das ist falsch"):
        assert 0.0 <= detector.score(text) <= 1.0


def test_noise_changes_the_text_but_not_much() -> None:
    draw = np.random.default_rng(0)
    noisy = {e.add_noise("That's not right.", draw) for _ in range(200)}
    assert len(noisy) > 20
    assert all(abs(len(text) - 17) <= 8 for text in noisy)
    assert all(e.add_noise(text, draw) for text in ("a", "no", "?") for _ in range(50))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x", "label": "angry", "group": "g"},
        {"text": " ", "label": "neutral", "group": "g"},
        {"text": "x", "label": "neutral"},
    ],
)
def test_a_bad_message_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="message 1 is not one"):
        e.fit_escalation([row], embed, tmp_path / "x.npz", seed=0)


def test_too_little_data_bad_embeddings_and_too_many_bytes_are_refused(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(CogumiError, match="groups of other messages"):
        only = [row for row in messages if row["label"] == "dissatisfied"]
        e.fit_escalation(only, embed, tmp_path / "x.npz", seed=0)
    with pytest.raises(CogumiError, match="embeddings of shape"):
        e.fit_escalation(messages, lambda texts: np.zeros((1, 4)), tmp_path / "x.npz", seed=0)
    with pytest.raises(CogumiError, match="the limit is 1,000"):
        e.fit_escalation(some_groups(messages)[::4], embed, tmp_path / "x.npz", seed=0, max_bytes=1000)
    assert not (tmp_path / "x.npz").exists()


def test_what_is_not_a_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="there is no escalation detector"):
        e.EscalationDetector.load(tmp_path / "none.npz")
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(CogumiError, match="is not an escalation detector"):
        e.EscalationDetector.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", weights=np.zeros(8), bias=np.array(0.0), sizes=np.array([3]))
    with pytest.raises(CogumiError, match="other features"):
        e.EscalationDetector.load(tmp_path / "y.npz")
