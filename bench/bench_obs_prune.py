"""obs_prune and obs_sweep against the loops their papers published, on the same threads.

python -m bench.bench_obs_prune [--threads N] [--quick] [--json] [--markdown FILE] [--reference DIR] [--moments FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file

from bench import harness
from bench.shapes import layer_problem
from sparsebert.engine.measure import Ratio, interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.obs_prune import _inverse, _inverse_factor, _sweep, _sweep_keep, _trace, obs_prune, obs_sweep
from sparsebert.patterns import Grouped, NofM, Pattern, Unstructured, kept_in, parse

# For the rivals of obs_prune only a few steps are timed, as all cost the same: the time of STEPS[1] steps minus that of
# STEPS[0], on a batch of rows as large as theirs.
BATCH, STEPS = 32, (4, 20)
CHECKED_ROWS = 8
COLUMNS = {
    "case": "", "ours_ms": ".1f", "reference_ms": ".1f", "ratio": ".1f", "low": ".1f", "high": ".1f", "loop_ms": ".1f",
    "reference_loop_ms": ".1f", "loop_ratio": ".1f", "gflops": ".0f", "same_result": "", "equal_mask": ".5f",
    "stand_in": ".2f",
}  # fmt: skip
NOTES = (
    "`ours_ms` is the whole call, float64: factorisation, removals, and for obs_prune the least squares on the kept "
    "weights; `loop_ms` is only the removals, with the factor (obs_prune: the inverse) given. `reference_ms` and "
    "`reference_loop_ms` are the same for {reference}, float32. For obs_prune both are the removals only: the time of "
    "steps {first} to {last} for a batch of {batch} rows, scaled by rows / {batch} and removals / steps, as all steps "
    "cost the same. Medians over rounds in turns, `ratio` with its 95 % interval if there are enough rounds. `gflops` "
    "counts the multiply-adds of `loop_ms` that cannot be avoided (symmetric halves once). `same_result`: our mask "
    "equals the mask of a plain float64 formulation (obs_prune: on {checked} rows). `equal_mask`: share of our mask "
    "entries that the float32 reference has too (obs_prune: on {checked} rows, up to 768 inputs). `stand_in`: the time "
    "of the plain torch formulation, the reference if no checkout is given, over `reference_loop_ms`."
)


class Case(NamedTuple):
    op: str
    rows: int
    n_in: int
    pattern: Pattern
    sparsity: float

    def __str__(self) -> str:
        amount = "" if isinstance(self.pattern, NofM) else f" {self.sparsity:g}"
        return f"{self.op} {self.rows} x {self.n_in} {self.pattern}{amount}"


CASES = [
    Case("obs_prune", rows, n_in, Unstructured(), sparsity)
    for rows, n_in in ((768, 768), (384, 1536))
    for sparsity in (0.5, 0.875)
] + [
    Case("obs_sweep", rows, n_in, parse(name), sparsity)
    for rows, n_in in ((768, 768), (768, 3072), (3072, 768))
    for name, sparsity in (("unstructured", 0.5), ("unstructured", 0.875), ("2:4", 0.5), ("32:64", 0.5), ("32x1", 0.5))
]
QUICK_CASES = [Case("obs_prune", 64, 384, Unstructured(), 0.5), Case("obs_sweep", 384, 384, Unstructured(), 0.5)]


def plain_trace(weight: torch.Tensor, h: torch.Tensor, steps: int) -> torch.Tensor:
    """Exact OBS of all rows at once, with an inverse per row, in h's precision. Removed columns, [rows, steps]."""
    order = []
    rows = torch.arange(len(weight))
    w = weight.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).repeat(len(w), 1, 1)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for _ in range(steps):
        pivots = inverse.diagonal(dim1=1, dim2=2)
        p = (w**2 / pivots).masked_fill_(gone, torch.inf).argmin(1)
        pivot, column = pivots[rows, p], inverse[rows, p]
        w -= column * (w[rows, p] / pivot)[:, None]
        gone[rows, p] = True
        column = column / pivot.sqrt()[:, None]
        inverse -= column[:, :, None] @ column[:, None, :]
        order.append(p)
    return torch.stack(order, 1)


