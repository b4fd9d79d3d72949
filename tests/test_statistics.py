from __future__ import annotations

import numpy as np
import pytest

from sparsebert import heads
from sparsebert.data import Examples, get_task
from sparsebert.engine.measure import Timings
from sparsebert.errors import CheckpointError, InputError
from sparsebert.robustness import compare, evaluation, statistics


def test_wilson_matches_the_closed_form():
    k, n, z = 87, 100, 1.959963984540054
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    assert statistics.wilson(k, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_bootstrap_covers_the_mean_and_shrinks_with_n():
    values = np.random.default_rng(0).exponential(size=4000)
    low, high = statistics.bootstrap_mean(values)
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / np.sqrt(4000), rel=0.1)
    assert statistics.bootstrap_mean(np.ones(5)) == (1.0, 1.0)


def test_paired_difference_covers_and_does_not_collapse():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        a, flip = rng.random(60) < 0.8, rng.random(60)
        b = np.where(a, flip > 0.15, flip < 0.2)  # true difference .8 * .15 - .2 * .2 = .08
        low, high = statistics.paired_difference(a, b)
        inside += low <= 0.08 <= high
    assert 0.93 < inside / 2000 < 0.985
    low, high = statistics.paired_difference(np.ones(10, bool), np.ones(10, bool))
    assert low < -0.1 and high > 0.1


def test_a_ratios_interval_holds_its_confidence_or_is_absent():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        ratio = Timings({"a": rng.exponential(size=7), "b": np.ones(7)}).ratio("a", "b")
        inside += ratio.low <= np.log(2) <= ratio.high
    assert inside / 2000 > 0.95
    assert Timings({"a": np.ones(5), "b": np.ones(5)}).ratio("a", "b").low is None


def test_mcnemar_counts_only_disagreements():
    a = np.array([True] * 9 + [False] * 1 + [True] * 90)
    b = np.array([False] * 9 + [True] * 1 + [True] * 90)
    assert statistics.mcnemar(a, b) == pytest.approx(2 * 11 / 2**10)
    assert statistics.mcnemar(a, a) == 1.0


def test_holm_adjusts_as_in_a_worked_example():
    # Sorted: .01, .02, .02, .03, .04, times 5, 4, 3, 2, 1: .05, .08, .06, .06, .04, and none below the one before it.
    assert statistics.holm([0.02, 0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.08, 0.08, 0.05, 0.08, 0.08])
    assert statistics.holm([0.4, 0.0, 0.6]) == pytest.approx([0.8, 0.0, 0.8])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([0.03]) == [0.03] and statistics.holm([]) == []


def test_holm_is_seldom_wrong_about_any_test_of_a_family():
    rng = np.random.default_rng(0)
    wrong = np.mean([min(statistics.holm(rng.random(4).tolist())) <= 0.05 for _ in range(4000)])
    assert wrong == pytest.approx(0.05, abs=0.01)


def test_the_calibration_error_matches_a_worked_example():
    # Three in the bin (9/15, 10/15], mean confidence .64, accuracy 2/3; one at 1.0, in the last bin, wrong.
    confidence, correct = np.array([0.62, 0.65, 0.65, 1.0]), np.array([True, False, True, False])
    assert statistics.ece(confidence, correct) == pytest.approx(3 / 4 * (2 / 3 - 0.64) + 1 / 4 * 1.0)
    edge = np.array([10 / 15, 10 / 15 + 1e-9])  # the upper edge of one bin, and what is just above it
    assert statistics.ece(edge, np.array([True, False])) == pytest.approx((5 / 15 + 10 / 15) / 2)
    assert statistics.ece(np.array([1 / 3, 1.0]), np.array([False, True])) == pytest.approx(1 / 6)


