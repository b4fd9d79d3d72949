from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sparsebert.data import Examples, get_task
from sparsebert.engine.measure import Timings
from sparsebert.errors import InputError
from sparsebert.robustness import compare, statistics


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


def test_kl_is_zero_for_shifted_logits_and_matches_the_sum():
    p, q = np.array([[1.0, 2.0, 0.5]], np.float32), np.array([[0.0, 0.3, 3.0]], np.float32)
    assert statistics.kl_divergence(p, p + 7) == pytest.approx(0, abs=1e-12)
    a, b = np.exp(p[0]) / np.exp(p[0]).sum(), np.exp(q[0]) / np.exp(q[0]).sum()
    assert statistics.kl_divergence(p, q)[0] == pytest.approx((a * np.log(a / b)).sum(), rel=1e-6)


def examples(labels, task="mr"):
    return Examples(task, "test", ["x"] * len(labels), None, np.array(labels))


def test_compare_is_paired_with_dense():
    dense = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32)
    pruned = np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    result = compare(get_task("mr"), examples([1, 1, 0, 1]), pruned, dense)
    assert (result.accuracy, result.difference, result.agreement) == (0.5, -0.25, 0.75)
    assert result.kl_to_dense == pytest.approx(statistics.kl_divergence(dense, pruned).mean())
    assert compare(get_task("mr"), examples([1, 1, 0, 1]), dense).kl_to_dense is None


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


def test_a_paired_test_over_seeds_by_hand():
    found = statistics.paired_over_seeds(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.4, 0.4]))
    assert found["difference"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / np.sqrt(3)  # t(0.975, 2) s / √n
    assert found["interval"] == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert found["sign_flip_p"] == pytest.approx(2 / 8), "all of one sign: the two extreme flips of eight"
    assert found["t_p"] == pytest.approx(2 * stats.t.sf(0.2 / (0.1 / np.sqrt(3)), 2))


def test_no_difference_over_seeds_is_none():
    found = statistics.paired_over_seeds(np.array([0.5, 0.6]), np.array([0.5, 0.6]))
    assert found["difference"] == 0 and found["t_p"] == 1 and found["sign_flip_p"] == 1


def test_one_seed_is_no_comparison():
    with pytest.raises(ValueError, match="2 to 20 seeds"):
        statistics.paired_over_seeds(np.array([0.5]), np.array([0.4]))


def test_f1_in_both_senses_by_hand():
    predicted, labels = np.array([1, 1, 0, 0, 0]), np.array([1, 0, 1, 0, 0])
    positive, weighted = statistics.f1_scores(predicted, labels)
    assert positive == pytest.approx(0.5) and weighted == pytest.approx(0.4 * 0.5 + 0.6 * (2 * 2 / 6))
    for value, (low, high) in zip((positive, weighted), statistics.f1_intervals(predicted, labels), strict=True):
        assert 0 <= low <= value <= high <= 1
