"""The labelled set, and a judge's agreement with it."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cogumi_dagster.lib.curation.agreement import AGREEMENT_SET, agreement, read_labelled, spearman
from cogumi_dagster.lib.curation.judge import RUBRIC, score_responses
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.profile import DOMAINS

LABELLED = read_labelled()


def test_the_set_covers_the_domains_with_good_and_bad_answers() -> None:
    domains = Counter(item.row["task"]["domain"] for item in LABELLED)
    assert set(domains) == set(DOMAINS) and min(domains.values()) >= 6
    good = sum(item.total >= 7 for item in LABELLED)
    assert 0.4 <= good / len(LABELLED) <= 0.6
    assert len({(item.row["task"]["prompt"], item.row["response"]) for item in LABELLED}) == len(LABELLED) == 40
    for line in AGREEMENT_SET.read_text().splitlines():
        row = json.loads(line)
        assert row["note"] and all(0 <= row["scores"][part] <= most for part, most in RUBRIC.items())


def test_a_perfect_judge_agrees_and_a_reversed_one_does_not() -> None:
    perfect = agreement([item.total for item in LABELLED], LABELLED)
    assert perfect.mean_absolute_difference and perfect.mean_absolute_difference.value == 0.0
    assert perfect.spearman and perfect.spearman.value == pytest.approx(1.0)
    assert perfect.same_side.value == 1.0 and perfect.majority.count == 40
    reversed_ = agreement([10 - item.total for item in LABELLED], LABELLED)
    assert reversed_.spearman and reversed_.spearman.value == pytest.approx(-1.0)
    assert reversed_.same_side.value < reversed_.majority.value


def test_errors_are_counted_by_kind_and_missing_scores_are_left_out() -> None:
    always = agreement([None] + [10.0] * 39, LABELLED)
    assert always.scored == 39 and always.items == 40 and always.dropped_though_good == 0
    assert always.kept_though_bad == sum(item.total < 7 for item in LABELLED[1:])
    assert always.mean_difference and always.mean_difference.value > 0
    assert always.spearman and math.isnan(always.spearman.value), "a judge that never differs ranks nothing"
    nothing = agreement([None] * 40, LABELLED)
    assert nothing.scored == 0 and nothing.spearman is None and nothing.same_side.count == 0


def test_spearman_is_scipy_s() -> None:
    from scipy.stats import spearmanr

    pairs = np.random.default_rng(0).integers(0, 6, (40, 2)).astype(float)
    assert spearman(pairs) == pytest.approx(float(spearmanr(pairs).statistic))


def test_the_rules_judge_is_better_than_the_majority_and_the_report_says_by_how_much() -> None:
    _, report = score_responses([])
    assert report.agreement and report.agreement.same_side.value > report.agreement.majority.value
    shown = report_json(report)["agreement"]
    assert {"value", "low", "high", "count"} <= set(shown["spearman"]) and shown["same_side"]["count"] == 40
    assert score_responses([], agreement_set=None)[1].agreement is None


def test_a_line_that_lacks_a_field_is_told(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"domain": "math"}\n')
    with pytest.raises(CogumiError, match="line 1 lacks 'difficulty'"):
        read_labelled(path)
