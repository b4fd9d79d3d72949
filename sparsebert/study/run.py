"""Runs the cells of a study with a ledger. A study that is killed and started again continues with the cell that it was
at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebert.config import Settings
from sparsebert.encoders import Progress, no_progress
from sparsebert.environment import that_matter
from sparsebert.errors import InputError
from sparsebert.jobs import Ledger, place, require_place
from sparsebert.machine import card


@dataclass
class Outcome:
    """done: finished cells with their figures, in the grid's order, including those of earlier runs and other shards.
    left_out: unfinished cells, for which there was no time or which belong to other shards.
    """

    done: list[tuple[Any, dict]] = field(default_factory=list)
    left_out: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """What `run_cells` asks of a study.

    kind: of its units in the ledger. cells: each with everything that decides its result, in the order in which they
    are run, the most important first. compute: (cell, progress), returns the figures of a cell. code: the hash of the
    code that computes it. group: what cells of one shard share, such as a fine-tuned model. alike: the fields on which
    the time of a cell mainly depends. guess: seconds that a cell probably takes, for one like which none was run.
    """

    kind: str
    cells: Sequence[tuple[Any, dict]]
    compute: Callable[[Any, Progress], dict]
    code: str
    group: Callable[[Any], tuple]
    alike: Callable[[Any], tuple]
    guess: Callable[[Any], float] = lambda cell: 0.0


def run_cells(
    study: Study,
    output: Path,
    *,
    hours: float | None = None,
    shard: tuple[int, int] = (0, 1),
    only: Callable[[Any], bool] = lambda cell: True,
    others: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Runs the unfinished cells of a study in the folder `output`; the ledger is `output`/units.sqlite.

    The code that computed a cell is recorded with it (`code`) but is not part of its key, because a grid takes longer
    to run than a version of the code lasts.

    hours: a cell that would probably end later is not begun, estimated from how long similar cells took.
    shard: (i, n), every n-th group, from the i-th on. only: which cells to run.
    others: cells.jsonl of other runs, whose cells are taken over; `output`/cells.jsonl is written after each cell.
    overwrite: replace a damaged ledger by a new one, filled from its cells.jsonl.
    """
    start = time.monotonic()
    output = place(output)
    require_place(output)
    book = Ledger(output / "units.sqlite", overwrite=overwrite)
    own = output / "cells.jsonl"
    for path in [*([own] if own.exists() else []), *others]:
        book.take_over(path)
    groups = list(dict.fromkeys(study.group(cell) for cell, _ in study.cells))
    cells = [cell for cell, _ in study.cells]
    mine = [cell for cell in cells if groups.index(study.group(cell)) % shard[1] == shard[0] and only(cell)]
    outcome = Outcome()
    took: dict[tuple, list[float]] = {}
    done = 0
    for cell, inputs in study.cells:
        stored = book.get(study.kind, inputs)
        if stored is not None:
            took.setdefault(study.alike(cell), []).append(stored["seconds"])
        if cell not in mine:
            if stored is None:
                outcome.left_out.append(cell)
            else:
                outcome.done.append((cell, stored))
            continue
        if stored is None and hours is not None:
            guess = max(took.get(study.alike(cell)) or [study.guess(cell)])
            if time.monotonic() - start + guess > hours * 3600:
                outcome.left_out.append(cell)
                continue
        if stored is None:

            def compute(cell=cell) -> dict:
                begin = time.perf_counter()
                figures = study.compute(cell, progress)
                return {
                    **figures,
                    "seconds": time.perf_counter() - begin,
                    "code": study.code,
                    "machine": card()["cpu"],
                    "environment": that_matter(),
                }

            stored = book.once(study.kind, inputs, compute)
            took.setdefault(study.alike(cell), []).append(stored["seconds"])
            book.export(own)
        outcome.done.append((cell, stored))
        done += 1
        progress(done, len(mine), "cells")
    book.close()
    return outcome


def read_only(filters: Sequence[str], cells: Sequence[Settings]) -> Callable[[Settings], bool]:
    """Whether a cell passes all of the filters, `field=value` or `field=value,value`. InputError for a field or a value
    that none of `cells` has, and if none of them passes.
    """
    wanted, fields = [], list(type(cells[0]).model_fields)
    for text in filters:
        name, found, values = text.partition("=")
        if not found or name not in fields:
            raise InputError(
                f"only must be FIELD=VALUE,… of {', '.join(fields)}, got {text!r}", fix=f"write {fields[0]}=VALUE"
            )
        had = {_told(getattr(cell, name)) for cell in cells}
        asked = {values} if values in had else set(values.split(","))
        if asked - had:
            raise InputError(
                f"only: no cell has {name}={min(asked - had)}", fix=f"choose from {', '.join(sorted(had))}"
            )
        wanted.append((name, asked))

    def passes(cell: Settings) -> bool:
        return all(_told(getattr(cell, name)) in values for name, values in wanted)

    if not any(passes(cell) for cell in cells):
        raise InputError(f"only: no cell has all of {', '.join(filters)}", fix="leave one of them out")
    return passes


def _told(value) -> str:
    """A value as a grid file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
