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


def mean_interval(values: np.ndarray) -> Interval:
    """t interval of the mean of `values` [n], n >= 2: what another draw of seeds would give."""
    values = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def paired_over_seeds(a: np.ndarray, b: np.ndarray) -> dict:
    """a - b of two methods run with the same seeds, float [n] each, 2 <= n <= 20: {"difference": its mean, "interval":
    its t interval, "t_p": of the paired t-test, "sign_flip_p": exact, over all 2^n choices of who is who in each pair}.

    The last assumes least and cannot go below 2^(1 - n): six seeds are needed for 0.05.
    """
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(differences)
    if not 2 <= n <= 20:
        raise ValueError(f"paired tests need 2 to 20 seeds, got {n}")
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    # The share of flips that give at least as much; rounding must not take the actual signs out of it.
    sums = np.abs(signs @ differences)
    flips = float((sums >= abs(differences.sum()) * (1 - 1e-12)).mean())
    constant = np.ptp(differences) == 0
    t_p = float(differences[0] == 0) if constant else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return {
        "difference": float(differences.mean()),
        "interval": mean_interval(differences),
        "t_p": t_p,
        "sign_flip_p": flips,
    }


def f1_scores(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(F1 of class 1, F1 of both classes weighted by their share of the labels), of 0/1 arrays [n]."""
    positive, weighted = _f1(_confusion(predicted, labels)[None])
    return float(positive[0]), float(weighted[0])


def f1_intervals(predicted: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[Interval, Interval]:
    """Percentile bootstrap intervals of `f1_scores`, 10,000 resamples of the examples."""
    counts = _confusion(predicted, labels)
    drawn = np.random.default_rng(seed).multinomial(len(labels), counts.ravel() / len(labels), size=10_000)
    intervals = [np.quantile(scores, (0.025, 0.975)) for scores in _f1(drawn.reshape(-1, 2, 2))]
    return tuple((float(low), float(high)) for low, high in intervals)


def _confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 [2, 2]: examples by label and prediction."""
    return np.bincount(2 * labels.astype(np.int64) + predicted, minlength=4).reshape(2, 2)


def _f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 of class 1 and weighted, [n] each, of confusion matrices [n, 2, 2]."""
    labelled, predicted = counts.sum(2), counts.sum(1)
    hits = counts.diagonal(axis1=1, axis2=2)
    scores = 2 * hits / np.maximum(1, labelled + predicted)
    return scores[:, 1], (scores * labelled).sum(1) / labelled.sum(1)


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
