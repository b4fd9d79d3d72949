"""sparse_matmul against torch's dense float32 linear layer, on the same threads, taking turns.

python -m bench.bench_sparse_matmul [--threads N] [--quick] [--json] [--markdown FILE]
pytest bench/bench_sparse_matmul.py --benchmark-only      the same cases, one candidate at a time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bench import harness
from bench.shapes import LINEARS, SPARSITIES, TOKENS, Linear, random_input, random_weight
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops.sparse_matmul import Linear as Packed
from sparsebert.ops.sparse_matmul import PackedWeight, pack, sparse_matmul, sparse_matmul_ref, unpack

DENSE = "torch"
# Outputs have variance about 1; sums of up to 3072 float32 products differ by a few 1e-6.
TOLERANCE = 1e-4
COLUMNS = {
    "layer": "", "sparsity": ".3f", "tokens": "d", "isa": "", "us": ".1f", "spread": ".0%", "gflops": ".1f",
    "torch_us": ".1f", "speedup": ".2f", "low": ".2f", "high": ".2f", "error": ".0e",
}  # fmt: skip
NOTES = (
    "Float32 in and out, bias always, GELU where the layer has it (for both sides). `us` is the median time of a call, "
    "`gflops` counts 2 x true non-zeros x tokens, `speedup` is the median over rounds of torch's time over ours with "
    "its 95 % interval by order statistics (`low`, `high`), `error` the largest absolute difference from the float64 "
    "reference."
)


class Case(NamedTuple):
    linear: Linear
    sparsity: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.linear}, sparsity {self.sparsity}, {self.tokens} tokens"


# Every token count at the sparsity the models are pruned to, every sparsity at one full sequence.
CASES = [
    Case(linear, sparsity, tokens)
    for linear in LINEARS
    for sparsity in SPARSITIES
    for tokens in TOKENS
    if sparsity == 0.875 or tokens == 128
]
QUICK_CASES = [case for case in CASES if case.sparsity == 0.875 and case.tokens in (27, 128)]


def candidates(case: Case, threads: int) -> tuple[dict[str, Callable[[], np.ndarray]], PackedWeight, np.ndarray]:
    """Name -> call, for every instruction set here and torch; then the packed weight and the expected output."""
    linear = case.linear
    weight = pack(random_weight(linear.n_out, linear.n_in, case.sparsity))
    bias = random_input(1, linear.n_out, seed=2)[0]
    x = random_input(case.tokens, linear.n_in)
    dense_x, dense_weight, dense_bias = (torch.from_numpy(a) for a in (x, unpack(weight), bias))

    def dense() -> np.ndarray:
        y = torch.nn.functional.linear(dense_x, dense_weight, dense_bias)
        return (torch.nn.functional.gelu(y) if linear.gelu else y).numpy()

    packed = Packed(weight, bias, "gelu" if linear.gelu else "none")

    def ours(isa: str) -> Callable[[], np.ndarray]:
        return lambda: sparse_matmul(x, packed, threads=threads, isa=isa)

    calls = {DENSE: dense} | {isa: ours(isa) for isa in harness.own_isas()}
    return calls, weight, sparse_matmul_ref(x, packed)


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    """One row an instruction set. Raises harness.WrongOutput."""
    calls, weight, expected = candidates(case, threads)
    timings, error = harness.time_checked(str(case), calls, expected, TOLERANCE, rounds=rounds, threads=threads)
    rows = []
    for isa in calls:
        if isa == DENSE:
            continue
        seconds = timings.median(isa)
        speedup = timings.ratio(DENSE, isa)
        rows.append({
            "layer": str(case.linear), "sparsity": case.sparsity, "tokens": case.tokens, "threads": threads, "isa": isa,
            "us": seconds * 1e6, "spread": timings.spread(isa), "gflops": 2e-9 * weight.nnz * case.tokens / seconds,
            "torch_us": timings.median(DENSE) * 1e6, "speedup": speedup.value, "low": speedup.low, "high": speedup.high,
            "error": error,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser)
    args = parser.parse_args()
    cases, rounds = (QUICK_CASES, 7) if args.quick else (CASES, 15)
    with torch_threads(args.threads):
        rows, complete = harness.measured(partial(measure, case, args.threads, rounds) for case in cases)
    title = f"sparse_matmul against torch, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


@pytest.mark.parametrize("name", [DENSE, *harness.own_isas()])
@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_speed(benchmark, case: Case, name: str):
    benchmark.group = str(case)
    with torch_threads(1):
        calls, _, expected = candidates(case, threads=1)
        harness.check(str(case), {name: calls[name]}, expected, TOLERANCE)
        benchmark.pedantic(calls[name], rounds=15, iterations=5, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
