"""Who attacks: this process, worker processes beside it, or actors on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Protocol

from sparsebert.engine.classifier import Classifier
from sparsebert.errors import SparsebertWarning
from sparsebert.robustness.attacks.plan import Done, Plan, Unit, Victim, attacked, plans
from sparsebert.robustness.attacks.recipes import named

TICK = 5.0  # seconds
UNITS = 32  # examples that a worker gets at a time

Work = Callable[[Iterable[Unit]], Iterator[Done | None]]
Told = Done | None  # by a worker: an example that has ended; None: all that it was given have ended


class Lost(Exception):
    """A worker is not there any more."""


class Workers(Protocol):
    """Workers by number, each of which attacks what it is given and tells of each example when it ends. It does not run
    ahead of what is heard, so that a kill loses few ended examples.
    """

    def give(self, number: int, units: list[Unit]) -> None: ...

    def told(self, numbers: Sequence[int]) -> list[int]:
        """Those of these workers that have something to tell; waits TICK seconds at most. What was heard before is in
        the ledger by now.
        """

    def hear(self, number: int) -> Told:
        """What one of them has to tell; raises Lost if it was killed."""

    def close(self) -> None: ...


@contextmanager
def of(victim: Victim, plan: Plan) -> Iterator[Work]:
    """A function that attacks units as `attacked` does, by as many workers as the plan's config says. What a worker
    that is killed leaves is done by the others, and by this process once there are none. It yields None every few
    seconds at least.
    """
    config = plan.config
    if config.workers == 1 and not config.ray:
        yield lambda units: attacked(victim, plan, units)
        return
    workers: Workers | None = None  # until there is work
    idle = list(range(config.workers))

    def work(units: Iterable[Unit]) -> Iterator[Done | None]:
        nonlocal workers
        coming = iter(units)
        left: dict[int, dict[int, Unit]] = {}  # worker -> example -> unit that it was given and has not ended
        while True:
            while idle and (block := list(islice(coming, UNITS))):
                workers = workers or _workers(victim, plan)
                number = idle.pop()
                workers.give(number, block)
                left[number] = {unit[0]: unit for unit in block}
            if not left:
                break
            for number in workers.told(list(left)):
                try:
                    row = workers.hear(number)
                except Lost:
                    warnings.warn("a worker was killed; the work goes on without it", SparsebertWarning, stacklevel=2)
                    coming = chain(left.pop(number).values(), coming)
                    continue
                if row is None:
                    del left[number]
                    idle.append(number)
                    continue
                del left[number][row[0]]
                yield row
            yield None
        yield from attacked(victim, plan, coming)  # there is something only if no worker is left

    try:
        yield work
    finally:
        if workers is not None:
            workers.close()


def _workers(victim: Victim, plan: Plan) -> Workers:
    if not plan.config.ray:
        return Processes(victim, plan)
    from sparsebert.robustness.attacks import ray_actors  # of an extra

    return ray_actors.Actors(victim, plan)


class Processes:
    """Worker processes on this machine; each has its share of the cores. After each example it waits until that was
    heard and `told` is asked again: the row is in the ledger then, so that a kill loses one ended example of each.
    """

    def __init__(self, victim: Victim, plan: Plan):
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        classifier, count = victim.classifier, plan.config.workers
        spec = (str(classifier.directory), classifier.device, victim.task, victim.order, victim.temperature)
        self._pipes, self._processes, self._heard = [], [], []
        for number in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, (number, count), *spec, plan.recipe.name, plan.config)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that a read of ours ends when the process does
            self._pipes.append(ours)
            self._processes.append(process)

    def give(self, number: int, units: list[Unit]) -> None:
        self._send(number, units)

    def _send(self, number: int, what: list[Unit] | None) -> None:
        try:
            self._pipes[number].send(what)
        except OSError:  # it was killed while it waited; `hear` will say so
            pass

    def told(self, numbers: Sequence[int]) -> list[int]:
        for number in self._heard:
            self._send(number, None)
        self._heard = []
        ready = wait([self._pipes[number] for number in numbers], TICK)
        return [number for number in numbers if self._pipes[number] in ready]

    def hear(self, number: int) -> Told:
        try:
            row = self._pipes[number].recv()
        except (EOFError, OSError) as error:
            raise Lost from error
        if row is not None:
            self._heard.append(number)
        return row

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()


def _serve(pipe, share, directory, device, task, order, temperature, recipe, config) -> None:
    """The work of one process, until the other end of its pipe is closed. share: (its number, of how many)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began it is interrupted, and ends it
    number, count = share
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % count :: count] or cores)
    victim = Victim(Classifier.load(directory, device), task, order, temperature)
    (plan,) = plans(named(recipe), config, task)
    try:
        while True:
            for row in filter(None, attacked(victim, plan, pipe.recv())):
                pipe.send(row)
                pipe.recv()  # once it is in the ledger
            pipe.send(None)
    except (EOFError, OSError):
        return
