"""gram against plain torch, in chunks of 256 tokens at the same accuracy and as one float32 product, taking turns.

python -m bench.bench_gram [--threads N] [--peak GFLOPS] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench import harness
from bench.shapes import random_input
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.gram import gram, gram_ref

# For moments of variance 1: about sqrt(256) roundings, each 2^-24 of a float32 sum of 256 products, and those of the
# products.
TOLERANCE = 4e-6
# Below this number of flops every instruction set is timed, above it only the best one.
EVERY_ISA_BELOW = 4e9
COLUMNS = {
    "n_in": "d", "n_y": "d", "tokens": "d", "weights": "", "isa": "", "ours_ms": ".2f", "spread": ".0%",
    "gflops": ".0f", "of_peak": ".0%", "reference_ms": ".2f", "ratio": ".2f", "low": ".2f", "high": ".2f",
    "one_product_ms": ".2f", "one_product_ratio": ".2f", "error": ".0e", "one_product_error": ".0e", "same_result": "",
}  # fmt: skip
NOTES = (
    "Second moments of x [tokens, n_in] and, if n_y is not 0, cross moments of y [tokens, n_y] and x, added to running "
    "float64 sums. `reference_ms` is torch on the same threads at the same accuracy: chunks of 256 tokens, shifted, "
    "scaled by the root of the weight, x.T @ x and y.T @ x in float32, added up in float64; `ratio` is the median over "
    "rounds of its time over ours with its 95 % interval by order statistics (`low`, `high`). `one_product` is torch "
    "with one float32 x.T @ x and y.T @ x over all tokens, shifted and scaled. `gflops` counts the operations needed, "
    "tokens x (n_in (n_in + 1) + 2 n_in n_y); torch computes the lower half of x.T @ x as well. `of_peak` is the share "
    "of the float32 multiply-add peak given with --peak, in GFLOP/s per core. `error` is the largest absolute "
    "difference from the float64 moments, which are about 1."
)


class Case(NamedTuple):
    n_in: int
    n_y: int
    tokens: int
    weighted: bool

    def __str__(self) -> str:
        return f"{self.n_in}, {self.n_y}, {self.tokens} tokens{', weights' if self.weighted else ''}"

    @property
    def flops(self) -> float:
        return self.tokens * (self.n_in * (self.n_in + 1.0) + 2.0 * self.n_in * self.n_y)


# The stages of an encoder: attention's output, queries, keys and values, the two halves of the feed-forward part.
CASES = [
    Case(n_in, n_y, tokens, weighted)
    for n_in, n_y, tokens, weighted in (
        (384, 0, 4096, False), (384, 384, 4096, False), (384, 384, 4096, True), (384, 1152, 4096, True),
        (1536, 384, 4096, True), (384, 0, 16384, False), (1536, 384, 16384, False),
        (768, 0, 4096, False), (768, 768, 4096, True), (1536, 0, 4096, False), (3072, 0, 4096, False),
        (3072, 768, 4096, True),
    )
]  # fmt: skip
QUICK_CASES = [case for case in CASES if case.flops < EVERY_ISA_BELOW]


def operands(case: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    x = torch.from_numpy(random_input(case.tokens, case.n_in))
    y = torch.from_numpy(random_input(case.tokens, case.n_y, seed=2)) if case.n_y else None
    weights = torch.rand(case.tokens, generator=torch.Generator().manual_seed(3)) if case.weighted else None
    return x, y, weights


class Rival:
    """Plain torch, `chunk` tokens at a time. The shifts are subtracted before the products are summed."""

    def __init__(self, shift_x: torch.Tensor, shift_y: torch.Tensor | None, chunk: int, dtype: torch.dtype):
        self.shifts, self.chunk = (shift_x, shift_y), chunk
        n_in = len(shift_x)
        self.xx = torch.zeros(n_in, n_in, dtype=dtype)
        self.yx = torch.zeros(0 if shift_y is None else len(shift_y), n_in, dtype=dtype)

    def add(self, x: torch.Tensor, y: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        for at in range(0, len(x), self.chunk):
            part = slice(at, at + self.chunk)
            scale = None if weights is None else weights[part, None].sqrt()
            xs = x[part] - self.shifts[0]
            xs = xs if scale is None else xs.mul_(scale)
            self.xx += xs.T @ xs
            if y is not None:
                ys = y[part] - self.shifts[1]
                self.yx += (ys if scale is None else ys.mul_(scale)).T @ xs


def errors(case: Case, x, y, weights, isas: list[str], threads: int) -> dict[str, float]:
    """Candidate -> its largest absolute difference from the float64 moments. Raises harness.WrongOutput."""
    second, cross = gram_ref(x, y, weights)
    expected = torch.cat([second] if cross is None else [second, cross]).numpy()
    total = float(case.tokens if weights is None else weights.double().sum())
    started = gram(x, y, weights, threads=threads)

    def ours(isa: str):
        moments = gram(x, y, weights, threads=threads, isa=isa)
        return torch.cat([moments.gram] if y is None else [moments.gram, moments.cross]).numpy()

    def torch_in(chunk: int, dtype: torch.dtype):
        rival = Rival(started.shift_x, started.shift_y, chunk, dtype)
        rival.add(x, y, weights)
        return torch.cat([rival.xx, rival.yx]).double().numpy() / total

    calls: dict[str, Callable] = {isa: partial(ours, isa) for isa in isas}
    calls["torch"] = partial(torch_in, 256, torch.float64)
    calls["one product"] = partial(torch_in, case.tokens, torch.float32)
    return {name: harness.check(str(case), {name: call}, expected, 2 * TOLERANCE) for name, call in calls.items()}


def measure(case: Case, threads: int, rounds: int, peak: float | None) -> list[harness.Row]:
    """One row per instruction set. Raises harness.WrongOutput."""
    isas = list(_dispatch.float32_isas()) if case.flops < EVERY_ISA_BELOW else [_dispatch.isa()]
    x, y, weights = operands(case)
    error = errors(case, x, y, weights, isas, threads)
    moments = {isa: gram(x, y, weights, threads=threads, isa=isa) for isa in isas}
    shifts = moments[isas[0]].shift_x, moments[isas[0]].shift_y
    calls: dict[str, Callable] = {
        isa: partial(gram, x, y, weights, into=moments[isa], threads=threads, isa=isa) for isa in isas
    }
    calls["torch"] = partial(Rival(*shifts, 256, torch.float64).add, x, y, weights)
    calls["one product"] = partial(Rival(*shifts, case.tokens, torch.float32).add, x, y, weights)
    timings = interleave(calls, rounds, settle=5e-3 if threads > 1 else 0.0)
    rows = []
    for isa in isas:
        seconds, ratio = timings.median(isa), timings.ratio("torch", isa)
        gflops = 1e-9 * case.flops / seconds
        rows.append({
            "n_in": case.n_in, "n_y": case.n_y, "tokens": case.tokens, "weights": "yes" if case.weighted else "no",
            "isa": isa, "case": str(case), "threads": threads, "ours_ms": 1e3 * seconds, "spread": timings.spread(isa),
            "gflops": gflops, "of_peak": gflops / threads / peak if peak else None,
            "reference_ms": 1e3 * timings.median("torch"), "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
            "one_product_ms": 1e3 * timings.median("one product"),
            "one_product_ratio": timings.ratio("one product", isa).value,
            "error": error[isa], "one_product_error": error["one product"], "same_result": error[isa] <= TOLERANCE,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser)
    parser.add_argument("--peak", type=float, help="float32 multiply-add peak per core, GFLOP/s (default: unknown)")
    args = parser.parse_args()

    def rounds(case: Case) -> int:
        return 7 if args.quick or case.flops > 2e10 else 15

    cases = QUICK_CASES if args.quick else CASES
    with torch_threads(args.threads):
        rows, complete = harness.measured(
            partial(measure, case, args.threads, rounds(case), args.peak) for case in cases
        )
    title = f"gram against torch, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete and all(row["same_result"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
