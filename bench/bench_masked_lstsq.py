"""masked_lstsq against torch.linalg on the same threads, taking turns.

python -m bench.bench_masked_lstsq [--threads N] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import NamedTuple

import torch

from bench import harness
from bench.shapes import layer_problem, low_rank_metric
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.masked_lstsq import CG_STEPS, CG_TOLERANCE, masked_lstsq

# Both sides solve in float64; H's condition, about 1e4, is the factor by which their rounding may differ.
TOLERANCE = 1e-9
# The row metric has a gain over the row by row solution; conjugate gradients may miss at most this share of it.
LEFT = 0.03
PADDED_ROWS = 64  # rows per batch of the padded rival: 64 systems of 400 columns are 82 MB
COLUMNS = {
    "case": "", "isa": "", "ours_ms": ".1f", "batched_ms": ".1f", "row_ms": ".1f", "reference_ms": ".1f",
    "ratio": ".1f", "low": ".1f", "high": ".1f", "gflops": ".1f", "same_result": "", "error": ".0e",
}  # fmt: skip
NOTES = (
    "Float64. `kept`, in the case: the share of kept weights, in random places, row by row or in groups of rows that "
    "keep the same columns. `batched_ms`: torch.linalg.cholesky on systems padded to the largest, 64 rows at a time; "
    "`row_ms`: torch.linalg.solve row by row, or group by group. `reference_ms` is the faster of the two, `ratio` its "
    "time over ours with its 95 % interval. `gflops` counts k³/3 per system and 2k² per right-hand side for supports "
    "of k, even if the removed half is solved for instead. `error`: largest difference from the row by row solution; "
    "`same_result`: it is at most 1e-9. With a row metric (of rank 5 plus a floor) the reference is the same conjugate "
    "gradients in float64; 1,000 steps have a gain over the row by row solution, and `error` is the share of it that "
    "we miss, at most 0.03."
)


class Case(NamedTuple):
    rows: int
    n_in: int
    kept: float
    group: int = 1
    metric: bool = False

    def __str__(self) -> str:
        more = f", {self.group}x1" if self.group > 1 else ", row metric" if self.metric else ""
        return f"{self.rows} x {self.n_in}, kept {self.kept:g}{more}"


CASES = [
    Case(384, 384, 0.125), Case(384, 384, 0.5), Case(384, 384, 0.75), Case(384, 1536, 0.125),
    Case(384, 1536, 0.125, 32), Case(384, 1536, 0.5, 16), Case(768, 768, 0.125), Case(768, 3072, 0.125),
    Case(384, 384, 0.125, metric=True), Case(384, 1536, 0.125, metric=True), Case(1536, 384, 0.125, metric=True),
]  # fmt: skip
QUICK_CASES = [Case(384, 384, 0.125), Case(384, 384, 0.5), Case(384, 1536, 0.125, 32)]


def batched(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """Solves all systems at one size, padded with rows of the identity; the right-hand sides of a group together."""
    support = mask[::group]
    kept = support.sum(1)
    most = int(kept.max())
    order = torch.argsort(support.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    valid = torch.arange(most) < kept[:, None]
    v = torch.zeros_like(target)
    for part in torch.arange(len(support)).split(PADDED_ROWS):
        cols, real = order[part], valid[part]
        systems = torch.where(
            real[:, :, None] & real[:, None, :], h[cols[:, :, None], cols[:, None, :]], torch.eye(most).double()
        )
        t = target.view(len(support), group, -1)[part].gather(2, cols[:, None].expand(-1, group, -1))
        sides = torch.where(real[:, None], t, 0.0).transpose(1, 2)
        found = torch.cholesky_solve(sides, torch.linalg.cholesky(systems)).transpose(1, 2)
        v.view(len(support), group, -1)[part] = torch.zeros(len(part), group, target.shape[1], dtype=v.dtype).scatter_(
            2, cols[:, None].expand(-1, group, -1), torch.where(real[:, None], found, 0.0)
        )
    return v


def row_by_row(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    v = torch.zeros_like(target)
    for first in range(0, len(mask), group):
        keep = mask[first].nonzero().flatten()
        rows = torch.arange(first, first + group)[:, None]
        v[rows, keep] = torch.linalg.solve(h[keep[:, None], keep], target[rows, keep].T).T
    return v


def coupled(
    target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, metric: torch.Tensor, steps: int, tolerance: float
) -> torch.Tensor:
    """Conjugate gradients on the coupled equations, started from the row by row solution, float64."""
    v = masked_lstsq(target, h, mask)
    residual = (metric @ (target - v @ h)) * mask
    inverse = 1 / (metric.diagonal()[:, None] * h.diagonal())
    direction = z = residual * inverse
    reached = start = (residual * z).sum()
    for _ in range(steps):
        if not reached > tolerance * start:
            break
        curved = (metric @ direction @ h) * mask
        step = reached / (direction * curved).sum()
        v, residual = v + step * direction, residual - step * curved
        z = residual * inverse
        before, reached = reached, (residual * z).sum()
        direction = z + reached / before * direction
    return v


def measure_coupled(case: Case, threads: int) -> list[harness.Row]:
    """The row of a case with a row metric. Raises harness.WrongOutput."""
    weight, h = map(torch.from_numpy, layer_problem(case.rows, case.n_in))
    metric = low_rank_metric(case.rows)
    mask = torch.rand(case.rows, case.n_in, generator=torch.Generator().manual_seed(0)) < case.kept
    problem = (weight @ h, h, mask)
    calls = {
        "float64": lambda: coupled(*problem, metric, CG_STEPS, CG_TOLERANCE),
        "ours": lambda: masked_lstsq(*problem, row_metric=metric, threads=threads),
    }

    def objective(v: torch.Tensor) -> float:
        lost = v - weight
        return float((metric @ lost * (lost @ h)).sum())

    least = objective(coupled(*problem, metric, 1000, 1e-12))
    error = (objective(calls["ours"]()) - least) / (objective(masked_lstsq(*problem)) - least)
    if not error <= LEFT:
        raise harness.WrongOutput(f"{case}: misses {error:.0e} of the gain, more than {LEFT:g}")
    timings = interleave(calls, 3, warmup=0, settle=5e-3 if threads > 1 else 0.0)
    ratio = timings.ratio("float64", "ours")
    return [{
        "case": str(case), "threads": threads, "isa": _dispatch.isa(), "ours_ms": timings.median("ours") * 1e3,
        "reference_ms": timings.median("float64") * 1e3, "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
        "same_result": True, "error": error,
    }]  # fmt: skip


def measure(case: Case, threads: int, quick: bool) -> list[harness.Row]:
    """One row per instruction set. Raises harness.WrongOutput."""
    if case.metric:
        return measure_coupled(case, threads)
    weight, h = map(torch.from_numpy, layer_problem(case.rows, case.n_in))
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(case.rows // case.group, case.n_in, generator=generator)
    mask = (places < case.kept).repeat_interleave(case.group, 0)
    target = weight @ h
    problem = (target, h, mask)
    calls = {
        "batched": lambda: batched(*problem, case.group).numpy(),
        "row": lambda: row_by_row(*problem, case.group).numpy(),
    }
    for isa in _dispatch.float32_isas():
        calls[isa] = lambda isa=isa: masked_lstsq(*problem, threads=threads, isa=isa).numpy()
    error = harness.check(str(case), calls, row_by_row(*problem, case.group).numpy(), TOLERANCE)
    # Few rounds for a slow case, so that it takes seconds, not minutes.
    slow = case.rows * case.n_in**3 * case.kept**3 / case.group > 1e9
    timings = interleave(calls, 3 if slow or quick else 7, warmup=0, settle=5e-3 if threads > 1 else 0.0)
    kept = mask[:: case.group].sum(1).double()
    flops = float((kept**3 / 3 + 2 * case.group * kept**2).sum())
    reference = min("batched", "row", key=timings.median)
    rows = []
    for isa in _dispatch.float32_isas():
        ratio = timings.ratio(reference, isa)
        rows.append({
            "case": str(case), "threads": threads, "isa": isa, "ours_ms": timings.median(isa) * 1e3,
            "batched_ms": timings.median("batched") * 1e3, "row_ms": timings.median("row") * 1e3,
            "reference_ms": timings.median(reference) * 1e3, "ratio": ratio.value, "low": ratio.low,
            "high": ratio.high, "gflops": flops / timings.median(isa) * 1e-9, "same_result": error <= TOLERANCE,
            "error": error,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser)
    args = parser.parse_args()
    cases = QUICK_CASES if args.quick else CASES
    with torch_threads(args.threads):
        rows, complete = harness.measured(partial(measure, case, args.threads, args.quick) for case in cases)
    title = f"masked_lstsq against torch.linalg, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
