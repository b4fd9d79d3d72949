"""Sections of bench.gpu_report, each in a process of its own: one that raises, crashes or takes too long is a row."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, NamedTuple

from bench import harness
from bench.harness import Clock, Row
from sparsebert.errors import UnsupportedError, cut

if TYPE_CHECKING:  # the report says itself that torch is missing
    from bench.gpu_place import Case, Place

# A section runs in a fork, which begins with what is imported here and without a GPU's context: that of a section that
# crashed is lost.
FORK = multiprocessing.get_context("fork")
OK, WRONG, SLOWER, FAILED, CRASHED, OVERRAN = "ok", "wrong", "slower", "failed", "crashed", "overran"
MISSING = "not available"
FAULTS = {WRONG, SLOWER, FAILED, CRASHED, OVERRAN}
CHECKS = "checks: "  # begins the names of the sections that compare results
EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit)\b")


class Section(NamedTuple):
    """Cases that share a process, until one of them ends it: the others then go on in a new one.

    cases: gives them one by one, always the same ones in the same order, and does little itself. seconds: for all of
    them together, on a GPU.
    """

    name: str
    cases: Callable[[Place], Iterator[Case]]
    seconds: float


def carried_out(section: Section, place: Place, seconds: float) -> Iterator[Row]:
    """The section's rows, each as soon as it is there. After `seconds` its process is killed."""
    clock, done = Clock(seconds / 60), 0
    while True:
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_run, args=(section, place, done, sender, log))
            process.start()
            sender.close()
            case, row = "", None
            try:
                while receiver.poll(max(0.0, clock.left)):
                    kind, said = receiver.recv()
                    if kind == "end":
                        return
                    case, row = (said, None) if kind == "case" else (case, said)
                    if row is not None:
                        done += 1
                        yield {"section": section.name, "case": case} | row
                why = f"{section.name} had {seconds:.0f} s; what is left of it did not run"
                yield {"section": section.name, "case": case if row is None else "", "status": OVERRAN, "why": why}
                return
            except EOFError:
                process.join()
                yield {"section": section.name, "case": case} | _ended(process.exitcode, log)
                if row is not None or not case:  # between two cases: the section itself is at fault
                    return
                done += 1
            finally:
                _kill(process)
                receiver.close()
                _tell(log)


def _run(section: Section, place: Place, done: int, sender: Connection, log: IO) -> None:
    """The process of a section: runs the cases after the first `done`."""
    os.setsid()  # a group of its own, so that what it starts ends with it
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    if section.name.startswith(CHECKS):
        fill_with_nan()
    for i, case in enumerate(section.cases(place)):
        if i >= done:
            sender.send(("case", case.name))
            sender.send(("row", judged(place, case.run)))
    sender.send(("end", None))


def fill_with_nan() -> None:
    """Fresh memory of tensors starts as NaN, so that what no kernel has written is noticed."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)


def judged(place: Place, run: Callable[[], Row]) -> Row:
    """The row of a case, with its status."""
    try:
        row = run()
    except UnsupportedError as error:
        return {"status": MISSING, "why": str(error)}
    except harness.WrongOutput as error:
        return {"status": WRONG, "why": cut(str(error))}
    if place.judged and row.get("ratio") is not None and not row["ratio"] >= 1:
        row = {"status": SLOWER} | row | {"why": f"{row['ratio']:.2f} times as fast as {row['versus']}"}
    return {"status": OK} | row


def _ended(code: int, log: IO) -> Row:
    """Why a process ended during a case: its exception, or the signal and the last line that it said."""
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()] or ["it said nothing"]
    if code < 0:
        return {"status": CRASHED, "why": cut(f"{signal.Signals(-code).name}: {lines[-1]}")}
    raised = [line for line in lines if EXCEPTION.match(line)]  # a message may have more lines
    return {"status": FAILED, "why": cut((raised or lines)[-1])}


def _kill(process) -> None:
    """Ends a section's process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have a group yet
    process.join()


def _tell(log: IO) -> None:
    """Passes on what a section has said."""
    log.seek(0)
    sys.stderr.write(log.read())
    sys.stderr.flush()
