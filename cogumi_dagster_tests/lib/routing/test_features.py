"""The router's input: fixed, finite, and different where it should be."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.routing import features as f

MakeRows = Callable[..., list[dict[str, Any]]]


def test_the_numbers_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from cogumi_dagster.lib.routing.features import route_features as r;"
        "print(r('Sort the list, größer zuerst', [-0.1, -2.0], 2).round(9).tolist())"
    )
    shown = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert shown[0] == shown[1]
    here = f.route_features("Sort the list, größer zuerst", [-0.1, -2.0], 2)
    assert shown[0].strip() == str(here.round(9).tolist())


def test_serving_needs_no_torch_and_no_scikit_learn() -> None:
    code = (
        "import sys; from cogumi_dagster.lib.routing.features import route_features;"
        "import cogumi_dagster.lib.routing.router, cogumi_dagster.lib.routing.escalation;"
        "route_features('x', [-1.0], 1); print({'torch', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


def test_the_hash_is_pinned() -> None:
    """A change here orphans every saved router: raise FEATURES with it."""
    hashed = f.hash_text("What is 2 + 2?", f.HASH_DIMENSIONS)
    assert np.flatnonzero(hashed)[:4].tolist() == [4, 170, 478, 520]
    assert f.FEATURES == "hash4096-fold112-confidence16.1"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.lists(st.floats(-60, 0), max_size=30), st.integers(0, 10_000))
def test_any_text_and_any_logprobs_give_128_finite_numbers(prompt: str, logprobs: list[float], tokens: int) -> None:
    found = f.route_features(prompt, logprobs, tokens)
    assert found.shape == (128,) and np.isfinite(found).all()


def test_lone_surrogates_are_read() -> None:
    assert np.isfinite(f.route_features("\ud800 broken \udfff", [-1.0], 1)).all()


def test_hashed_texts_have_length_one_and_like_texts_are_near() -> None:
    a, b, c = (
        f.hash_text(text, f.HASH_DIMENSIONS)
        for text in ("sort a list of numbers", "sort the list of numbers", "a poem about the sea")
    )
    assert np.linalg.norm(a) == pytest.approx(1.0)
    assert a @ b > 0.5 > a @ c
    assert f.fold_text(a) @ f.fold_text(b) > f.fold_text(a) @ f.fold_text(c)


def test_the_middle_of_a_long_prompt_is_skipped_but_its_ends_are_read() -> None:
    filler = "x" * 5000
    same = f.hash_text("begin " + filler + " end", 512)
    assert np.allclose(same, f.hash_text("begin " + filler + filler + " end", 512))
    assert not np.allclose(same, f.hash_text("begin " + filler + " other", 512))


def test_confidence_features_by_hand() -> None:
    logprobs = [-0.5, -3.0, 0.0, -1.5]
    found = f.confidence_features(logprobs, 4)
    assert found[: len(f.QUANTILES)] == pytest.approx(np.quantile(logprobs, f.QUANTILES))
    probs = np.exp(logprobs)
    expected = [-0.5, -1.25, np.std(logprobs), np.sqrt(5.0), np.log(5.0), 0.5, 0.25, -(probs * logprobs).mean()]
    assert found[len(f.QUANTILES) :] == pytest.approx(expected)


def test_an_empty_answer_is_the_least_sure_one() -> None:
    assert f.confidence_features([], 0) == pytest.approx(f.confidence_features([f.FLOOR], 0))


@pytest.mark.parametrize("bad", [[float("nan")], [0.5], [-1.0, float("nan")]])
def test_what_is_not_a_log_probability_is_refused(bad: list[float]) -> None:
    with pytest.raises(CogumiError, match="at most 0"):
        f.confidence_features(bad, 1)


def test_reading_examples_says_what_is_wrong(make_rows: MakeRows) -> None:
    rows = make_rows(30)
    with pytest.raises(CogumiError, match="19 routing examples, 20 are needed"):
        f.read_examples(rows[:19])
    broken = [dict(rows[0]), *rows[1:]]
    del broken[0]["prompt"]
    with pytest.raises(CogumiError, match="lacks a field: KeyError"):
        f.read_examples(broken)
    blind = [{**row, "base": {**row["base"], "logprobs": []}} for row in rows]
    with pytest.raises(CogumiError, match="no token log-probabilities"):
        f.read_examples(blind)


def test_examples_know_who_was_right(make_rows: MakeRows) -> None:
    rows = make_rows(30)
    rows[0]["modifiers"] = {}
    examples = f.read_examples(rows)
    assert examples.features.shape == (30, 128)
    assert examples.features[3] == pytest.approx(
        f.route_features(rows[3]["prompt"], rows[3]["base"]["logprobs"], rows[3]["base"]["completion_tokens"])
    )
    assert examples.passed_by(0, "code") is None
    assert examples.own_passed(0) == examples.passed_by(0, None) == float(rows[0]["base"]["passed"])
    assert examples.own_passed(3) == float(rows[3]["modifiers"]["code"]["passed"])
