"""The engine against other engines: whole classifiers with random weights, on texts of one length or of mixed lengths.

python -m bench.bench_end_to_end [--models minilm …] [--patterns unstructured …] [--sparsity S] [--rivals torch,…]
                                 [--dtype auto] [--threads N] [--quick] [--json] [--markdown FILE]
pytest bench/bench_end_to_end.py --benchmark-only      the quick cases, one engine at a time
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import harness
from bench.shapes import random_directory
from sparsebert import checkpoint
from sparsebert.cli.timing import random_model, texts_of
from sparsebert.config import BenchConfig
from sparsebert.encoders import collate
from sparsebert.engine import Engine
from sparsebert.engine.rivals import OURS, time_rivals, torch_threads
from sparsebert.ops import _dispatch

COLUMNS = {
    "model": "", "pattern": "", "sparsity": ".2f", "engine": "", "dtype": "", "batch": "d", "seq": "", "threads": "d",
    "p50_ms": ".2f", "p99_ms": ".2f", "seq_per_s": ".1f", "ratio": ".2f", "low": ".2f", "high": ".2f", "error": ".0e",
    "match": "",
}  # fmt: skip
NOTES = (
    "Random weights; tokenizing is outside all timings. `seq` is the number of tokens of every text, or mix: sentences "
    "of MR, 27 tokens on average, which the rivals pad to the longest of a batch. `p50_ms` and `p99_ms` are "
    "milliseconds per batch, `ratio` the median over rounds of the engine's time over ours with its 95 % interval by "
    "order statistics, `error` the largest difference of a logit from torch's in float32, `match`: it is within the "
    "tolerance of the dtype."
)


class Size(NamedTuple):
    batch: int
    seq: str
    n: int


SIZES = (Size(1, "16", 24), Size(1, "32", 24), Size(1, "128", 12), Size(8, "128", 24), Size(32, "mix", 128))
QUICK = (Size(1, "32", 24), Size(32, "mix", 64))


def measure(model: str, pattern: str, sizes: tuple[Size, ...], args: argparse.Namespace) -> list[harness.Row]:
    """One row per engine and size. Raises CheckpointError if our logits are not torch's."""
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = random_directory(model, pattern, args.sparsity, Path(folder), args.dtype)
        for size in sizes:
            config = BenchConfig(
                n=size.n, batch=size.batch, seq=size.seq, rounds=args.rounds, threads=args.threads, dtype=args.dtype,
                rivals=args.rivals, deepsparse_python=args.deepsparse_python,
            )  # fmt: skip
            result = time_rivals(directory, texts_of(directory, config), config)
            for row in result["rows"]:
                low, high = row.pop("ratio_ci")
                made = {"model": model, "pattern": pattern, "sparsity": 1 - result["density"]}
                rows.append(row | made | {"low": low, "high": high})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=_dispatch.threads())
    parser.add_argument("--models", nargs="+", default=["minilm"], help="minilm, bert-base, bert-large, roberta-base")
    parser.add_argument("--patterns", nargs="+", default=["unstructured"], help="patterns of the random weights")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of patterns that imply no sparsity (default 0.9)")
    parser.add_argument("--rivals", default="torch", help="as for `sparsebert bench`")
    parser.add_argument("--deepsparse-python", help="as for `sparsebert bench`")
    parser.add_argument("--dtype", default="auto", help="dtype of our engine: auto, fp32, bf16 or int8")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default 9)")
    args = parser.parse_args()
    rows: list[harness.Row] = []
    for model in args.models:
        for pattern in args.patterns:
            rows += measure(model, pattern, QUICK if args.quick else SIZES, args)
    harness.report("Whole models", rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return random_model(BenchConfig(random="minilm", sparsity=0.9), tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", ["torch", OURS])
@pytest.mark.parametrize("size", QUICK, ids=str)
def test_speed(benchmark, directory: Path, size: Size, name: str):
    import torch

    benchmark.group = str(size)
    model, tokenizer = checkpoint.load(directory)  # verifies the golden logits, as does Engine.load
    encoded = texts_of(directory, BenchConfig(n=size.batch, seq=size.seq))
    padded = collate(tokenizer, encoded, range(size.batch))
    engine = Engine.load(directory, threads=1)
    ids = [row["input_ids"] for row in encoded]

    def run_torch():
        with torch.inference_mode():
            model(**padded)

    call = run_torch if name == "torch" else lambda: engine.forward(ids, [[0] * len(row) for row in ids])
    with torch_threads(1):
        benchmark.pedantic(call, rounds=15, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