def removed(order: torch.Tensor, n_in: int) -> torch.Tensor:
    return torch.zeros(len(order), n_in, dtype=torch.bool).scatter_(1, order, True)


def plain_sweep(
    weight: torch.Tensor, u: torch.Tensor, pattern: Pattern, sparsity: float, block: int = 128
) -> torch.Tensor:
    """The sweep: column by column inside a block, then one product for the columns after it. In u's precision. Like the
    published loop, it stores the loss of every removal.
    """
    w = weight.clone()
    n_in = w.shape[1]
    reach = pattern.m if isinstance(pattern, NofM) else block
    gone = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, n_in, block):
        stop = min(start + block, n_in)
        part = w[:, start:stop].clone()
        stays, errors, losses = (torch.zeros_like(part) for _ in range(3))
        own = u[start:stop, start:stop]
        for i in range(stop - start):
            if i % reach == 0:
                ahead = slice(i, min(i + reach, stop - start))
                scores = (part[:, ahead] / own.diagonal()[ahead]) ** 2
                keep = _sweep_keep(scores, gone[:, : start + i], pattern, sparsity)
                gone[:, start + ahead.start : start + ahead.stop] = ~keep
            column = part[:, i].clone()
            stays[:, i] = column.masked_fill(gone[:, start + i], 0.0)
            errors[:, i] = (column - stays[:, i]) / own[i, i]
            losses[:, i] = errors[:, i] ** 2
            part[:, i:] -= errors[:, i : i + 1] @ own[i : i + 1, i:]
        w[:, start:stop] = stays
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def factor_f32(h: torch.Tensor) -> torch.Tensor:
    """U in the three steps that the published code takes."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def problem_of(case: Case, moments: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(W*, H) of the case: random, or from a file with `weight` and `h`, of which the first rows are taken."""
    if moments is None:
        return tuple(torch.from_numpy(array) for array in layer_problem(case.rows, case.n_in))
    tensors = load_file(moments)
    return tensors["weight"].double()[: case.rows].contiguous(), tensors["h"].double()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the published code, and lets it run without CUDA."""
    with mock.patch("torch.cuda.synchronize", lambda: None), contextlib.redirect_stdout(io.StringIO()):
        yield


class Published:
    """The authors' own loops, from checkouts of IST-DASLab/OBC and IST-DASLab/sparsegpt side by side in `directory`."""

    name = "the published loops (IST-DASLab/OBC nmprune, IST-DASLab/sparsegpt fasterprune; 32x1: plain torch)"

    def __init__(self, directory: Path):
        self.obc = self._module(directory / "OBC" / "trueobs.py")
        self.sparsegpt = self._module(directory / "sparsegpt" / "sparsegpt.py")

    @staticmethod
    def _module(path: Path) -> types.ModuleType:
        # Both import their quantiser, which pruning never calls.
        with mock.patch.dict(sys.modules, {"quant": types.ModuleType("quant")}):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module

    @staticmethod
    def _layer(weight: torch.Tensor) -> torch.nn.Linear:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        return layer

    def trace(self, weight: torch.Tensor, h: torch.Tensor, steps: int) -> torch.Tensor:
        solver = self.obc.TrueOBS(self._layer(weight))
        solver.H = h.double()
        with quiet():
            solver.nmprune(n=steps, m=weight.shape[1], parallel=BATCH)
        return solver.layer.weight.data == 0

    def sweep(self, weight: torch.Tensor, h: torch.Tensor, u: torch.Tensor | None, case: Case) -> torch.Tensor:
        if isinstance(case.pattern, Grouped):
            return Plain.sweep(self, weight, h, u, case)
        solver = self.sparsegpt.SparseGPT(self._layer(weight))
        solver.H = h.clone()
        n, m = (case.pattern.m - case.pattern.n, case.pattern.m) if isinstance(case.pattern, NofM) else (0, 0)
        given = contextlib.nullcontext()
        if u is not None:  # the loop alone: its factorisation returns the given factor
            given = mock.patch.multiple(
                torch, linalg=mock.Mock(cholesky=lambda h, upper=False: u), cholesky_inverse=lambda h: h
            )
        with quiet(), given:
            solver.fasterprune(case.sparsity, prunen=n, prunem=m, percdamp=0.0)
        return solver.layer.weight.data


