"""A step of mask training in one linear layer against eager torch, forward and backward, taking turns.

python -m bench.bench_masked_matmul [--threads N] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from bench import harness
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops.masked_matmul import masked_matmul, masked_matmul_ref

# Of the largest entry of a gradient: float32 sums of up to 4096 products in another order; bfloat16 also rounds dL/dx.
TOLERANCE = {"fp32": 5e-6, "bf16": 6e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = {
    "dtype": "", "tokens": "d", "rows": "d", "cols": "d", "kept": ".0%", "threads": "d", "ours_ms": ".2f",
    "spread": ".0%", "eager_ms": ".2f", "sort_ms": ".2f", "gemm_ms": ".2f", "ratio": ".2f", "low": ".2f", "high": ".2f",
    "sort_ratio": ".2f", "max_grad_error": ".0e", "eager_grad_error": ".0e",
}  # fmt: skip
NOTES = (
    "Forward, dL/dx and dL/dm̂ of y = x (W ⊙ 1[m̂ ≥ φ])ᵀ + b, W [rows, cols] frozen. `eager_ms`: torch, which makes the "
    "mask and the masked weight, under autocast for bf16; `sort_ms`: the same with φ from a sort of the scores in each "
    "step; `gemm_ms`: torch's three dense products alone, in that dtype. `ratio`: median over rounds of eager's time "
    "over ours with its 95 % interval by order statistics. `max_grad_error`: largest error of ours in dL/dx and dL/dm̂, "
    "of the gradient's largest entry, from float64 of the same inputs; `eager_grad_error`: of eager."
)


class Case(NamedTuple):
    dtype: str
    tokens: int
    rows: int
    cols: int
    kept: float

    def __str__(self) -> str:
        return f"{self.dtype}, {self.tokens} tokens, {self.rows} x {self.cols}, {self.kept:.0%} kept"


CASES = [
    Case(dtype, tokens, rows, cols, kept)
    for dtype in DTYPES
    for tokens in (512, 4096)
    for rows, cols in ((3072, 768), (384, 384))
    for kept in ((0.5, 0.3, 0.1) if rows == 3072 else (0.5,))
]
QUICK_CASES = [case for case in CASES if case.tokens == 512 and case.kept == 0.5]


class Binarise(torch.autograd.Function):
    """1[m̂ ≥ φ], its derivative taken for 1."""

    @staticmethod
    def forward(ctx, scores, threshold):
        return (scores >= threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def eager(x, weight, scores, threshold, bias):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return linear(x, weight * Binarise.apply(scores, threshold), bias)


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    """One row. Raises harness.WrongOutput."""
    made = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.tokens, case.cols, generator=made).to(dtype).requires_grad_()
    grad_y = torch.randn(case.tokens, case.rows, generator=made).to(dtype)
    weight, bias = torch.randn(case.rows, case.cols, generator=made), torch.randn(case.rows, generator=made)
    scores = torch.rand(case.rows, case.cols, generator=made).requires_grad_()
    kept = round(case.kept * scores.numel())
    threshold = scores.detach().flatten().topk(kept).values[-1]

    def step(op: Callable, **how) -> Callable[[], None]:
        def call() -> None:
            x.grad = scores.grad = None
            op(x, weight, scores, threshold, bias, **how).backward(grad_y)

        return call

    def by_sort(x, weight, scores, threshold, bias):
        ranked = scores.detach().flatten().sort(descending=True).values
        return eager(x, weight, scores, ranked[kept - 1], bias)

    def products() -> None:
        with torch.no_grad():
            narrow = weight.to(dtype)
            linear(x, narrow)
            torch.mm(grad_y, narrow)
            torch.mm(grad_y.T, x)

    calls = {"ours": step(masked_matmul, threads=threads), "eager": step(eager), "sort": step(by_sort)}
    _, for_x, _, for_scores, _ = masked_matmul_ref(x.detach(), weight, scores.detach(), threshold, bias, grad_y)
    errors = {}
    for name in calls:
        calls[name]()
        off = [
            ((found.grad.double() - wanted).abs().max() / wanted.abs().max()).item()
            for found, wanted in ((x, for_x), (scores, for_scores))
        ]
        errors[name] = max(off)
    if not errors["ours"] <= TOLERANCE[case.dtype]:
        raise harness.WrongOutput(f"{case}: gradients are off by {errors['ours']:.1e} of their largest entry")
    timings = interleave(calls | {"gemm": products}, rounds, warmup=2, settle=5e-3 if threads > 1 else 0.0)
    ratio = timings.ratio("eager", "ours")
    milliseconds = {f"{name}_ms": 1e3 * timings.median(name) for name in (*calls, "gemm")}
    return [{
        **case._asdict(), "threads": threads, **milliseconds, "spread": timings.spread("ours"), "ratio": ratio.value,
        "low": ratio.low, "high": ratio.high, "sort_ratio": timings.ratio("sort", "ours").value,
        "max_grad_error": errors["ours"], "eager_grad_error": errors["eager"],
    }]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=2)
    args = parser.parse_args()
    cases, rounds = (QUICK_CASES, 7) if args.quick else (CASES, 15)
    with torch_threads(args.threads):
        rows, complete = harness.measured(lambda case=case: measure(case, args.threads, rounds) for case in cases)
    title = f"masked_matmul, a training step, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
