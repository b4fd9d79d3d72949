"""topk_mask against torch.topk with a scatter, on the same threads, taking turns.

python -m bench.bench_topk_mask [--threads N] [--quick] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench import harness
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.topk_mask import topk_mask, topk_mask_ref

COLUMNS = {
    "case": "", "isa": "", "threads": "d", "ours_ms": ".3f", "spread": ".0%", "gb_s": ".1f",
    "reference_ms": ".3f",
    "ratio": ".1f", "low": ".1f", "high": ".1f", "sort_ms": ".2f", "same_result": "",
}  # fmt: skip
NOTES = (
    "`reference_ms` is the time of torch.topk's mask on the same threads, `sort_ms` the time of a stable argsort, "
    "`ratio` the median over rounds of the reference's time over ours with its 95 % interval; `gb_s` counts 4 bytes "
    "read and 1 written per score. `same_result`: our mask equals the stable sort's, ties included; of torch.topk's "
    "mask only the count is checked."
)
# (name, shape, k): top k of the whole matrix, of each row, and N:M.
CASES = (
    ("MiniLM out, matrix", (384 * 384,), 384 * 48),
    ("MiniLM ffn, matrix", (1536 * 384,), 1536 * 48),
    ("BERT ffn, matrix", (3072 * 768,), 3072 * 96),
    ("MiniLM ffn2, rows", (384, 1536), 192),
    ("BERT ffn2, rows", (768, 3072), 384),
    ("MiniLM ffn, 2:4", (1536 * 96, 4), 2),
    ("MiniLM ffn, 4:8", (1536 * 48, 8), 4),
    ("MiniLM ffn, 32:64", (1536 * 6, 64), 32),
)


def by_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, torch.topk(scores, k, sorted=False).indices, True)


def measure(case, threads: int, rounds: int, isas) -> list[harness.Row]:
    name, shape, k = case
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).square()
    expected = topk_mask_ref(scores, k)
    calls = {isa: lambda isa=isa: topk_mask(scores, k, threads=threads, isa=isa) for isa in isas}
    same = {isa: torch.equal(call(), expected) for isa, call in calls.items()}
    if by_topk(scores, k).sum() != expected.sum():
        raise harness.WrongOutput(f"{name}: torch.topk keeps a different number")
    calls |= {"topk": lambda: by_topk(scores, k), "sort": lambda: topk_mask_ref(scores, k)}
    timings = harness.interleave(calls, rounds, warmup=2, repeats=3)
    rows = []
    for isa in isas:
        ratio = timings.ratio("topk", isa)
        seconds = timings.median(isa)
        rows.append({
            "case": name, "isa": isa, "threads": threads, "ours_ms": 1e3 * seconds, "spread": timings.spread(isa),
            "gb_s": 5e-9 * scores.numel() / seconds, "reference_ms": 1e3 * timings.median("topk"),
            "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "sort_ms": 1e3 * timings.median("sort"),
            "same_result": same[isa],
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=2)
    args = parser.parse_args()
    isas = [_dispatch.isa()] if args.quick else list(_dispatch.float32_isas())
    with torch_threads(args.threads):
        rows = [row for case in CASES for row in measure(case, args.threads, 7 if args.quick else 15, isas)]
    title = f"topk_mask against torch.topk, {args.threads} threads"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if all(row["same_result"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