class Plain:
    """Plain torch, used if the published loops are not at hand."""

    name = "a plain torch formulation"

    def trace(self, weight: torch.Tensor, h: torch.Tensor, steps: int) -> torch.Tensor:
        return removed(plain_trace(weight, h, steps), weight.shape[1])

    def sweep(self, weight: torch.Tensor, h: torch.Tensor, u: torch.Tensor | None, case: Case) -> torch.Tensor:
        return plain_sweep(weight, factor_f32(h) if u is None else u, case.pattern, case.sparsity)


def steps_of(case: Case) -> int:
    return case.n_in - kept_in(case.pattern, 1, case.n_in, case.sparsity)


@functools.cache
def expected_order(n_in: int, moments: Path | None) -> torch.Tensor:
    """Columns that exact OBS removes from the checked rows, [rows, steps], up to the highest sparsity of any case.
    Float64, one row at a time; each step is a downdate of the whole inverse.
    """
    case = max((case for case in CASES + QUICK_CASES if case.op == "obs_prune" and case.n_in == n_in), key=steps_of)
    w, h = problem_of(case, moments)
    order = torch.empty(CHECKED_ROWS, steps_of(case), dtype=torch.int64)
    for row, weight in enumerate(w[:CHECKED_ROWS].clone()):
        inverse = torch.linalg.inv(h)
        gone = torch.zeros(n_in, dtype=torch.bool)
        for step in range(order.shape[1]):
            p = (weight**2 / inverse.diagonal()).masked_fill_(gone, torch.inf).argmin()
            column, pivot = inverse[p].clone(), inverse[p, p].clone()
            weight -= column * (weight[p] / pivot)
            inverse.addr_(column, column / pivot, alpha=-1)
            gone[p] = True
            order[row, step] = p
    return order


def measure_prune(case: Case, rival: Published | Plain, moments: Path | None, rounds: int, threads: int) -> harness.Row:
    (w, h), expected = problem_of(case, moments), expected_order(case.n_in, moments)
    steps = steps_of(case)
    inverse = _inverse(h)
    isa = _dispatch.isa()
    w32, h32 = w.float(), h.float()
    candidates = {
        "ours": lambda: obs_prune(w, h, case.pattern, case.sparsity, threads=threads),
        "loop": lambda: _trace(w, inverse, 1, steps, case.pattern, threads=threads, isa=isa),
        "start": lambda: rival.trace(w32[:BATCH], h32, STEPS[0]),
        "reference": lambda: rival.trace(w32[:BATCH], h32, STEPS[1]),
    }
    if isinstance(rival, Published):
        candidates["plain_start"] = lambda: Plain().trace(w32[:BATCH], h32, STEPS[0])
        candidates["plain"] = lambda: Plain().trace(w32[:BATCH], h32, STEPS[1])
    gone = candidates["ours"]()[:CHECKED_ROWS] == 0
    same = torch.equal(gone, removed(expected[:, :steps], case.n_in))
    equal = None
    if case.n_in <= 768:  # larger ones take minutes
        equal = (gone == rival.trace(w32[:CHECKED_ROWS], h32, steps)).double().mean().item()
    scale = case.rows / BATCH * steps / (STEPS[1] - STEPS[0])
    flops = case.rows * sum((case.n_in - step) ** 2 for step in range(steps))
    return row(case, candidates, rounds, threads, scale, flops, same, equal)


