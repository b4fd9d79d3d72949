"""Parts that all benchmarks share: the machine card, the check before timing, the table and the JSON line."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsebert import jobs, machine
from sparsebert.engine.measure import Timings, interleave

Row = dict[str, str | int | float | bool | None]


class WrongOutput(Exception):
    """A candidate's output is further from the reference than its tolerance; its row is not reported."""


class Clock:
    """Says on stderr what happens when. left: seconds until the minutes are over."""

    def __init__(self, minutes: float):
        self.start, self.minutes = time.monotonic(), minutes

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.start:4.0f} s: {what}", file=sys.stderr, flush=True)

    @property
    def left(self) -> float:
        return self.start + 60 * self.minutes - time.monotonic()


def check(case: str, candidates: dict[str, Callable[[], np.ndarray]], expected: np.ndarray, tolerance: float) -> float:
    """Runs each candidate once and returns the largest absolute error. Raises WrongOutput for a wrong shape, NaN, or an
    error above `tolerance`.
    """
    worst = 0.0
    for name, call in candidates.items():
        got = np.asarray(call())
        if got.shape != expected.shape:
            raise WrongOutput(f"{case}: {name} returns shape {got.shape}, expected {expected.shape}")
        error = float(np.abs(got - expected).max(initial=0.0))
        if not error <= tolerance:
            raise WrongOutput(f"{case}: {name} is off by {error:.3g}, at most {tolerance:.3g} is allowed")
        worst = max(worst, error)
    return worst


def time_checked(
    case: str,
    candidates: dict[str, Callable[[], np.ndarray]],
    expected: np.ndarray,
    tolerance: float,
    *,
    rounds: int,
    threads: int,
    turn_s: float = 2e-3,
) -> tuple[Timings, float]:
    """Checks, then times the candidates in turns of about `turn_s` seconds. Returns timings and the largest error."""
    error = check(case, candidates, expected, tolerance)
    settle = 5e-3 if threads > 1 else 0.0
    probe = interleave(candidates, rounds=3, settle=settle)
    slowest = max(probe.minimum(name) for name in candidates)
    repeats = max(1, min(200, int(turn_s / slowest)))
    return interleave(candidates, rounds, repeats=repeats, settle=settle), error


def add_options(parser: argparse.ArgumentParser, *, threads: int = 1) -> None:
    """Adds the options that every benchmark of an op has."""
    parser.add_argument("--threads", type=int, default=threads, help=f"threads for both sides (default {threads})")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")


def measured(cases: Iterable[Callable[[], list[Row]]]) -> tuple[list[Row], bool]:
    """(rows of all cases, whether all could be reported). A case with a wrong output is named on stderr."""
    rows: list[Row] = []
    refused = False
    for case in cases:
        try:
            rows += case()
        except WrongOutput as error:
            print(f"refused: {error}", file=sys.stderr)
            refused = True
    return rows, not refused


def report(
    title: str,
    rows: Sequence[Row],
    columns: dict[str, str],
    notes: str,
    page: Path | None,
    *,
    json_only: bool = False,
    also: dict | None = None,
) -> None:
    """Prints the rows as a table for people, unless `json_only`, then as one JSON line. Also writes the table to `page`
    if given.

    columns: key of a row -> format spec. notes: the meaning of the columns, for the page. also: more for the JSON line.
    """
    card = machine.card()
    table = Table(title=title, caption=f"{card['cpu']}, {card['cores']} cores; torch {card['torch']}")
    for key in columns:
        table.add_column(key, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, columns))
    # Output into a file has no terminal width to fit; a narrow table would cut figures.
    if not json_only:
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    short = [{key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    print(json.dumps({"machine": card, "command": command(), "rows": short, **(also or {})}))
    if page is not None:
        jobs.write(page, markdown(title, rows, columns, notes))


def markdown(title: str, rows: Sequence[Row], columns: dict[str, str], notes: str) -> str:
    """The same table as a page for bench/results: machine, command and environment variables first."""
    card = machine.card()
    lines = [f"# {title}", ""]
    lines.append(f"Machine: {card['cpu']}, {card['cores']} cores, {', '.join(card['isas'])}; {card['os']}, Python")
    lines[-1] += f" {card['python']}, numpy {card['numpy']}, torch {card['torch']}.  "
    lines += [f"Command: `{command()}`  ", f"Environment: {machine.setting(card['environment'])}.", "", notes, ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, columns)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: Row, columns: dict[str, str]) -> list[str]:
    """The row as text; empty if a figure is missing, such as an interval of too few rounds."""
    return ["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()]


def command() -> str:
    """The command line that runs this again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return f"python {program} {shlex.join(sys.argv[1:])}".strip()


def file_name(title: str) -> str:
    """A title as the name of a file, in lower case, without its ending."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
