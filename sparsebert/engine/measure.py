"""Timing for machines whose clock speed varies: candidates take turns, and are compared round by round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """A ratio of times and an interval of at least 95 % confidence; None if there are too few rounds for one."""

    value: float
    low: float | None
    high: float | None


def ratio_text(value: float, interval: Sequence[float | None]) -> str:
    """`3.26x [2.80, 3.88]`, without the brackets if there is no interval."""
    low, high = interval
    return f"{value:.2f}x" if low is None else f"{value:.2f}x [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Timings:
    """Seconds per call, candidate -> float64 [rounds]; round i of one candidate ran next to round i of the others."""

    seconds: dict[str, np.ndarray]

    def quantile(self, name: str, q: float) -> float:
        """The q-quantile over rounds, in seconds, 0 <= q <= 1."""
        return float(np.quantile(self.seconds[name], q))

    def median(self, name: str) -> float:
        """The middle round, in seconds."""
        return self.quantile(name, 0.5)

    def minimum(self, name: str) -> float:
        """The fastest round, in seconds: what the machine can do undisturbed."""
        return self.quantile(name, 0.0)

    def spread(self, name: str) -> float:
        """The inter-quartile range divided by the median."""
        return (self.quantile(name, 0.75) - self.quantile(name, 0.25)) / self.median(name)

    def summary(self, name: str) -> dict[str, float]:
        """The figures of one candidate; times in seconds."""
        return {
            "median_s": self.median(name),
            "p50_s": self.quantile(name, 0.50),
            "p99_s": self.quantile(name, 0.99),
            "min_s": self.minimum(name),
            "spread": self.spread(name),
        }

    def ratio(self, a: str, b: str) -> Ratio:
        """Median over rounds of time(a) / time(b): how many times as long `a` takes.

        Each round divides two neighbouring times, so a slow minute of the machine cancels out. The interval is the
        order-statistic interval of a median, from the k-th smallest to the k-th largest round. It makes no assumption
        on the distribution of times and needs 6 rounds. (At 7 rounds a bootstrap of the median covers 87 % instead of
        95 %.)
        """
        per_round = np.sort(self.seconds[a] / self.seconds[b])
        n = per_round.size
        value = float(np.median(per_round))
        # P(the median lies outside) = 2 P(Binomial(n, 1/2) < k); the largest k that keeps it within 5 %.
        tails = np.cumsum([math.comb(n, i) for i in range(n)]) / 2.0**n
        k = int((2 * tails <= 0.05).sum())
        return Ratio(value, float(per_round[k - 1]), float(per_round[n - k])) if k else Ratio(value, None, None)


def interleave(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    *,
    repeats: int = 1,
    settle: float = 0.0,
) -> Timings:
    """Runs all candidates one after the other, in each of `rounds` rounds, and times every turn. Each round starts with
    the next candidate.

    candidates: name -> a call without arguments; at least one.
    rounds: timed rounds, at least 1. warmup: rounds run first and not timed.
    repeats: calls per turn; the time of a turn is divided by it. For calls of a few microseconds.
    settle: seconds to sleep before each turn, followed by one untimed call. With several threads: lets the workers of
        the previous candidate stop spinning (OpenMP's spin for about 3 ms) before they can take a core from the next.
    Raises ValueError if there is nothing to run.
    """
    if not candidates or rounds < 1 or repeats < 1:
        raise ValueError(f"need a candidate, a round and a repeat, got {len(candidates)}, {rounds} and {repeats}")
    seconds = {name: np.empty(rounds) for name in candidates}
    for turn in range(-warmup, rounds):
        for name in in_order(candidates, turn):
            elapsed = _time_turn(candidates[name], repeats, settle)
            if turn >= 0:
                seconds[name][turn] = elapsed / repeats
    return Timings(seconds)


def in_order(names: Iterable[str], turn: int) -> list[str]:
    """The names in the order of a round; each round starts with the next name."""
    names = list(names)
    first = turn % len(names)
    return names[first:] + names[:first]


def _time_turn(call: Callable[[], object], repeats: int, settle: float) -> float:
    if settle > 0:
        time.sleep(settle)
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start