def measure_sweep(case: Case, rival: Published | Plain, moments: Path | None, rounds: int, threads: int) -> harness.Row:
    w, h = problem_of(case, moments)
    w32, h32 = w.float(), h.float()
    u, u32 = _inverse_factor(h), factor_f32(h32)
    candidates = {
        "ours": lambda: obs_sweep(w, h, case.pattern, case.sparsity, threads=threads),
        "loop": lambda: _sweep(w, u, case.pattern, case.sparsity, 128, threads=threads, isa=_dispatch.isa()),
        "reference": lambda: rival.sweep(w32, h32, None, case),
        "reference_loop": lambda: rival.sweep(w32, h32, u32, case),
    }
    if isinstance(rival, Published) and not isinstance(case.pattern, Grouped):
        candidates["plain"] = lambda: Plain().sweep(w32, h32, u32, case)
    gone = candidates["ours"]() == 0
    same = torch.equal(gone, plain_sweep(w, u, case.pattern, case.sparsity) == 0)
    equal = (gone == (candidates["reference"]() == 0)).double().mean().item()
    return row(case, candidates, rounds, threads, 1.0, case.rows * case.n_in**2, same, equal)


def row(
    case: Case,
    candidates: dict[str, Callable],
    rounds: int,
    threads: int,
    scale: float,
    flops: float,
    same: bool,
    equal: float | None,
) -> harness.Row:
    timings = interleave(candidates, rounds, settle=5e-3 if threads > 1 and case.op == "obs_sweep" else 0.0, warmup=0)
    ms = {name: timings.median(name) * 1e3 for name in candidates}
    ratio = timings.ratio("reference", "ours")
    if case.op == "obs_prune":
        ms["reference"] = ms["reference_loop"] = (ms["reference"] - ms["start"]) * scale
        ratio = Ratio(ms["reference"] / ms["ours"], None, None)
        if "plain" in ms:
            ms["plain"] = (ms["plain"] - ms["plain_start"]) * scale
    return {
        "case": str(case), "threads": threads, "ours_ms": ms["ours"], "reference_ms": ms["reference"],
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "loop_ms": ms["loop"],
        "reference_loop_ms": ms["reference_loop"], "loop_ratio": ms["reference_loop"] / ms["loop"],
        "gflops": flops / ms["loop"] * 1e-6, "same_result": same,
        "equal_mask": equal, "stand_in": ms["plain"] / ms["reference_loop"] if "plain" in ms else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads for both sides (default 2)")
    parser.add_argument("--quick", action="store_true", help="two small cases, few rounds")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--reference", type=Path, help="folder with checkouts of IST-DASLab's OBC and sparsegpt")
    parser.add_argument(
        "--moments", type=Path, help="safetensors file to take weight [rows, n_in] and h [n_in, n_in] from"
    )
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    args = parser.parse_args()
    rival = Published(args.reference) if args.reference else Plain()
    cases = [case for case in (QUICK_CASES if args.quick else CASES) if args.only in str(case)]
    if args.moments:
        rows, n_in = load_file(args.moments)["weight"].shape
        cases = [case._replace(rows=min(rows, case.rows), n_in=n_in) for case in cases if case.n_in == n_in]
    rows = []
    with torch_threads(args.threads):
        for case in cases:
            measure = measure_prune if case.op == "obs_prune" else measure_sweep
            slow = args.quick or case.op == "obs_prune" or case.n_in > 1000
            rounds = 1 if case.op == "obs_prune" and case.n_in > 1000 else 3 if slow else 7
            rows.append(measure(case, rival, args.moments, rounds, args.threads))
    notes = NOTES.format(reference=rival.name, first=STEPS[0] + 1, last=STEPS[1], batch=BATCH, checked=CHECKED_ROWS)
    title = f"obs_prune and obs_sweep, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0 if all(row["same_result"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
