"""Where the sections of bench.gpu_report run: on a GPU, or for a rehearsal on this processor. What they share: random
data, the clock, and the rows that they give.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import harness
from bench.harness import Row
from sparsebert.engine.measure import Timings, in_order, ratio_text

TURN_S = 4e-3  # of a candidate, at least, before the next one's turn
ROUNDS = 15
# Each input is read again only after this many times the cache's size, at most by MOST_COPIES of them.
CACHES, MOST_COPIES = 3, 64
SPARSITY = 0.9  # of all that is timed, where the pattern leaves it open
BF16 = 2  # bytes of a value
DENSE = "dense"  # the rival without zeros


class Rates(NamedTuple):
    """What the device reaches, as measured: bytes per second that a copy reads and writes, and operations per second of
    a product in bf16.
    """

    copy: float
    matmul: float


@dataclass(frozen=True)
class Place:
    """device: cpu for a rehearsal, in which Triton's kernels are interpreted. seed: of all random data. folder: for
    files that sections share. small: only the small shapes. judged: times are measurements, so one that is slower than
    dense is a fault. reference: folder with a checkout of IST-DASLab/sparsegpt, if there is one.
    """

    device: torch.device
    seed: int
    folder: Path
    small: bool = False
    judged: bool = True
    rates: Rates | None = None
    reference: Path | None = None

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def seed_of(self, case: object) -> int:
        """The seed of a case's data: another in each run and for each case, and the same on all devices."""
        return zlib.crc32(f"{self.seed} {case}".encode())

    def generator(self, case: object) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_of(case))

    def shapes(self, small: Sequence, large: Sequence) -> list:
        """The shapes of a check: those of BERT too, unless only small ones are wanted."""
        return [*small, *([] if self.small else large)]


class Case(NamedTuple):
    """One row of a section. run: gives the row's figures. Raises harness.WrongOutput, or UnsupportedError for what this
    machine or this version does not have; anything else that it raises is a fault of what it runs.
    """

    name: str
    run: Callable[[], Row]


class Goal(NamedTuple):
    """A bound on one of a row's figures."""

    figure: str  # ms, seconds, or ratio
    sign: str  # ≤ or ≥
    bound: float

    def __str__(self) -> str:
        return f"{self.figure} {self.sign} {self.bound:g}"

    def met(self, row: Row) -> bool:
        figure = row[self.figure]
        return figure <= self.bound if self.sign == "≤" else figure >= self.bound


def near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> Row:
    """The row of a check: its largest error, as a share of the largest value of a result or of 1. Raises
    harness.WrongOutput above the tolerance, and for NaN.
    """
    worst = 0.0
    for name, expected in want.items():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        values, wanted = ((tensor.detach().cpu().double() / scale).numpy() for tensor in (got[name], expected))
        worst = max(worst, harness.check(name, {"the kernel": lambda values=values: values}, wanted, tolerance))
    return {"error": worst, "tolerance": tolerance}


def require_equal(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises harness.WrongOutput if two tensors of bool or of integers differ."""
    got, want = got.cpu(), want.cpu()
    if got.shape != want.shape or not torch.equal(got, want):
        differ = int((got != want).sum()) if got.shape == want.shape else "all"
        raise harness.WrongOutput(f"{name}: {differ} of {want.numel()} values differ")


def copies(place: Place, size: int) -> int:
    """How many buffers of `size` bytes take turns, so that none is in L2 when its turn comes."""
    if place.rehearsal:
        return 2
    cache = torch.cuda.get_device_properties(place.device).L2_cache_size
    return min(max(2, math.ceil(CACHES * cache / size)), MOST_COPIES)


def timed(
    place: Place, candidates: dict[str, Sequence[Callable[[], object]]], *, graph: bool = False, rounds: int = ROUNDS
) -> Timings:
    """Seconds per call, between two CUDA events; in a rehearsal by the processor's clock. The candidates take turns.

    candidates: of each, the same call on different buffers, one after the other. graph: a turn replays one CUDA graph
    of these calls, so that the host's launches do not count.
    """
    turns = {name: _turn(place, calls, graph) for name, calls in candidates.items()}
    repeats = 1
    if place.rehearsal:
        rounds = 1
    else:
        for turn in turns.values():
            turn()  # compiles what it calls
        slowest = max(_elapsed(place, turn, 1) for turn in turns.values())
        repeats = max(1, min(200, int(TURN_S / slowest)))
    seconds = {name: np.empty(rounds) for name in turns}
    for i in range(rounds):
        for name in in_order(turns, i):
            seconds[name][i] = _elapsed(place, turns[name], repeats) / (repeats * len(candidates[name]))
    return Timings(seconds)


def _turn(place: Place, calls: Sequence[Callable[[], object]], graph: bool) -> Callable[[], object]:
    def each() -> None:
        for call in calls:
            call()

    return replayed(place, each) if graph else each


def replayed(place: Place, work: Callable[[], object]) -> Callable[[], object]:
    """What `work` launches, as a CUDA graph; in a rehearsal `work` itself."""
    if place.rehearsal:
        return work
    from bench.bench_obs_prune_cuda import graph_of

    return graph_of(work).replay


def _elapsed(place: Place, call: Callable[[], object], repeats: int) -> float:
    if place.rehearsal:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def figures(
    place: Place,
    timings: Timings,
    *,
    ours: str = "ours",
    size: int | None = None,
    operations: float | None = None,
    versus: str | None = None,
    goals: Sequence[Goal] = (),
) -> Row:
    """A row of the times of `ours` and of its rivals. size: bytes that it must read and write at least. operations: on
    non-zeros. Both are given as shares of the place's rates. versus: the rival that must not be faster; `ratio` is its
    time over ours.
    """
    seconds = timings.median(ours)
    row: Row = {"ms": 1e3 * seconds, "seconds": seconds, "spread": timings.spread(ours)}
    if place.rates is not None:
        row["copy_share"] = None if size is None else size / seconds / place.rates.copy
        row["matmul_share"] = None if operations is None else operations / seconds / place.rates.matmul
    told = []
    for rival in timings.seconds:
        if rival == ours:
            continue
        ratio = timings.ratio(rival, ours)
        told.append(f"{rival} {1e3 * timings.median(rival):.4g} ms, {ratio_text(ratio.value, ratio[1:])}")
        if rival == versus:
            row |= {"versus": versus, "ratio": ratio.value}
    row["rivals"] = "; ".join(told)
    return row | against(place, row, goals)


def against(place: Place, row: Row, goals: Sequence[Goal]) -> Row:
    """What a row says of its goals. Times that are no measurements neither meet nor miss one."""
    if not goals:
        return {}
    met = "met" if all(goal.met(row) for goal in goals) else "missed"
    return {"goal": ", ".join(map(str, goals)), "met": met if place.judged else "unmeasured"}


def compiled(place: Place, function: Callable) -> Callable:
    """torch.compile; in a rehearsal without its C++ compiler."""
    torch.compiler.reset()  # it would give up after a few shapes, and run the function as it is
    return torch.compile(function, backend="eager" if place.rehearsal else "inductor")
