"""Calibration: right on data whose truth is known, honest on few rows and on one class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.routing import calibration as c
from cogumi_dagster.lib.routing.features import CONFIDENCE_DIMENSIONS, read_examples

MakeRows = Callable[..., list[dict[str, Any]]]


def answers(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features whose raw confidence is overconfident: P(right) = sigmoid(logit(raw) / 3)."""
    draw = np.random.default_rng(seed)
    features = np.zeros((count, CONFIDENCE_DIMENSIONS))
    features[:, c.MEAN] = -draw.exponential(0.3, count)
    right = c.sigmoid(c.logit(c.raw_confidence(features)) / 3)
    return features, (draw.random(count) < right).astype(float)


def test_temperature_is_found_again() -> None:
    features, passed = answers(5000)
    found = c.fit_method("temperature", features, passed)
    assert 1 / found.weights[0] == pytest.approx(3.0, rel=0.1)
    assert found.bias == 0.0


def test_platt_is_near_the_truth_on_many_rows() -> None:
    features, passed = answers(5000)
    found = c.fit_method("platt", features, passed)
    assert found.weights[0] == pytest.approx(1 / 3, rel=0.1)
    assert found.bias == pytest.approx(0.0, abs=0.1)


def test_soft_logistic_is_sklearns() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(80, 16))
    passed = (features[:, 0] + draw.normal(size=80) > 0).astype(float)
    weights, bias = c.soft_logistic(features, passed, 10.0)
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(features, passed)
    assert weights == pytest.approx(model.coef_[0], abs=1e-4)
    assert bias == pytest.approx(model.intercept_[0], abs=1e-4)


def test_soft_logistic_survives_separable_rows() -> None:
    weights, bias = c.soft_logistic(np.array([[-1.0], [1.0]] * 20), np.array([0.0, 1.0] * 20), 0.01)
    assert np.isfinite([*weights, bias]).all() and weights[0] > 1


def test_calibration_lowers_ece_and_brier_on_the_test_split(make_rows: MakeRows) -> None:
    rows = make_rows(400, seed=1, test_share=0.4)
    calibration, report = c.fit_calibration(rows, seed=0)
    shown = report_json(report)
    assert report.held_out.startswith("the test split")
    assert calibration.rows == sum(row["split"] == "train" for row in rows)
    assert report.rows == sum(row["split"] == "test" for row in rows)
    assert report.after.brier.value < report.before.brier.value
    assert report.after.brier.value < report.of_base_rate.brier.value
    assert report.of_base_rate.auroc.value == 0.5 < report.after.auroc.low
    assert report.of_base_rate.ece.value == pytest.approx(0.0, abs=1e-9)
    assert set(shown["of_methods"]) == {"temperature", "platt", "quantile"}
    json.dumps(shown, allow_nan=False)


def test_few_rows_are_cross_fitted_and_every_row_is_held_out_once(make_rows: MakeRows) -> None:
    examples = read_examples(make_rows(60, test_share=0.2))
    plan = c.hold_out(examples, seed=0)
    assert "cross-fitted" in plan.description
    assert sorted(np.concatenate([out for _, out in plan.pairs])) == list(range(60))
    assert not examples.test[plan.fit].any()
    for fit, out in plan.pairs:
        assert not set(fit) & set(out)


def test_each_reported_row_is_predicted_without_it(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fitted_on, choose_and_fit = make_rows(40), [], c.choose_and_fit

    def spy(examples: Any, chosen: Any, seed: int) -> c.Calibration:
        fitted_on.append(chosen.tolist())
        return choose_and_fit(examples, chosen, seed)

    monkeypatch.setattr(c, "choose_and_fit", spy)
    c.fit_calibration(rows, seed=0)
    shipped, *for_report = fitted_on
    assert shipped == list(range(40))
    assert for_report == [fit.tolist() for fit, _ in c.hold_out(read_examples(rows), seed=0).pairs]
    assert all(len(fit) == 32 for fit in for_report)


def test_labels_without_signal_are_not_reported_as_signal(make_rows: MakeRows) -> None:
    """A report on its own training rows would show an AUROC far above one half."""
    rows = make_rows(60)
    draw = np.random.default_rng(3)
    for row in rows:
        row["base"]["passed"] = bool(draw.random() < 0.5)
    _, report = c.fit_calibration(rows, seed=0)
    assert report.after.auroc.low < 0.5


def test_equal_prompts_never_stand_on_both_sides(make_rows: MakeRows) -> None:
    rows = make_rows(60)
    for row in rows[30:]:
        row["prompt"] = rows[0]["prompt"]
    examples = read_examples(rows)
    for fit, out in c.stratified_folds(examples, np.arange(60), 5, seed=0):
        assert not {examples.prompts[i] for i in fit} & {examples.prompts[i] for i in out}
    for row in rows:
        row["prompt"] = "the same"
    with pytest.raises(CogumiError, match="1 distinct prompts"):
        c.fit_calibration(rows, seed=0)


def test_only_test_rows_are_fitted_on_but_it_is_said(make_rows: MakeRows) -> None:
    plan = c.hold_out(read_examples([{**row, "split": "test"} for row in make_rows(40)]), seed=0)
    assert "rows of the test split among them" in plan.description


@pytest.mark.parametrize(("passed", "kind"), [(True, "right"), (False, "wrong")])
def test_one_class_gives_a_constant_and_says_so(make_rows: MakeRows, passed: bool, kind: str) -> None:
    rows = make_rows(24)
    for row in rows:
        row["base"]["passed"] = passed
    calibration, report = c.fit_calibration(rows, seed=0)
    assert calibration.method == "constant"
    assert calibration.confidence([-5.0], 1) == calibration.confidence([-0.1], 1)
    assert 0 < calibration.confidence([-0.1], 1) < 1
    assert f"every answer of the base was {kind}" in report.notes[0]
    assert report_json(report)["after"]["auroc"]["value"] is None


def test_a_calibration_survives_the_disk(make_rows: MakeRows, tmp_path: Path) -> None:
    examples = read_examples(make_rows(60))
    for method in c.METHODS:
        found = c.fit_method(method, examples.confidence, examples.passed)
        found.save(tmp_path / "calibration.json")
        assert c.Calibration.load(tmp_path / "calibration.json") == found
    unsure, sure = found.confidence([-3.0, -4.0, -2.0], 3), found.confidence([-0.01, -0.02, -0.01], 3)
    assert unsure < sure


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": "platt", "weights": [1, 2], "bias": 0}'])
def test_a_broken_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CogumiError, match="not a calibration"):
        c.Calibration.load(tmp_path / "c.json")
    with pytest.raises(CogumiError, match="there is no calibration"):
        c.Calibration.load(tmp_path / "none.json")
