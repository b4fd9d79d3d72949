"""What a command prints: tables for people, a JSON document for programs, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsebert.errors import quoted, shown

if TYPE_CHECKING:
    from sparsebert.config import TaskConfig
    from sparsebert.encoders import Progress

PLAIN_SECONDS = 5.0  # between progress lines where stderr is no terminal


def emit(document: dict, asked: bool) -> None:
    """Prints the command's result as one line of JSON, the last line of stdout, if --json asked for it or stdout is no
    terminal.
    """
    if asked or not sys.stdout.isatty():
        print(json.dumps(document, allow_nan=False), flush=True)


def say_what_was_read(result) -> None:
    """Says on stderr how the user's own files were read, what was left out, and what share of the texts was cut.
    result: of `train`, `prune_checkpoint` or `evaluate`.
    """
    if result.rows is not None:
        counts = ", ".join(f"{count:,} of {split}" for split, count in result.rows.items() if isinstance(count, int))
        how = f", split by a {result.rows['split']}" if result.rows["split"] != "files" else ""
        print(f"rows read: {counts}{how}, of columns {_listed(result.rows['columns'])}", file=sys.stderr)
    if getattr(result, "resumed", ""):
        print(f"resumed an earlier run, which had got up to {result.resumed}", file=sys.stderr)
    if getattr(result, "left_out", 0):
        print(f"texts left out because they are in what is reported: {result.left_out:,}", file=sys.stderr)
    if domains := getattr(result, "domains", None):
        splits = " or ".join(next(iter(domains.values()))["apart_from"])
        of = {name: domain["rows"] for name, domain in domains.items()}
        read = [name + (f" (columns {_listed(rows['columns'])})" if rows else "") for name, rows in of.items()]
        print(f"domains: {', '.join(read)}; without what is in {result.task}, {splits}, too", file=sys.stderr)
    if result.cut:
        print(f"{result.cut:.1%} of the texts were cut at {result.max_length} tokens (--max-length)", file=sys.stderr)


def _listed(columns: list[str]) -> str:
    return ", ".join(map(shown, columns))


def then(*command: object) -> None:
    """Names the command that people would type next, quoted for a shell. A Path is never taken for a flag, nor for a
    task or model that is known by its name.
    """
    from sparsebert.checkpoint import PACKAGED
    from sparsebert.data import TASKS

    def said(part: object) -> str:
        taken = isinstance(part, Path) and (str(part).startswith("-") or str(part) in (*TASKS, PACKAGED))
        return f"./{part}" if taken else str(part)

    parts = map(said, command)
    print(f"next: {' '.join(map(quoted, parts))}", file=sys.stderr)


def of_task(task: TaskConfig) -> list[object]:
    """The flags of a task, for `then`."""
    from sparsebert.data import TASKS

    columns = [part for name in task.text_column for part in ("--text-column", name)]
    columns += [] if task.label_column is None else ["--label-column", task.label_column]
    return ["--task", task.task if task.task in TASKS else Path(task.task), *columns]


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table on stdout. Columns after the first are right-aligned, unless a cell is as long as a sentence."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        left = i == 0 or any(len(row[i]) > 40 for row in rows)
        drawn.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # plain: a path may look like markup
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(Text(title, style="bold"), soft_wrap=True)  # the table's own would be as narrow as the table
    console.print(drawn)


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A Progress that shows `label` and what is being done, the share done and the time left: a bar on a terminal, else
    a line every few seconds.
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
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update(done: int, total: int, what: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(_named(label, what), total=None)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _named(label: str, what: str) -> str:
    return f"{label}: {what}" if what else label


def _plain(label: str) -> Progress:
    start = shown = time.monotonic()
    first: int | None = None
    part = ""

    def update(done: int, total: int, what: str = "") -> None:
        nonlocal start, shown, first, part
        now = time.monotonic()
        if what != part:
            start, shown, first, part = now, now, None, what
        first = done if first is None else first  # a resumed run starts above 0: time left counts from there
        if now - shown < PLAIN_SECONDS and (done < total or shown == start):
            return
        shown = now
        # How fast it goes is not known before the second update.
        left = f", {_clock((now - start) / (done - first) * (total - done))} left" if done > first else ""
        print(
            f"{_named(label, what)}: {done}/{total}, {_clock(now - start)} elapsed{left}", file=sys.stderr, flush=True
        )

    return update


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_change(row: dict) -> None:
    """Prints the original and the changed text of an attacked example, with the words that differ in colour or, where
    stdout is no terminal, in brackets.
    """
    from rich.console import Console
    from rich.text import Text

    from sparsebert.robustness.attacks.words import differences

    plain = not sys.stdout.isatty()
    said = Text(f"{row['label']}: ", style="bold")
    for old, new in differences(row["original"], row["perturbed"]):
        if old == new:
            said.append(f"{old} ")
        elif plain:
            said.append(f"[{old} -> {new}] ")
        else:
            said.append(f"{old} ", "red").append(f"{new} ", "green")
    Console(width=120 if plain else None).print(said)


def stop_for_errors(errors: int, n: int) -> None:
    """Ends the command with exit code 3 if more than 1 % of the examples ended in an error."""
    from sparsebert.robustness.attacks import MOST_ERRORS

    if errors > MOST_ERRORS * n:
        import typer

        print(f"{errors:,} of {n:,} examples ended in an error and are in no figure", file=sys.stderr)
        raise typer.Exit(3)