def test_the_interval_of_the_calibration_error_holds_it():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):  # the true error is a third of the mean of confidence - 0.5
        confidence = 0.5 + 0.5 * rng.beta(3, 1, 500)
        correct = rng.random(500) < confidence - (confidence - 0.5) / 3
        value, (low, high) = statistics.ece(confidence, correct), statistics.ece_interval(confidence, correct)
        assert 0 <= low <= value <= high
        inside += low <= 0.375 / 3 <= high
    assert inside >= 51
    assert statistics.ece_interval(np.full(5, 1.0), np.full(5, True)) == (0.0, 0.0)


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    # Class 0: 1. Class 1: one of two found, one wrongly. Class 2: never found. Class 3 does not occur; class 4 never.
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 1, 4, 1])
    assert statistics.macro_f1(predicted, labels) == pytest.approx((1 + 1 / 2 + 0 + 0) / 4)


def examples(labels, task="mr"):
    return Examples(task, "test", ["x"] * len(labels), None, np.array(labels))


def test_compare_is_paired_with_dense():
    dense = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32)
    pruned = np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    result = compare(get_task("mr"), examples([1, 1, 0, 1]), pruned, dense)
    assert (result.accuracy, result.difference, result.agreement) == (0.5, -0.25, 0.75)
    assert result.kl_to_dense == pytest.approx(evaluation.divergences(heads.SINGLE_LABEL, dense, pruned).mean())
    assert compare(get_task("mr"), examples([1, 1, 0, 1]), dense).kl_to_dense is None


def test_the_calibration_error_is_of_the_predicted_labels_probability():
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], np.float32))
    dense = np.log(np.array([[0.6, 0.4], [0.4, 0.6], [0.6, 0.4]], np.float32))
    result = compare(get_task("mr"), examples([0, 1, 1]), logits, dense)
    assert result.ece == pytest.approx((0.1 + 0.2 + 0.7) / 3) and result.ece_ci[0] <= result.ece <= result.ece_ci[1]
    assert result.dense_ece == pytest.approx(abs(2 - 3 * 0.6) / 3)
    assert compare(get_task("mr"), examples([0, 1, 1]), logits).dense_ece is None
    three_way = np.log(np.array([[0.3, 0.5, 0.2], [0.4, 0.3, 0.3]], np.float32))  # not entailed: 0.7; entailed: 0.4
    assert compare(get_task("hans"), examples([1, 1], "hans"), three_way).ece == pytest.approx((0.3 + 0.4) / 2)


def test_f1_of_more_than_two_labels_is_their_mean():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    result = compare(get_task("mnli"), examples([0, 1, 2, 2], "mnli"), logits)
    assert result.f1_macro == pytest.approx((1 + 2 / 3 + 2 / 3) / 3) and result.f1 is None
    assert result.f1_macro_ci[0] < result.f1_macro < result.f1_macro_ci[1]
    assert compare(get_task("mr"), examples([0, 1]), np.eye(2, dtype=np.float32)).f1_macro is None


def test_three_way_models_count_neutral_and_contradiction_as_not_entailment():
    logits = np.array([[3, 1, 1], [1, 3, 1], [1, 1, 3], [1, 1, 3]], np.float32)
    result = compare(get_task("hans"), examples([0, 1, 1, 0], "hans"), logits)
    assert result.accuracy == 0.75


def test_f1_is_reported_where_it_is_the_metric():
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32)
    result = compare(get_task("qqp"), examples([1, 0, 1, 0], "qqp"), logits)
    assert result.f1 == pytest.approx(0.5)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="has 4 labels, the model has 2"):
        compare(get_task("agnews"), examples([0, 3], "agnews"), np.zeros((2, 2), np.float32))


def test_f1_intervals_are_those_of_resampled_examples():
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.3).astype(np.int64)
    predicted = np.where(rng.random(300) < 0.8, labels, 1 - labels)
    figures = statistics.f1_figures(predicted, labels)
    assert figures == statistics.f1_figures(predicted, labels)
    drawn = []
    for rows in rng.integers(0, 300, (2000, 300)):
        p, y = predicted[rows], labels[rows]
        f1 = [2 * ((p == c) & (y == c)).sum() / ((p == c).sum() + (y == c).sum()) for c in (0, 1)]
        drawn.append((f1[1], f1[0] * (y == 0).mean() + f1[1] * (y == 1).mean()))
    for name, values in zip(("f1", "f1_weighted"), np.transpose(drawn), strict=True):
        assert figures[f"{name}_ci"] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.01)
        assert figures[name] == pytest.approx(values.mean(), abs=0.01)


