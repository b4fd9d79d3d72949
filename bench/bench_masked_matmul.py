"""masked_matmul against eager torch, which stores mask and product: a training step of a frozen layer, taking turns.

python -m bench.bench_masked_matmul [--threads N] [--kept SHARE ...] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench import harness
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.masked_matmul import _Straight, masked_matmul, masked_matmul_ref
from sparsebert.ops.topk_mask import topk_threshold

# Relative to the largest gradient. float32: sums of 4,096 products, one by one. bfloat16: values are rounded to 2^-9.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
COLUMNS = {
    "tokens": "d", "rows": "d", "cols": "d", "dtype": "", "kept": ".0%", "isa": "", "threads": "d",
    "ours_ms": ".2f", "spread": ".0%", "gflops": ".0f", "eager_ms": ".2f", "ratio": ".2f", "low": ".2f", "high": ".2f",
    "sort_ms": ".2f", "sort_ratio": ".1f", "max_grad_error": ".0e", "eager_grad_error": ".0e", "same_result": "",
}  # fmt: skip
NOTES = (
    "A step of mask training with a frozen weight [rows, cols]: y, and the gradients of x and of the scores. "
    "`eager_ms` is torch on the same threads: W * (s >= t), cast to x's dtype, F.linear, autograd with the "
    "straight-through estimator; `sort_ms` is the same, with a threshold from a sort of all scores in each step. "
    "`ratio` is the median over rounds of eager's time over ours with its 95 % interval by order statistics (`low`, "
    "`high`). `gflops` counts three dense products, whatever share is kept. Errors are the largest absolute difference "
    "of a gradient from float64, relative to its largest value."
)


class Case(NamedTuple):
    tokens: int
    rows: int
    cols: int
    dtype: torch.dtype
    kept: float

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.rows}x{self.cols}, {_name(self.dtype)}, {self.kept:.0%} kept"

    @property
    def flops(self) -> float:
        return 6.0 * self.tokens * self.rows * self.cols


# BERT-base: the two linears of the feed-forward part, then attention's.
SHAPES = ((3072, 768), (768, 3072), (768, 768))
DTYPES = (torch.float32, torch.bfloat16)


def eager(x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return F.linear(x, (weight * _Straight.apply(scores, threshold)).to(x.dtype))


def sorting(kept: int, x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, _) -> torch.Tensor:
    return eager(x, weight, scores, scores.detach().flatten().sort(descending=True).values[kept - 1])


def step(function: Callable, dy: torch.Tensor, x, weight, scores, threshold) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the scores."""
    x, scores = x.detach().requires_grad_(), scores.detach().requires_grad_()
    y = function(x, weight, scores, threshold)
    y.backward(dy.to(y.dtype))
    return x.grad, scores.grad


def error(case: Case, name: str, got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest error over the gradients. Raises harness.WrongOutput above the tolerance."""
    worst = 0.0
    for mine, reference in zip(got, expected, strict=True):
        scale = float(reference.abs().max())
        values = (mine.double() / scale).numpy()
        found = harness.check(str(case), {name: lambda values=values: values}, (reference / scale).numpy(),
                              TOLERANCE[case.dtype])  # fmt: skip
        worst = max(worst, found)
    return worst


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.cols, generator=rng).to(case.dtype)
    dy = torch.randn(case.tokens, case.rows, generator=rng).to(case.dtype)
    weight, scores = (torch.randn(case.rows, case.cols, generator=rng) for _ in range(2))
    kept = int(case.kept * scores.numel())
    threshold = topk_threshold(scores.flatten(), kept)
    calls = {
        name: partial(step, function, dy, x, weight, scores, threshold)
        for name, function in (
            ("ours", partial(masked_matmul, threads=threads)),
            ("eager", eager),
            ("sort", partial(sorting, kept)),
        )
    }
    expected = step(masked_matmul_ref, dy.double(), x.double(), weight, scores, threshold)
    errors = {name: error(case, name, call(), expected) for name, call in calls.items()}
    timings = interleave(calls, rounds, warmup=2, settle=5e-3 if threads > 1 else 0.0)
    ratio, seconds = timings.ratio("eager", "ours"), timings.median("ours")
    return [{
        "tokens": case.tokens, "rows": case.rows, "cols": case.cols, "dtype": _name(case.dtype), "kept": case.kept,
        "isa": _dispatch.isa(), "threads": threads, "case": str(case), "ours_ms": 1e3 * seconds,
        "spread": timings.spread("ours"), "gflops": 1e-9 * case.flops / seconds,
        "eager_ms": 1e3 * timings.median("eager"), "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
        "sort_ms": 1e3 * timings.median("sort"), "sort_ratio": timings.ratio("sort", "ours").value,
        "max_grad_error": errors["ours"], "eager_grad_error": errors["eager"],
        "same_result": errors["ours"] <= TOLERANCE[case.dtype],
    }]  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=2)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5], help="shares of kept weights (default 0.5)")
    args = parser.parse_args()
    shapes, tokens = (SHAPES[:1], (512,)) if args.quick else (SHAPES, (512, 4096))
    cases = [Case(n, *shape, dtype, kept) for shape in shapes for n in tokens for dtype in DTYPES for kept in args.kept]
    with torch_threads(args.threads):
        rows, complete = harness.measured(
            partial(measure, case, args.threads, 7 if args.quick or case.tokens > 512 else 15) for case in cases
        )
    title = f"masked_matmul against eager torch, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete and all(row["same_result"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
