"""What a command shows: tables for people and one JSON document last on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 5.0  # between progress lines where stderr is no terminal


def emit(document: dict) -> None:
    """Prints the command's result as one line of JSON, the last thing on stdout."""
    print(json.dumps(document, allow_nan=False), flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table on stdout; columns after the first are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # plain: a path may look like markup
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that shows `label`, the share done and the time left: a bar on a terminal, else a line
    every few seconds.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(label)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _plain(label: str) -> Callable[[int, int], None]:
    start = time.monotonic()
    shown = start
    first: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal shown, first
        now = time.monotonic()
        first = done if first is None else first  # a resumed run starts above 0: time left counts from there
        if now - shown < PLAIN_SECONDS and (done < total or shown == start):
            return
        shown = now
        left = (now - start) / max(1, done - first) * (total - done)
        print(
            f"{label}: {done}/{total}, {_clock(now - start)} elapsed, {_clock(left)} left", file=sys.stderr, flush=True
        )

    return update


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