@pytest.mark.parametrize("same", [0, 1])
def test_f1_of_a_class_that_is_all_or_nothing(same):
    figures = statistics.f1_figures(np.full(7, same), np.full(7, same))
    assert (figures["f1"], figures["f1_weighted"]) == (same, 1) and figures["f1_weighted_ci"] == (1, 1)


def test_weighted_f1_takes_more_than_two_classes():
    # Class 0: both are right. Class 1: one of two. Class 2: the one is right, and one of class 1 is taken for it.
    figures = statistics.f1_figures(np.array([0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 2]))
    assert figures["f1"] == pytest.approx(2 / 3)
    assert figures["f1_weighted"] == pytest.approx(2 / 5 * 1 + 2 / 5 * 2 / 3 + 1 / 5 * 2 / 3)


def test_seeds_are_compared_in_pairs():
    found = statistics.paired_over_seeds([0.84, 0.86, 0.88], [0.82, 0.85, 0.83])  # differences .02, .01, .05
    error = np.sqrt((0.02**2 + 0.01**2 + 0.05**2 - 0.08**2 / 3) / 2 / 3)
    t = 0.08 / 3 / error
    assert found.difference == pytest.approx(0.08 / 3)
    assert found.difference_ci == pytest.approx((0.08 / 3 - 4.302653 * error, 0.08 / 3 + 4.302653 * error), rel=1e-6)
    assert found.t_p == pytest.approx(1 - t / np.sqrt(2 + t * t))  # closed form for two degrees of freedom
    assert found.sign_flip_p == 2 / 8


@pytest.mark.parametrize(
    ("differences", "p"),
    [([3, 1, -2], 6 / 8), ([1, 1], 2 / 4), ([1, -1], 1.0), ([0, 0], 1.0), ([0.1, 0.2, 0.3, -0.1], 6 / 16)],
)
def test_sign_flips_count_those_as_far_from_zero(differences, p):
    # ±.1 ± .2 ± .3 ± .1 is .5 or more in 3 of 16 cases: once .7, twice .5; and -.5 or less in 3.
    found = statistics.paired_over_seeds(differences, np.zeros(len(differences)))
    assert found.sign_flip_p == p


def test_sign_flips_do_not_depend_on_the_order_of_seeds():
    rng = np.random.default_rng(0)
    differences = np.round(rng.normal(0.01, 0.03, 12), 2)
    ps = {statistics.paired_over_seeds(rng.permutation(differences), np.zeros(12)).sign_flip_p for _ in range(20)}
    assert len(ps) == 1


def test_the_sign_flip_test_is_exact_to_20_seeds_and_absent_above():
    assert statistics.paired_over_seeds(np.ones(20), np.zeros(20)).sign_flip_p == 2 / 2**20
    assert statistics.paired_over_seeds(np.ones(21), np.zeros(21)).sign_flip_p is None


def test_differences_that_are_all_the_same_have_no_spread():
    same = statistics.paired_over_seeds([1, 1], [0.5, 0.5])
    assert (same.difference_ci, same.t_p) == ((0.5, 0.5), 0.0)
    assert statistics.paired_over_seeds([1, 2], [1, 2]).t_p == 1.0


def test_the_interval_of_a_mean_over_seeds():
    half = 3.182446 * np.sqrt(5 / 3 / 4)  # t(0.975, 3), s² = 5/3
    assert statistics.mean_interval([1, 2, 3, 4]) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1], [1], "two seeds or more"),
        ([], [], "two seeds or more"),
        ([1, 2], [1], "the same seeds"),
        ([[1, 2]], [[1, 2]], "two seeds or more"),
        ([1, np.nan], [1, 2], "finite"),
    ],
)
def test_seeds_that_make_no_pairs_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        statistics.paired_over_seeds(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_have_no_figures(bad):
    good = np.zeros((3, 2), np.float32)
    broken = good.copy()
    broken[1, 0] = bad
    for pair in ((broken, None), (good, broken)):
        with pytest.raises(CheckpointError, match=r"mr: logits must be finite, those of texts\[1\]"):
            compare(get_task("mr"), examples([0, 1, 1]), *pair)
