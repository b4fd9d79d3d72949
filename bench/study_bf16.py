"""The error of bf16: the engine's logits in fp32 and in bf16, each against stock torch's in float32.

python -m bench.study_bf16 MODEL… --task mnli [--n N] [--threads N] [--json] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert import checkpoint, data, encoders
from sparsebert.engine import Engine
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.robustness import statistics
from sparsebert.robustness.evaluation import compare

COLUMNS = {
    "model": "", "isa": "", "dtype": "", "n": "d", "accuracy": ".2f", "same_label": ".2f", "low": ".2f", "high": ".2f",
    "max_error": ".4f", "largest_logit": ".2f", "kl": ".1e", "texts_per_s": ".0f",
}  # fmt: skip
NOTES = (
    "{task}, its reported split, through `Engine.logits` on {threads} threads. `same_label`: percent of the texts to "
    "which the engine gives the same label as stock torch in float32, with its 95 % interval; `max_error` the largest "
    "difference of a logit, `kl` the mean KL(torch ‖ engine) in nats. The goal for bf16 is 99.8 %."
)


def measure(directory: Path, args: argparse.Namespace) -> list[harness.Row]:
    spec = data.get_task(args.task)
    examples = data.load(spec, spec.test, limit=args.n)
    with torch_threads(args.threads):
        model, tokenizer = checkpoint.load(directory)
        want = encoders.predict(model, tokenizer, examples, max_length=spec.max_length)
    pairs = examples.texts_b is not None
    texts = list(zip(examples.texts, examples.texts_b, strict=True)) if pairs else examples.texts
    rows = []
    for dtype in ("fp32", "bf16"):
        engine = Engine.load(directory, dtype=dtype, threads=args.threads)
        start = time.perf_counter()
        got = engine.logits(texts, max_length=spec.max_length, truncate=True)
        seconds = time.perf_counter() - start
        found = compare(spec, examples, got, want)
        low, high = statistics.wilson(round(found.agreement * len(texts)), len(texts))
        rows.append({
            "model": directory.name, "isa": engine.isa, "dtype": dtype, "n": len(texts),
            "accuracy": 100 * found.accuracy, "same_label": 100 * found.agreement, "low": 100 * low, "high": 100 * high,
            "max_error": float(np.abs(got - want).max()), "largest_logit": float(np.abs(want).max()),
            "kl": found.kl_to_dense, "texts_per_s": len(texts) / seconds,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--task", required=True)
    parser.add_argument("--n", type=int, help="number of texts, a seeded subset (default: all)")
    parser.add_argument("--threads", type=int, default=_dispatch.threads())
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    rows = [row for directory in args.models for row in measure(directory, args)]
    notes = NOTES.format(task=args.task, threads=args.threads)
    harness.report("bf16 against float32", rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
