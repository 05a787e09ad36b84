"""Statistics against scipy, scikit-learn and values worked out by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation import statistics as s


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (3, 10), (124, 150), (1, 1)])
def test_wilson_is_scipys(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert s.wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_proportion_of_nothing_is_null_and_not_zero() -> None:
    assert s.Proportion(0, 0).to_json() == {"value": None, "low": 0.0, "high": 1.0, "successes": 0, "count": 0}
    with pytest.raises(CogumiError, match="11 successes out of 10"):
        s.wilson(11, 10)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (5, 0), (8, 13), (7, 7), (400, 460)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert s.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert s.sign_flips([1] * b + [-1] * c + [0] * 3) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_is_scipys_permutation_test() -> None:
    differences = [8, -1, 2, 2, 0, -3, 5]
    expected = stats.permutation_test(
        (np.array(differences),), np.sum, permutation_type="samples", n_resamples=10_000
    ).pvalue
    assert s.sign_flips(differences) == pytest.approx(expected)
    assert s.sign_flips([8]) == s.sign_flips([]) == 1.0, "one kind tells nothing, however many tasks it has"


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=40))
def test_auroc_with_ties_is_sklearns(rows: list[tuple[float, bool]]) -> None:
    scores, labels = [p for p, _ in rows], [int(y) for _, y in rows]
    if len(set(labels)) == 1:
        assert math.isnan(s.auroc(scores, labels))
    else:
        assert s.auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_brier_and_balanced_accuracy_are_sklearns() -> None:
    draw = np.random.default_rng(0)
    probs, labels = draw.random(50), draw.integers(0, 2, 50)
    assert s.brier(probs, labels) == pytest.approx(metrics.brier_score_loss(labels, probs))
    guesses = draw.choice(["a", "b", "c"], 50).tolist()
    truth = draw.choice(["a", "b", "c"], 50).tolist()
    assert s.balanced_accuracy(truth, guesses) == pytest.approx(metrics.balanced_accuracy_score(truth, guesses))


def test_always_yes_on_the_published_scheduling_set() -> None:
    truth = ["YES"] * 132 + ["NO"] * 18
    assert s.majority_baseline(truth).value == pytest.approx(0.88)
    assert s.balanced_accuracy(truth, ["YES"] * 150) == 0.5


def test_aurc_by_hand_and_for_a_constant() -> None:
    # The surest is right, the second wrong, the third right: risks 0, 1/2, 1/3.
    assert s.aurc([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert s.aurc([0.5] * 8, [1, 1, 0, 1, 0, 0, 0, 0]) == pytest.approx(5 / 8)


@given(st.permutations(list(range(12))))
def test_aurc_and_ece_do_not_depend_on_the_order_of_ties(order: list[int]) -> None:
    scores = np.array([0.2] * 5 + [0.7] * 7)[order]
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0])[order]
    assert s.aurc(scores, labels) == pytest.approx(s.aurc(np.sort(scores), labels[np.argsort(scores)]))
    ece = s.expected_calibration_error(scores, labels, bins=4)
    assert ece == pytest.approx((abs(5 * 0.2 - 2) + abs(7 * 0.7 - 5)) / 12)


def test_the_base_rate_is_perfectly_calibrated() -> None:
    labels = [1, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert s.expected_calibration_error([0.3] * 10, labels) == pytest.approx(0.0, abs=1e-12)
    assert s.auroc([0.3] * 10, labels) == 0.5


def test_auroc_of_a_cross_fit_compares_scores_of_one_model_only() -> None:
    """Each fold's constant is the base rate of its fit: lower exactly where a positive is held out."""
    labels = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    folds = [0] * 4 + [1] * 4 + [2] * 4
    fitted = [1 / 8] * 8 + [2 / 8] * 4
    assert s.auroc(fitted, labels) < 0.5
    assert s.auroc(fitted, labels, folds) == 0.5
    assert s.auroc([0.9, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1, 0.1, 1, 1, 1, 1], labels, folds) == pytest.approx(5 / 6)


def test_bins_have_equal_mass() -> None:
    probs = np.concatenate([np.linspace(0, 0.01, 50), np.linspace(0.5, 1, 50)])
    bins = s.reliability_bins(probs, np.zeros(100), bins=10)
    assert [b.count for b in bins] == [10] * 10
    assert sum(b.count * b.predicted for b in bins) / 100 == pytest.approx(probs.mean())


