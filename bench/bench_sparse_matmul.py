"""sparse_matmul against torch's dense linear layer and this op without sparsity, on the same threads, taking turns.

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
from bench.shapes import LINEARS, SPARSITIES, TOKENS, Linear, random_input, random_mask, random_weight
from sparsebert import environment
from sparsebert.engine.costs import costs
from sparsebert.engine.formats import pack_cheapest
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import Linear as Packed
from sparsebert.ops.sparse_matmul import pack_groups, pack_tiles, sparse_matmul, sparse_matmul_ref

TORCH, TORCH_BF16, DENSE = "torch", "torch-bf16", "dense "
# Outputs have variance about 1; sums of up to 3072 float32 products differ by a few 1e-6, in bf16 by a few 1e-2.
TOLERANCE, BF16_TOLERANCE = 1e-4, 0.1
PATTERNS = {"unstructured": 1, "16x1": 16, "32x1": 32}  # rows that share their columns
COLUMNS = {
    "layer": "", "pattern": "", "sparsity": ".3f", "tokens": "d", "isa": "", "ours_us": ".1f", "spread": ".0%",
    "gflops": ".1f", "torch_fp32_us": ".1f", "torch_bf16_us": ".1f", "dense_us": ".1f", "speedup": ".2f", "low": ".2f",
    "high": ".2f", "error": ".0e",
}  # fmt: skip
NOTES = (
    "All sides add the bias, and apply GELU if the layer has it. `ours_us` is the median time of a call, rows in and "
    "out, `dense_us` the time of this op on a matrix without zeros, `gflops` counts 2 x true non-zeros x tokens, "
    "`speedup` is the median over rounds of float32 torch's time over ours with its 95 % interval by order statistics "
    "(`low`, `high`), `error` our largest absolute difference from the float64 reference. SPARSEBERT_ISA caps torch as "
    "well. Float32, except for avx512_bf16 and amx."
)


class Case(NamedTuple):
    linear: Linear
    pattern: str
    sparsity: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.linear}, {self.pattern}, sparsity {self.sparsity}, {self.tokens} tokens"


# Every token count at the sparsity the models are pruned to, every sparsity and pattern at one full sequence.
CASES = [
    Case(linear, "unstructured", sparsity, tokens)
    for linear in LINEARS
    for sparsity in SPARSITIES
    for tokens in TOKENS
    if sparsity == 0.875 or tokens == 128
] + [Case(linear, pattern, 0.9, 128) for linear in LINEARS for pattern in ("16x1", "32x1")]
QUICK_CASES = [case for case in CASES if case.sparsity == 0.875 and case.tokens in (27, 128)]


def isas() -> tuple[str, ...]:
    """The instruction sets to time, up to SPARSEBERT_ISA; the portable path only if there is no other."""
    return tuple(isa for isa in _dispatch.allowed_isas() if isa != "scalar") or ("scalar",)


def candidates(case: Case, threads: int) -> tuple[dict[str, Callable[[], np.ndarray]], int, np.ndarray]:
    """(name -> call, number of non-zeros, expected output). The calls: torch, and each timed instruction set with and
    without sparsity.
    """
    linear = case.linear
    weight = random_weight(linear.n_out, linear.n_in, 0.0) / np.float32(np.sqrt(1 - case.sparsity))
    keep = random_mask(linear.n_out, linear.n_in, case.sparsity, PATTERNS[case.pattern], np.random.default_rng(0))
    # Without sparsity, tiny entries stand in place of the zeros, too small to change the output.
    pruned, filled = np.where(keep, weight, np.float32(0)), np.where(keep, weight, np.float32(1e-20))
    bias = random_input(1, linear.n_out, seed=2)[0]
    x = random_input(case.tokens, linear.n_in)
    tensors = [torch.from_numpy(a) for a in (x, pruned, bias)]
    activation = "gelu" if linear.gelu else "none"

    def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
        y = torch.nn.functional.linear(x, weight, bias)
        return (torch.nn.functional.gelu(y) if linear.gelu else y).float().numpy()

    calls = {
        TORCH: partial(dense, *tensors),
        TORCH_BF16: partial(dense, *(tensor.bfloat16() for tensor in tensors)),
    }
    for isa in isas():
        sparse = pack_tiles(pruned) if isa in environment.BF16_ISAS else pack_cheapest(pruned, costs(isa))[-1]
        whole = pack_tiles(filled) if isa in environment.BF16_ISAS else pack_groups(filled)
        for name, packed in ((isa, sparse), (DENSE + isa, whole)):
            calls[name] = partial(sparse_matmul, x, Packed(packed, bias, activation), threads=threads, isa=isa)
    return calls, int(keep.sum()), sparse_matmul_ref(x, Packed(pack_groups(pruned), bias, activation))


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    """One row per instruction set. Raises harness.WrongOutput."""
    calls, nnz, expected = candidates(case, threads)
    errors = {name: harness.check(str(case), {name: call}, expected, _tolerance(name)) for name, call in calls.items()}
    timings, _ = harness.time_checked(str(case), calls, expected, BF16_TOLERANCE, rounds=rounds, threads=threads)
    rows = []
    for isa in isas():
        seconds = timings.median(isa)
        speedup = timings.ratio(TORCH, isa)
        rows.append({
            "layer": str(case.linear), "pattern": case.pattern, "sparsity": case.sparsity, "rows": case.linear.n_out,
            "cols": case.linear.n_in, "tokens": case.tokens, "threads": threads, "isa": isa, "ours_us": seconds * 1e6,
            "spread": timings.spread(isa), "gflops": 2e-9 * nnz * case.tokens / seconds,
            "torch_fp32_us": timings.median(TORCH) * 1e6, "torch_bf16_us": timings.median(TORCH_BF16) * 1e6,
            "dense_us": timings.median(DENSE + isa) * 1e6, "speedup": speedup.value, "low": speedup.low,
            "high": speedup.high, "error": errors[isa], "match": True,
        })  # fmt: skip
    return rows


def _tolerance(name: str) -> float:
    return BF16_TOLERANCE if name == TORCH_BF16 or name.removeprefix(DENSE) in environment.BF16_ISAS else TOLERANCE


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


@pytest.mark.parametrize("name", [TORCH, *isas()])
@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_speed(benchmark, case: Case, name: str):
    benchmark.group = str(case)
    with torch_threads(1):
        calls, _, expected = candidates(case, threads=1)
        harness.check(str(case), {name: calls[name]}, expected, _tolerance(name))
        benchmark.pedantic(calls[name], rounds=15, iterations=5, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
