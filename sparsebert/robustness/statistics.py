"""Intervals and paired tests for classifier comparisons. All intervals are 95 %."""

from __future__ import annotations

import numpy as np
from scipy import stats
from scipy.special import log_softmax

Interval = tuple[float, float]


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a proportion."""
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [n], 10,000 resamples. A constant sample has a degenerate
    one.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, batch=500, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray) -> Interval:
    """Interval of accuracy(a) - accuracy(b) of two classifiers on the same examples; bool [n] each.

    [Bonett & Price 2012, adjusted Wald]: holds its coverage for small n and does not collapse where the two agree.
    """
    n = len(correct_a) + 2
    only_a = (int((correct_a & ~correct_b).sum()) + 1) / n
    only_b = (int((~correct_a & correct_b).sum()) + 1) / n
    half = float(stats.norm.ppf(0.975)) * np.sqrt((only_a + only_b - (only_a - only_b) ** 2) / n)
    return max(-1.0, float(only_a - only_b - half)), min(1.0, float(only_a - only_b + half))


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Exact McNemar p-value of two classifiers on the same examples; bool [n] each."""
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((~correct_a & correct_b).sum())
    return 1.0 if only_a + only_b == 0 else float(stats.binomtest(only_a, only_a + only_b).pvalue)


def kl_divergence(logits_p: np.ndarray, logits_q: np.ndarray) -> np.ndarray:
    """KL(P ‖ Q) in nats of each row's softmax distributions; logits [n, labels], result float64 [n]."""
    log_p = log_softmax(logits_p.astype(np.float64), axis=1)
    log_q = log_softmax(logits_q.astype(np.float64), axis=1)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
