"""Where a fine-tuning step's time goes: MiniLM-L6 on MR, batches of 32, the variants taking turns.

python -m bench.bench_train [--rounds 15] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import TrainConfig
from sparsebert.encoders import bucketed, collate, tokenize
from sparsebert.engine.measure import interleave
from sparsebert.training.finetune import Run

COLUMNS = {"variant": "", "step_ms": ".0f", "spread": ".0%", "times_ours": ".2f", "low": ".2f", "high": ".2f"}
NOTES = (
    "`step_ms` is the median time of one step (forward, backward, clipping, AdamW), `times_ours` the median over "
    "rounds of its time over the first row's, with a 95 % interval (order statistics). "
    "Every variant sees the same number of sentences."
)
VARIANTS = {
    "bf16, fused AdamW, buckets (ours)": {"precision": "bf16", "fused": True, "buckets": True},
    "bf16, AdamW by foreach, buckets": {"precision": "bf16", "fused": False, "buckets": True},
    "bf16, fused AdamW, random batches": {"precision": "bf16", "fused": True, "buckets": False},
    "fp32, fused AdamW, buckets": {"precision": "fp32", "fused": True, "buckets": True},
}


def stepper(precision: str, fused: bool, buckets: bool) -> Callable[[], None]:
    """A call that does the next training step of its own model."""
    task = data.get_task("mr")
    examples = data.load(task, task.train)
    config = TrainConfig(precision=precision)
    model, tokenizer = checkpoint.load("minilm", num_labels=2)
    encoded = tokenize(tokenizer, examples, task.max_length)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(encoded))
    plan = bucketed(encoded, 32, rng) if buckets else [order[i : i + 32] for i in range(0, len(order), 32)]
    run = Run(model, config, len(plan), Path("/nonexistent"), key="bench")
    if not fused:
        for group in run.optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
    labels = torch.from_numpy(examples.labels)
    upcoming = iter(plan)

    def step() -> None:
        rows = next(upcoming)
        run.advance(collate(tokenizer, encoded, rows), labels[rows], snapshots=False)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    steps = {name: stepper(**settings) for name, settings in VARIANTS.items()}
    timings = interleave(steps, args.rounds, warmup=2, repeats=4)  # four steps a turn: lengths differ between batches
    ours = next(iter(VARIANTS))
    rows = []
    for name in VARIANTS:
        ratio = timings.ratio(name, ours)
        rows.append({
            "variant": name, "step_ms": timings.median(name) * 1e3, "spread": timings.spread(name),
            "times_ours": ratio.value, "low": ratio.low, "high": ratio.high,
        })  # fmt: skip
    harness.report("A fine-tuning step of MiniLM-L6", rows, COLUMNS, NOTES, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
