"""The queue in front of an engine: a state machine with a clock of its own, and simulated load."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsebert.serving.batcher import ITEM_COST, Batcher, Limits, Refused, Request

LIMITS = Limits(in_flight=6, batch_tokens=100, batch_seconds=0.09, wait=0.2)
RATE = 1e-3  # seconds per token: a batch of 90 tokens may run, and 200 may wait
TEXTS = st.lists(st.integers(2, 120), min_size=1, max_size=5)


class Queue(RuleBasedStateMachine):
    """Every request ends once, and every text of one that is done ran once."""

    @initialize()
    def begin(self):
        self.batcher, self.now, self.batch = Batcher(LIMITS, seconds_per_token=RATE), 0.0, None
        self.open: list[Request] = []
        self.ended: dict[Request, str] = {}
        self.ran: dict[Request, list[int]] = {}
        self.begun: dict[Request, list[int]] = {}

    def ends(self, requests: list[Request], state: str):
        for request in requests:
            assert request.state == state and request not in self.ended
            self.ended[request] = state
            self.open.remove(request)

    @rule(lengths=TEXTS, patience=st.sampled_from([math.inf, 0.01, 0.5]))
    def admit(self, lengths, patience):
        before = (self.batcher.in_flight, self.batcher.waiting)
        try:
            request = self.batcher.admit(lengths, self.now, deadline=self.now + patience)
        except Refused as refused:
            assert refused.retry_after >= 0 and str(refused)
            assert (self.batcher.in_flight, self.batcher.waiting) == before
            assert self.open or self.batch is not None, "an engine that has nothing to do takes every request"
            return
        self.open.append(request)
        self.ran[request], self.begun[request] = [], []

    @rule(seconds=st.floats(0.001, 0.3))
    def wait(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data):
        request = data.draw(st.sampled_from(self.open))
        self.batcher.leave(request)
        self.batcher.leave(request)  # once more changes nothing
        self.ends([request], "left")

    @rule()
    def expire(self):
        late = self.batcher.expired(self.now)
        assert all(request.deadline < self.now for request in late)
        self.ends(late, "expired")
        assert not any(request.deadline < self.now for request in self.open)

    @rule()
    def next(self):
        waiting, batch = self.batcher.waiting, self.batcher.next(self.now)
        assert (batch is None) == (self.batch is not None or waiting == 0)
        if batch is None:
            return
        lengths = [request.lengths[i] for request, i in batch.items]
        assert batch.tokens == sum(lengths) and batch.began == self.now
        probably = self.batcher.seconds_per_token * sum(length + ITEM_COST for length in lengths)
        assert len(lengths) == 1 or (batch.tokens <= LIMITS.batch_tokens and probably <= LIMITS.batch_seconds)
        for request, i in batch.items:
            assert request in self.open and i not in self.begun[request], "only what is waited for, and once"
            self.begun[request].append(i)
        self.batch = batch

    @precondition(lambda self: self.batch)
    @rule()
    def done(self):
        batch, self.batch = self.batch, None
        for request, i in batch.items:
            self.ran[request].append(i)
        complete = self.batcher.done(self.now)
        assert all(sorted(self.ran[request]) == list(range(len(request.lengths))) for request in complete)
        self.ends(complete, "done")
        assert not any(len(self.ran[request]) == len(request.lengths) for request in self.open)

    @precondition(lambda self: self.batch)
    @rule()
    def fail(self):
        batch, self.batch = self.batch, None
        lost = self.batcher.failed()
        self.ends(lost, "failed")
        assert not any(request in self.open for request, _ in batch.items)

    @invariant()
    def counts(self):
        if not hasattr(self, "batcher"):
            return
        assert self.batcher.in_flight == len(self.open) <= LIMITS.in_flight
        waited = sum(len(request.lengths) - len(self.begun[request]) for request in self.open)
        assert self.batcher.waiting == waited
        assert self.batcher.seconds_per_token > 0

    def teardown(self):
        """Without new requests all end."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(1000):
            if self.batch is not None:
                self.now += 0.01
                self.done()
            self.next()
            if self.batch is None:
                break
        assert self.batcher.in_flight == 0 and self.batcher.waiting == 0


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# --- load, by simulation ----------------------------------------------------------------------------------------------