def test_calibration_noise_of_few_rows_is_far_above_the_threshold_and_falls_with_rows() -> None:
    draw = np.random.default_rng(1)
    few, many = draw.random(120), draw.random(12_000)
    assert 0.07 < s.calibration_noise(few, seed=0) < 0.13
    assert s.calibration_noise(many, seed=0, draws=20) < 0.02


def test_bootstrap_covers_like_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    mine = s.bootstrap(values, lambda v: float(v.mean()), seed=0, resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert s.bootstrap(values, lambda v: float(v.mean()), seed=0, resamples=4000) == mine


def test_bootstrap_of_an_undefined_statistic_is_null_in_json() -> None:
    rows = np.column_stack([np.linspace(0, 1, 20), np.ones(20)])
    shown = s.bootstrap(rows, lambda r: s.auroc(r[:, 0], r[:, 1]), seed=0, resamples=50).to_json()
    assert shown == {"value": None, "low": None, "high": None, "count": 20}
    json.dumps(shown, allow_nan=False)
    with pytest.raises(CogumiError, match="no rows"):
        s.bootstrap([], lambda v: float(v.mean()), seed=0)


def test_paired_difference_counts_wins_and_losses() -> None:
    a, b = [1, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0]
    result = s.paired_difference(a, b, seed=0)
    assert (result.wins, result.losses) == (2, 1)
    assert result.difference.value == pytest.approx(1 / 6)
    assert result.p_value == pytest.approx(stats.binomtest(2, 3).pvalue)
    assert result.difference.low < 0 < result.difference.high


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [([0.1, 0.2], [1], "1 and 2 values"), ([0.1, math.nan], [1, 0], "finite"), ([0.1, 0.2], [1, 2], "0 and 1")],
)
def test_bad_input_is_refused(scores: list[float], labels: list[int], said: str) -> None:
    with pytest.raises(CogumiError, match=said):
        s.auroc(scores, labels)


def test_the_interval_of_a_share_is_over_groups() -> None:
    flags, alone = [1, 1, 1, 0] * 25, list(range(100))
    single = s.Proportion.of(flags, alone)
    assert single == s.Proportion(75, 100)
    copies = s.Proportion.of(flags * 4, alone * 4)  # four copies of each row tell no more than one
    assert copies.interval == pytest.approx(single.interval, abs=0.002)
    assert (copies.successes, copies.count) == (300, 400)
    assert s.Proportion.of([1] * 40, [row // 4 for row in range(40)]).interval == s.Proportion(10, 10).interval
    assert s.Proportion.of([], []) == s.Proportion(0, 0)
    for flags, many in (([1, 0, 0], 1), ([1, 0, 0] * 4, 4), ([1, 0, 0, 0, 0, 0, 0] * 3, 3)):
        alike = s.Proportion.of(flags, [n * many // len(flags) for n in range(len(flags))])
        assert alike.effective == many, "groups that are all alike: rounding is no variance"
    with pytest.raises(CogumiError, match="1 groups for 2 flags"):
        s.Proportion.of([0, 1], [1])


def test_the_interval_over_groups_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        of_group = draw.beta(4, 1, 60)  # a group's own share: 0.8 in the mean
        groups = np.repeat(np.arange(60), draw.integers(1, 8, 60))
        found = s.Proportion.of(draw.random(len(groups)) < of_group[groups], groups.tolist())
        held += found.interval[0] <= 0.8 <= found.interval[1]
    assert 0.92 < held / 400 < 0.98


def test_the_mean_of_shares_has_an_interval_even_at_its_ends() -> None:
    none, all_ = s.mean_of_shares([s.Proportion(0, 6)] * 2), s.mean_of_shares([s.Proportion(6, 6)] * 2)
    assert none.value == none.low == 0.0 and 0.2 < none.high < 0.4
    assert all_.value == all_.high == 1.0 and 0.6 < all_.low < 0.8
    half = s.mean_of_shares([s.Proportion(50, 100), s.Proportion(50, 100)])
    wide = s.wilson(100, 200)
    assert (half.low, half.high, half.count) == (
        pytest.approx(wide[0], abs=2e-3),
        pytest.approx(wide[1], abs=2e-3),
        200,
    )
    assert s.mean_of_shares([]).count == 0
