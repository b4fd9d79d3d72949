"""attention with dropout against torch's attention in training: forward and backward, taking turns.

python -m bench.bench_attention [--threads N] [--quick] [--json] [--markdown FILE]
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
from sparsebert.ops.attention import attention, attention_ref

P = 0.1
# Relative to the largest value. The sums are float32; in bfloat16 torch rounds softmax and products to 2^-9, ours only
# the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
COLUMNS = {
    "texts": "d", "tokens": "d", "padded": ".0%", "heads": "d", "size": "d", "dtype": "", "isa": "", "threads": "d",
    "ours_ms": ".2f", "spread": ".0%", "gflops": ".0f", "sdpa_ms": ".2f", "eager_ms": ".2f", "faster": "",
    "ratio": ".1f", "low": ".1f", "high": ".1f", "max_error": ".0e", "same_result": "",
}  # fmt: skip
NOTES = (
    "The attention of one layer with dropout 0.1: forward, and the gradients of q, k and v. `sdpa_ms`: torch's "
    "scaled_dot_product_attention, `eager_ms`: softmax and dropout written out, both in q's dtype; `ratio`: the median "
    "over rounds of the time of the faster of these two over ours, with its 95 % interval by order statistics. "
    "`gflops` counts seven products, padding included. Before timing, ours and torch's are compared with float64 "
    "without dropout: `max_error` is our largest difference in the result or a gradient, relative to its largest "
    "value."
)


class Case(NamedTuple):
    texts: int
    tokens: int
    heads: int
    size: int
    dtype: torch.dtype
    padded: float = 0.0  # share of padding in each text except the first

    @property
    def gflop(self) -> float:
        return 14e-9 * self.texts * self.heads * self.tokens**2 * self.size


CASES = [
    Case(*shape, dtype, padded)
    for dtype in (torch.bfloat16, torch.float32)
    for *shape, padded in (
        (32, 128, 12, 32, 0.0),  # MiniLM-L6
        (32, 40, 12, 32, 0.0),
        (32, 128, 12, 32, 0.25),
        (32, 128, 12, 64, 0.0),  # BERT-base
        (8, 512, 12, 64, 0.0),
    )
]


def sdpa(q, k, v, keep, p: float) -> torch.Tensor:
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    mask = None if keep is None else keep[:, None, None, :]
    return F.scaled_dot_product_attention(*by_head, attn_mask=mask, dropout_p=p).transpose(1, 2)


def eager(q, k, v, keep, p: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return (F.dropout(scores.softmax(-1), p) @ v).transpose(1, 2)


def ours(threads: int, q, k, v, keep, p: float) -> torch.Tensor:
    return attention(q, k, v, keep, dropout=p, seed=1 if p else 0, threads=threads)


def step(function: Callable, d_out: torch.Tensor, operands, keep, p: float) -> list[torch.Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().requires_grad_() for x in operands]
    out = function(*leaves, keep, p)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    rng = torch.Generator().manual_seed(0)
    *operands, d_out = (
        torch.randn(case.texts, case.tokens, case.heads, case.size, generator=rng).to(case.dtype) for _ in range(4)
    )
    keep = None
    if case.padded:
        keep = (torch.arange(case.tokens) < round((1 - case.padded) * case.tokens)).repeat(case.texts, 1)
        keep[0] = True
    functions = {"ours": partial(ours, threads), "sdpa": sdpa, "eager": eager}
    expected = step(
        lambda q, k, v, keep, p: attention_ref(q, k, v, keep), d_out, [x.double() for x in operands], keep, 0
    )
    errors = {}
    for name, function in functions.items():
        for got, wanted in zip(step(function, d_out, operands, keep, 0.0), expected, strict=True):
            scale = float(wanted.abs().max())
            values = (got.double() / scale).numpy()
            error = harness.check(str(case), {name: lambda values=values: values}, (wanted / scale).numpy(),
                                  TOLERANCE[case.dtype])  # fmt: skip
            errors[name] = max(errors.get(name, 0.0), error)
    calls = {name: partial(step, function, d_out, operands, keep, P) for name, function in functions.items()}
    timings = interleave(calls, rounds, warmup=2, settle=5e-3 if threads > 1 else 0.0)
    faster = min(("sdpa", "eager"), key=timings.median)
    ratio, seconds = timings.ratio(faster, "ours"), timings.median("ours")
    return [{
        **case._asdict(), "dtype": str(case.dtype).removeprefix("torch."), "isa": _dispatch.isa(), "threads": threads,
        "ours_ms": 1e3 * seconds, "spread": timings.spread("ours"), "gflops": case.gflop / seconds,
        "sdpa_ms": 1e3 * timings.median("sdpa"), "eager_ms": 1e3 * timings.median("eager"), "faster": faster,
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "max_error": errors["ours"], "same_result": True,
    }]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=2)
    args = parser.parse_args()
    with torch_threads(args.threads):
        rows, complete = harness.measured(
            partial(measure, case, args.threads, 7 if args.quick else 15) for case in CASES[: 1 if args.quick else None]
        )
    title = f"attention with dropout in training, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
