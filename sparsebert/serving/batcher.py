"""The queue in front of an engine: which texts run next, together, and which requests are refused.

It has no threads and no clock of its own: whoever drives it tells it the time, in seconds of a clock that never goes
back, and runs one batch at a time. The engine computes no padding, so that a batch costs its real tokens, and texts of
any lengths go together.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ITEM_COST = 8  # what a text costs beside its tokens, in tokens
RATE_MEMORY = 0.2  # weight of the newest batch in the estimate of the engine's speed
# A queue is no burst any more if, for so many seconds, so many times more was asked for than the engine can do. Chosen
# by simulating an engine of fixed speed: random arrivals at 80 % of it are refused no more often than without the rule.
STANDING, HOPELESS = 0.2, 1.75
# In overload, so many batches of work more may wait each time that the engine ran dry, and by so much less after each
# batch: it must run dry again and again, not once.
SPARED, FORGOTTEN = 0.5, 0.003
SUDDEN = 10  # by how much one batch may be slower than that, in the estimate: one that hung must not refuse all others


class Refused(Exception):
    """A request that was not admitted. retry_after: seconds after which it probably would be."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Limits:
    """in_flight: requests without an answer. batch_tokens: of one batch. batch_seconds: how long a batch may probably
    take, so that those who come meanwhile do not wait long. A text that alone is beyond either limit runs alone.
    wait: seconds that a request may probably wait for its first text to begin; it is refused at once if it would be
    longer, so that a queue never grows beyond what is worth waiting for. That is for bursts: while much more is asked
    than the engine can do, no more may wait than keeps it busy, since a longer queue would answer nobody more.
    """

    in_flight: int = 512
    batch_tokens: int = 16_384
    batch_seconds: float = 0.02
    wait: float = 0.2


@dataclass(eq=False)
class Request:
    """Texts that are answered together. lengths: of each text in tokens. payload: the caller's own. state: waiting,
    then done, left, expired or failed.
    """

    lengths: Sequence[int]
    deadline: float
    payload: Any = None
    state: str = "waiting"
    _unfinished: int = 0


@dataclass(frozen=True)
class Batch:
    """items: (request, which of its texts). tokens: of all of them. began: when."""

    items: list[tuple[Request, int]]
    tokens: int
    began: float


@dataclass(order=True)
class _Waiting:
    """A text in the queue. finish: when it would be done if its request had the engine alone."""

    finish: float
    number: int
    request: Request = field(compare=False)
    index: int = field(compare=False)


