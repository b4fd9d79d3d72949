"""Runs many attacks in lock-step: what they ask at one time becomes one batch of each model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Runs the attacks and yields each when it ends, and None before every round, which may take a while. Which end
    first depends on `width`; how they end does not.

    models: by the name in Question.model: a function from a list of items to a row for each. seconds: time that an
    attack may take; it is charged for the rounds that it takes part in, by its share of their items. An attack
    that takes longer ends as failed, with `capped` = "seconds". An error of one attack ends that attack alone.
    """
    coming = iter(attacks)
    waiting: list[tuple[Attack, Iterator, Question]] = []
    while True:
        for attack in islice(coming, width - len(waiting)):
            if (finished := _advance(attack, attack.run(), None, waiting)) is not None:
                yield finished
        if not waiting:
            if (attack := next(coming, None)) is None:
                return
            coming = chain([attack], coming)
            continue
        yield None
        round_, waiting = waiting, []
        for attack, steps, answer in _answered(round_, models):
            if isinstance(answer, str):
                yield Finished(attack, "error", None, answer)
            elif (finished := _advance(attack, steps, answer, waiting)) is not None:
                yield finished
            elif seconds is not None and attack.seconds > seconds:  # it knows of its original by now
                waiting.pop()
                steps.close()
                attack.capped = "seconds"
                yield Finished(attack, "failed", attack.start)


def _advance(attack: Attack, steps, answer, waiting: list) -> Finished | None:
    """Goes on to the attack's next question, which joins `waiting`, or to its end."""
    try:
        waiting.append((attack, steps, steps.send(answer)))
    except StopIteration as end:
        return Finished(attack, *end.value)
    except _FAULTS as error:
        return Finished(attack, "error", None, first_line(error))
    return None


def _answered(round_: list, models: dict[str, Model]) -> Iterator[tuple[Attack, Iterator, Sequence | str]]:
    """(attack, its steps, the rows it asked for, or an error's first line). Equal items are asked once."""
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
    for i, (attack, steps, _) in enumerate(round_):
        yield attack, steps, answers[i]
