"""Who attacks: this process, or worker processes beside it."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from sparsebert.engine.classifier import Classifier
from sparsebert.errors import SparsebertWarning
from sparsebert.robustness.attacks.plan import Done, Plan, Unit, Victim, attacked, plans
from sparsebert.robustness.attacks.recipes import named

TICK = 5.0  # seconds
UNITS = 32  # examples that a worker gets at a time
_work: tuple[Victim, Plan] | None = None  # of a worker process


@contextmanager
def of(victim: Victim, plan: Plan, tick: Callable[[], None]) -> Iterator[Callable[[Iterable[Unit]], Iterator[Done]]]:
    """A function that attacks units as `attacked` does, by as many processes as the plan's config says; each has its
    share of the cores. If one of them is killed, this process goes on alone. tick: is called every few seconds.
    """
    workers = plan.config.workers
    if workers == 1:
        yield lambda units: attacked(victim, plan, units, tick=tick)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    spec = (
        str(victim.classifier.directory), victim.classifier.device, victim.task, victim.order, victim.temperature,
        plan.recipe.name, plan.config, workers, context.Value("i", 0),
    )  # fmt: skip
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=spec)
    broken = False

    def work(units: Iterable[Unit]) -> Iterator[Done]:
        nonlocal broken
        coming = iter(units)
        if not broken:
            try:
                yield from _shared(pool, workers, coming, tick)
            except BrokenProcessPool:
                broken = True
                warnings.warn("a worker was killed; the work goes on without workers", SparsebertWarning, stacklevel=2)
        yield from attacked(victim, plan, coming, tick=tick)

    try:
        yield work
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _shared(
    pool: ProcessPoolExecutor, workers: int, coming: Iterator[Unit], tick: Callable[[], None]
) -> Iterator[Done]:
    running: set[Future] = set()
    while True:
        while len(running) < workers and (block := list(islice(coming, UNITS))):
            running.add(pool.submit(_attack, block))
        if not running:
            return
        done, running = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
        tick()
        for future in done:
            yield from future.result()


def _begin(directory, device, task, order, temperature, recipe, config, workers, started) -> None:
    """Makes a new process ready to attack."""
    global _work
    with started.get_lock():
        number = started.value
        started.value += 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % workers :: workers] or cores)
    victim = Victim(Classifier.load(directory, device), task, order, temperature)
    (plan,) = plans(named(recipe), config, task)
    _work = (victim, plan)


def _attack(units: list[Unit]) -> list[Done]:
    return list(attacked(*_work, units))