class Batcher:
    """Every request ends once: it is returned by `done`, `failed`, `all_failed` or `expired`, or its caller told
    `leave`.

    The order is one rule for single texts and for many: a text is due when it would be done if its request had the
    engine to itself. So a short text does not wait for all of a long request that came just before it, and a long one
    is passed only by what comes while it would have run.
    """

    def __init__(self, limits: Limits | None = None, *, seconds_per_token: float = 1e-4):
        """seconds_per_token: of the engine, a first guess, which every batch corrects."""
        self.limits = limits or Limits()
        self._rate = seconds_per_token
        self._queue: list[_Waiting] = []  # sorted
        self._running: Batch | None = None
        self._requests: set[Request] = set()
        self._number = 0
        self._asked, self._asked_at = 0.0, 0.0  # seconds of work left if an engine HOPELESS times as fast had it all
        self._calm_at = 0.0  # when that was last 0
        self._spare = 0.0  # seconds of work that may wait in overload, beside a batch

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._queue)

    @property
    def seconds_per_token(self) -> float:
        """The engine's speed, as far as it is known."""
        return self._rate

    def admit(self, lengths: Sequence[int], now: float, *, deadline: float = math.inf, payload: Any = None) -> Request:
        """Takes a request of at least one text into the queue. deadline: when its answer is of no use any more.

        Raises Refused if too many requests are in flight, if it would probably wait too long, or if it would probably
        miss its deadline. An engine that has nothing to do takes every request: only by work can its speed be known.
        """
        before, wait = self._before(_cost(lengths[0]), now)
        standing = self._is_standing(sum(map(_cost, lengths)), now)
        if self.in_flight >= self.limits.in_flight:
            raise Refused(f"{self.limits.in_flight} requests are in flight", max(wait - self.limits.wait, 0.0))
        if wait > self.limits.wait:
            raise Refused(f"it would wait {wait:.3f} s, longer than {self.limits.wait:g}", wait - self.limits.wait)
        if not standing:
            self._spare = 0.0
        elif self._running is None and not self._queue:
            self._spare = min(self._spare + SPARED * self.limits.batch_seconds, self.limits.wait)
        elif before and self._rate * (before + _cost(lengths[0])) > self.limits.batch_seconds + self._spare:
            raise Refused("more is asked than the engine can do", self.limits.wait)
        whole = self._before(sum(map(_cost, lengths)), now)[1] + self._rate * sum(map(_cost, lengths))
        if now + whole > deadline and self._requests:
            raise Refused(f"it would take {whole:.3f} s, longer than it may", now + whole - deadline)
        request = Request(lengths, deadline, payload, _unfinished=len(lengths))
        self._requests.add(request)
        cost = 0
        for index, length in enumerate(lengths):
            cost += _cost(length)
            bisect.insort(self._queue, _Waiting(now + self._rate * cost, self._number, request, index))
            self._number += 1
        return request

    def _before(self, cost: int, now: float) -> tuple[int, float]:
        """(the cost of what waits before a text that has so much before it and of itself in its request, the seconds
        after which it would probably begin).
        """
        due = now + self._rate * cost
        before = 0
        for text in self._queue:
            if text.finish > due:
                break
            before += _cost(text.request.lengths[text.index])
        return before, self._remaining(now) + self._rate * before

    def _is_standing(self, cost: int, now: float) -> bool:
        """Whether much more has been asked for than the engine can do, for longer than a burst lasts. Counts a request
        of this cost, whether or not it will be refused: what is admitted says nothing of what is asked.
        """
        self._asked = max(0.0, self._asked - HOPELESS * (now - self._asked_at))
        self._asked_at = now
        if self._asked == 0.0:
            self._calm_at = now
        self._asked = min(self._asked + self._rate * cost, self.limits.wait)
        return now - self._calm_at > STANDING

    def _remaining(self, now: float) -> float:
        if self._running is None:
            return 0.0
        return max(0.0, self._running.began + self._rate * _cost_of(self._running) - now)

    def next(self, now: float) -> Batch | None:
        """Begins a batch of the texts that are due first; None if there are none or one is running."""
        if self._running is not None or not self._queue:
            return None
        items: list[tuple[Request, int]] = []
        tokens = cost = 0
        for text in self._queue:
            length = text.request.lengths[text.index]
            long = self._rate * (cost + _cost(length)) > self.limits.batch_seconds
            if items and (long or tokens + length > self.limits.batch_tokens):
                break
            items.append((text.request, text.index))
            tokens, cost = tokens + length, cost + _cost(length)
        del self._queue[: len(items)]
        self._running = Batch(items, tokens, now)
        return self._running

    def done(self, now: float) -> list[Request]:
        """Ends the batch that is running, and learns from its time. Returns the requests whose texts are all done."""
        batch = self._end()
        measured = min((now - batch.began) / _cost_of(batch), SUDDEN * self._rate)
        self._rate = max(self._rate + RATE_MEMORY * (measured - self._rate), 1e-9)
        self._spare *= 1 - FORGOTTEN
        complete = []
        for request, _ in batch.items:
            request._unfinished -= 1
            if request._unfinished == 0 and request.state == "waiting":
                complete.append(request)
                self._close(request, "done")
        return complete

    def failed(self) -> list[Request]:
        """Ends the batch that is running, of which nothing came: returns its requests, which end with it. The queue
        stays.
        """
        batch = self._end()
        lost = [request for request in dict.fromkeys(r for r, _ in batch.items) if request.state == "waiting"]
        for request in lost:
            self._close(request, "failed")
        self._sweep()
        return lost

    def all_failed(self) -> list[Request]:
        """Ends all requests, and returns them. What of them is running runs on."""
        lost = list(self._requests)
        for request in lost:
            self._close(request, "failed")
        self._sweep()
        return lost

    def expired(self, now: float) -> list[Request]:
        """Ends the requests whose deadline has passed, and returns them. What of them is running runs on."""
        late = [request for request in self._requests if request.deadline < now]
        for request in late:
            self._close(request, "expired")
        if late:
            self._sweep()
        return late

    def leave(self, request: Request) -> None:
        """Ends a request whose caller does not want the answer any more. What of it is running runs on. One that has
        ended stays as it is.
        """
        if request.state == "waiting":
            self._close(request, "left")
            self._sweep()

    def _end(self) -> Batch:
        if self._running is None:
            raise RuntimeError("no batch is running")
        batch, self._running = self._running, None
        return batch

    def _close(self, request: Request, state: str) -> None:
        request.state = state
        self._requests.remove(request)

    def _sweep(self) -> None:
        """Takes the texts of requests that have ended out of the queue."""
        self._queue = [text for text in self._queue if text.request.state == "waiting"]


def _cost(length: int) -> int:
    return length + ITEM_COST


def _cost_of(batch: Batch) -> int:
    return batch.tokens + ITEM_COST * len(batch.items)
