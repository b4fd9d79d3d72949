"""Runs many attacks in lock-step: what they ask at one time becomes one batch of each model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

from sparsebert.errors import SparsebertError, first_line
from sparsebert.robustness.attacks.attack import Attack, Question, Scored

WIDTH = 128  # attacks that advance together
# What one example may cause that is no reason to stop the others.
_FAULTS = (
    SparsebertError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Model = Callable[[list], Sequence]


@dataclass
class Finished:
    """The end of an attack. outcome: skipped, succeeded, failed or error. last: the last text; None after an error.
    error: its first line.
    """

    attack: Attack
    outcome: str
    last: Scored | None
    error: str | None = None


def run(
    attacks: Iterable[Attack],
    models: dict[str, Model],
    *,
    width: int = WIDTH,
    seconds: float | None = None,
) -> Iterator[Finished | None]:
    """Runs the attacks and yields each when it ends, and None before every wait for the models, which may take a while.
    Which end first depends on `width`; how they end does not.

    The attacks are in two halves: while the models, in a thread of their own, answer one, the other goes on to its next
    questions. models: by the name in Question.model: a function from a list of items to a row for each. seconds: time
    that an attack may take; it is charged for the rounds that it takes part in, by its share of their items. An attack
    that takes longer ends as failed, with `capped` = "seconds". An error of one attack ends that attack alone.
    """
    coming = iter(attacks)
    rounds: deque[tuple[list, int, Future]] = deque()  # what waits for answers, its size when full, the answers
    worker = ThreadPoolExecutor(1, "attacked models")
    try:
        first = list(islice(coming, width))
        middle = (len(first) + 1) // 2
        for half in (first[:middle], first[middle:]):
            waiting: list[tuple[Attack, Iterator, Question]] = []
            yield from _join(chain(half, coming), waiting, len(half))
            if waiting:
                rounds.append((waiting, len(half), worker.submit(_answers, waiting, models)))
        while rounds:
            yield None
            round_, most, answers = rounds.popleft()
            waiting = []
            for (attack, steps, _), answer in zip(round_, answers.result(), strict=True):
                if isinstance(answer, str):
                    yield Finished(attack, "error", None, answer)
                elif (finished := _advance(attack, steps, answer, waiting)) is not None:
                    yield finished
                elif seconds is not None and attack.seconds > seconds:  # it knows of its original by now
                    waiting.pop()
                    steps.close()
                    attack.capped = "seconds"
                    yield Finished(attack, "failed", attack.start)
            yield from _join(coming, waiting, most)
            if waiting:
                rounds.append((waiting, most, worker.submit(_answers, waiting, models)))
    finally:
        worker.shutdown(cancel_futures=True)


def _join(coming: Iterator[Attack], waiting: list, most: int) -> Iterator[Finished]:
    """Begins attacks until `most` are waiting, or none is left. Yields those that have ended by then."""
    while len(waiting) < most and (attack := next(coming, None)) is not None:
        if (finished := _advance(attack, attack.run(), None, waiting)) is not None:
            yield finished


def _advance(attack: Attack, steps, answer, waiting: list) -> Finished | None:
    """Goes on to the attack's next question, which joins `waiting`, or to its end."""
    try:
        waiting.append((attack, steps, steps.send(answer)))
    except StopIteration as end:
        return Finished(attack, *end.value)
    except _FAULTS as error:
        return Finished(attack, "error", None, first_line(error))
    return None


def _answers(round_: list, models: dict[str, Model]) -> list[Sequence | str]:
    """For each attack the rows that it asked for, or an error's first line. Equal items are asked once."""
    answers: dict[int, Sequence | str] = {}
    for name in dict.fromkeys(question.model for _, _, question in round_):
        asking = [
            (i, attack, question.items) for i, (attack, _, question) in enumerate(round_) if question.model == name
        ]
        items = list(dict.fromkeys(item for _, _, part in asking for item in part))
        start = time.perf_counter()
        try:
            found = dict(zip(items, models[name](items), strict=True))
        except _FAULTS:  # find out whose item it is
            found = None
        for i, _, part in asking:
            if found is not None:
                answers[i] = [found[item] for item in part]
            else:
                try:
                    answers[i] = list(models[name](part))
                except _FAULTS as error:
                    answers[i] = first_line(error)
        share = (time.perf_counter() - start) / sum(len(part) for _, _, part in asking)
        for _, attack, part in asking:
            attack.seconds += share * len(part)
    return [answers[i] for i in range(len(round_))]
