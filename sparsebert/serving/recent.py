"""The last minute of a server, second by second: what its page draws."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = 60
KEPT = 500  # latencies of a second, a random sample of all


@dataclass
class _Second:
    number: int
    requests: int = 0
    refused: int = 0
    waiting: int = 0
    batches: int = 0
    texts: int = 0
    latencies: array = field(default_factory=lambda: array("d"))


class Recent:
    """counts: (texts that wait, batches so far, texts that ran so far) at present."""

    def __init__(self, counts: Callable[[], tuple[int, int, int]]):
        self._counts = counts
        self._seconds: deque[_Second] = deque()
        self._before = _Second(-1)  # the one before them
        self._random = random.Random(0)

    def add(self, now: float, latency: float, status: int) -> None:
        """A request for answers that ended. now: seconds of a clock that never goes back. latency: in seconds."""
        if not self._seconds or self._seconds[-1].number < int(now):
            self._seconds.append(_Second(int(now)))
            if len(self._seconds) > SECONDS + 1:
                self._before = self._seconds.popleft()
        second = self._seconds[-1]
        second.requests += 1
        second.refused += status == 429
        waiting, second.batches, second.texts = self._counts()
        second.waiting = max(second.waiting, waiting)
        if status == 200:
            if len(second.latencies) < KEPT:
                second.latencies.append(latency)
            elif (at := self._random.randrange(second.requests)) < KEPT:
                second.latencies[at] = latency

    def rows(self, now: float) -> list[dict]:
        """A row for each of the last SECONDS whole seconds, the oldest first: ago (seconds), requests, refused, p50_ms
        and p99_ms (None without an answer), waiting (most texts in the queue) and batch (mean texts per batch).
        """
        last, known = int(now), {second.number: second for second in self._seconds}
        before = max((s for s in known.values() if s.number < last - SECONDS), key=_number, default=self._before)
        rows = []
        for number in range(last - SECONDS, last):
            second, batches, texts = known.get(number) or _Second(number), 0, 0
            if second.requests:
                batches, texts = second.batches - before.batches, second.texts - before.texts  # below 0 after a reload
                before = second
            found = sorted(second.latencies)
            rows.append({
                "ago": last - number, "requests": second.requests, "refused": second.refused,
                "p50_ms": 1e3 * found[len(found) // 2] if found else None,
                "p99_ms": 1e3 * found[round(0.99 * (len(found) - 1))] if found else None,
                "waiting": second.waiting, "batch": texts / batches if batches > 0 else None,
            })  # fmt: skip
        return rows


def _number(second: _Second) -> int:
    return second.number