class Answers:
    """What a load got: seconds from arrival to answer of those that were admitted, by kind; and the refused."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}
        self.refused = 0

    def p99(self, kind: str = "") -> float:
        found = sorted(self.seconds[kind])
        return found[min(len(found) - 1, int(0.99 * len(found)))]

    @property
    def answered(self) -> int:
        return sum(map(len, self.seconds.values()))


def load(batcher: Batcher, arrivals: list[tuple[float, list[int], str]], seconds) -> Answers:
    """Drives the queue with an engine that takes seconds(batch)."""
    events = [(when, i, (lengths, kind)) for i, (when, lengths, kind) in enumerate(arrivals)]
    heapq.heapify(events)
    found, number = Answers(), len(events)
    while events:
        now, _, event = heapq.heappop(events)
        if event is None:
            for request in batcher.done(now):
                began, kind = request.payload
                found.seconds.setdefault(kind, []).append(now - began)
        else:
            try:
                batcher.admit(event[0], now, payload=(now, event[1]))
            except Refused:
                found.refused += 1
        if (batch := batcher.next(now)) is not None:
            number += 1
            heapq.heappush(events, (now + seconds(batch), number, None))
    return found


def poisson(rate: float, until: float, lengths, kind: str = "", seed: int = 0) -> list[tuple[float, list[int], str]]:
    draw, when, made = random.Random(seed), 0.0, []
    while (when := when + draw.expovariate(rate)) < until:
        made.append((when, lengths(draw), kind))
    return made


def constant(rate: float, until: float) -> list[tuple[float, list[int], str]]:
    return [(i / rate, [20], "") for i in range(int(rate * until))]


def fixed(batch) -> float:
    """An engine that answers 50 texts a second, however long they are."""
    return 0.02 * len(batch.items)


def equal(draw: random.Random) -> list[int]:
    return [20]


def short(draw: random.Random) -> list[int]:
    return [draw.randint(5, 50)]


@pytest.mark.parametrize("times", [2, 3, 10])
@pytest.mark.parametrize("arrivals", ["random", "random and equal", "constant"])
def test_under_overload_those_who_are_admitted_wait_little_longer_and_the_engine_does_not_idle(times, arrivals):
    def asked(rate: float, until: float) -> list[tuple[float, list[int], str]]:
        if arrivals == "constant":
            return constant(rate, until)
        return poisson(rate, until, short if arrivals == "random" else equal)

    calm = load(batcher := Batcher(), asked(40, 120), fixed)
    assert calm.refused <= 0.02 * calm.answered
    busy = load(batcher, [(120 + when, *rest) for when, *rest in asked(50 * times, 60)], fixed)
    assert busy.p99() <= 2.05 * calm.p99()
    assert busy.answered >= 0.95 * 50 * 60, "goodput"
    assert busy.refused > (times - 1) * 0.9 * 50 * 60


def test_random_arrivals_just_below_the_speed_of_the_engine_are_bursts_not_overload():
    near = load(Batcher(), poisson(47.5, 120, short), fixed)
    assert near.answered > 0.9 * 50 * 120 * 0.95 and near.p99() > 0.15, "the queue may grow to what is worth waiting"


def test_after_an_overload_all_are_admitted_again_within_a_second():
    load(batcher := Batcher(), constant(500, 10), fixed)
    assert load(batcher, [(11 + when, *rest) for when, *rest in constant(40, 10)], fixed).refused == 0


def test_a_wrong_first_guess_of_the_speed_is_corrected():
    for guess in (1e-6, 1e-1):
        found = load(Batcher(seconds_per_token=guess), poisson(100, 60, short, seed=2), fixed)
        assert found.answered >= 0.93 * 50 * 60 and found.p99() < 0.6


def test_a_batch_that_hung_does_not_refuse_all_that_come_after_it():
    slow = iter([30.0])
    found = load(Batcher(), poisson(20, 120, short, seed=5), lambda batch: next(slow, fixed(batch)))
    assert found.refused < 20 * 30 * 1.3, "those that came while it hung, and few more"


def test_single_texts_do_not_wait_for_all_of_a_long_request():
    def ragged(batch) -> float:
        return 1e-4 * batch.tokens

    many = poisson(2, 60, lambda draw: [128] * 32, "many", seed=3)  # 0.41 s of the engine each
    singles = poisson(20, 60, short, "single", seed=4)
    found = load(Batcher(), [*many, *singles], ragged)
    assert found.p99("single") < 0.25 < found.p99("many") and found.refused < 0.2 * len(singles)
    assert len(found.seconds["many"]) > 0.5 * len(many), "and they are not starved"


def test_a_text_longer_than_a_batch_runs_alone():
    batcher = Batcher(Limits(batch_tokens=100))
    batcher.admit([500, 20], 0.0)
    assert [i for _, i in batcher.next(0.0).items] == [0]
    assert batcher.done(0.1) == []
    assert [i for _, i in batcher.next(0.1).items] == [1]


def test_what_left_is_not_run_and_what_runs_ends_nobody():
    batcher = Batcher(Limits(batch_tokens=10))
    one, two = batcher.admit([10, 10], 0.0), batcher.admit([10], 0.0)
    batcher.next(0.0)
    batcher.leave(one)
    assert batcher.waiting == 1 and batcher.done(0.1) == [] and batcher.in_flight == 1
    assert [request for request, _ in batcher.next(0.1).items] == [two]


def test_a_refusal_says_when_to_come_again():
    batcher = Batcher(Limits(in_flight=2, wait=0.1), seconds_per_token=1e-3)
    batcher.admit([200], 0.0)
    with pytest.raises(Refused, match=r"it would take .*, longer than it may"):
        batcher.admit([10], 0.0, deadline=0.01)
    batcher.admit([10], 0.0)
    with pytest.raises(Refused, match="2 requests are in flight"):
        batcher.admit([10], 0.0)
    batcher = Batcher(Limits(wait=0.1), seconds_per_token=1e-3)
    batcher.admit([192], 0.0)
    batcher.next(0.0)
    with pytest.raises(Refused, match=r"it would wait 0\.200 s") as refused:
        batcher.admit([10], 0.0)
    assert refused.value.retry_after == pytest.approx(0.1)
    batcher.admit([10], 0.11)


def test_only_a_batch_that_runs_can_end():
    with pytest.raises(RuntimeError, match="no batch is running"):
        Batcher().done(0.0)
