"""dropout against torch's dropout: forward and backward, taking turns.

python -m bench.bench_dropout [--threads N] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F

from bench import harness
from sparsebert.engine.measure import interleave
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.dropout import dropout, dropout_ref

P = 0.1
COLUMNS = {
    "values": "d", "dtype": "", "isa": "", "threads": "d", "ours_ms": ".3f", "spread": ".0%", "gb_s": ".1f",
    "torch_ms": ".3f", "ratio": ".1f", "low": ".1f", "high": ".1f", "max_error": ".0e", "same_result": "",
}  # fmt: skip
NOTES = (
    "y and the gradient of x, with dropout 0.1. `ratio`: the median over rounds of torch's time over ours, with its 95 "
    "% interval by order statistics; `gb_s` counts each value as read and written once forward and once backward. "
    "`max_error`: the largest difference from the float64 reference, whose draws are made with numpy, relative to the "
    "largest value."
)
# Hidden states of 32 texts: MiniLM at 40 and 128 tokens, BERT-base at 128.
SIZES = (32 * 40 * 384, 32 * 128 * 384, 32 * 128 * 768)


def step(function, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


def measure(size: int, dtype: torch.dtype, threads: int, rounds: int) -> list[harness.Row]:
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(size, generator=rng).to(dtype) for _ in range(2))
    case = f"{size} values, {dtype}"
    mine = partial(dropout, p=P, seed=7, threads=threads)
    error = 0.0
    for got, wanted in zip(step(mine, x, dy), (dropout_ref(x, P, 7), dropout_ref(dy, P, 7)), strict=True):
        scale = float(wanted.abs().max())
        values = (got.double() / scale).numpy()
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        error = max(error, harness.check(case, {"ours": lambda v=values: v}, (wanted / scale).numpy(), tolerance))
    share = float((F.dropout(x, P) == 0).float().mean())
    if abs(share - P) > 0.01:
        raise harness.WrongOutput(f"{case}: torch drops {share:.1%}")
    calls = {"ours": partial(step, mine, x, dy), "torch": partial(step, partial(F.dropout, p=P), x, dy)}
    timings = interleave(calls, rounds, warmup=2, repeats=3, settle=5e-3 if threads > 1 else 0.0)
    ratio, seconds = timings.ratio("torch", "ours"), timings.median("ours")
    return [{
        "values": size, "dtype": str(dtype).removeprefix("torch."), "isa": _dispatch.isa(), "threads": threads,
        "ours_ms": 1e3 * seconds, "spread": timings.spread("ours"), "gb_s": 4e-9 * size * x.itemsize / seconds,
        "torch_ms": 1e3 * timings.median("torch"), "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
        "max_error": error, "same_result": True,
    }]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=2)
    args = parser.parse_args()
    sizes = SIZES[:1] if args.quick else SIZES
    with torch_threads(args.threads):
        rows, complete = harness.measured(
            partial(measure, size, dtype, args.threads, 7 if args.quick else 15)
            for dtype in (torch.bfloat16, torch.float32)
            for size in sizes
        )
    title = f"dropout in training, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
