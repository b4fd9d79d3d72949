"""The engine against itself: every pattern, sparsity, batch and length against dense weights, every batch against the
next smaller one, texts of mixed lengths against as many texts of 128 tokens.

python -m bench.bench_cells [--model minilm] [--dtype auto] [--threads N] [--rounds N] [--quick] [--json]
                            [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench import harness
from bench.shapes import random_directory
from sparsebert.cli.timing import texts_of
from sparsebert.config import BenchConfig
from sparsebert.engine import Engine
from sparsebert.engine.measure import Timings, interleave
from sparsebert.ops import _dispatch

DENSE = ("unstructured", 0.0)
PATTERNS = {
    "unstructured": (0.25, 0.5, 0.75, 0.9, 0.95), "2:4": (0.5,), "16x1": (0.25, 0.5, 0.75, 0.9, 0.95),
    "32x1": (0.25, 0.5, 0.75, 0.9, 0.95),
}  # fmt: skip
QUICK = {"unstructured": (0.5, 0.9), "16x1": (0.9,)}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (16, 64, 128, 512)
MIX, PADDED = 32, 128  # texts per batch, and the tokens to which they are lengthened
TURN_S = 2e-3
SLOWER = 0.98  # a cell is slower than dense if its whole interval is below this
STEP = 1.15  # a step to a larger batch is bad if its whole interval is above this
COLUMNS = {
    "pattern": "", "sparsity": ".2f", "seq": "", **{f"batch_{batch}": ".2f" for batch in BATCHES}, "slower": "d",
    "worst_step": ".2f", "bad_steps": "d",
}  # fmt: skip
NOTES = (
    "{model}, random weights, {threads} threads, {dtype}, from token ids to logits, medians over {rounds} rounds. "
    "`batch_N`: the time of our own dense engine over the time of this one, `slower` the number of these ratios whose "
    "95 % interval is wholly below 0.98. `worst_step`: the largest ratio of the time per text to the time per text in "
    "the next smaller batch, `bad_steps` the number of these ratios whose interval is wholly above 1.15. `seq` mix: "
    "sentences of MR in batches of 32; its `batch_32` is the time of as many texts of 128 tokens over the time of the "
    "sentences."
)


def cells_of(patterns: dict[str, tuple[float, ...]]) -> list[tuple[str, float]]:
    """(pattern, sparsity) of every model, dense first."""
    return [DENSE, *((pattern, sparsity) for pattern, of_it in patterns.items() for sparsity in of_it)]


def calls_in_turn(seconds: float) -> int:
    """As many calls of so many seconds as fit in TURN_S, from 1 to 50."""
    return max(1, min(50, int(TURN_S / seconds)))


def engines(model: str, patterns: dict, dtype: str, threads: int, folder: Path) -> dict[tuple[str, float], Engine]:
    """Engines with random weights for every pattern and sparsity, dense first. Loading verifies their logits."""
    wanted = cells_of(patterns)
    loaded = {}
    for i, (pattern, sparsity) in enumerate(wanted):
        directory = random_directory(model, pattern, sparsity, folder / str(i))
        loaded[pattern, sparsity] = Engine.load(directory, dtype=dtype, threads=threads)
        print(f"loaded {i + 1} of {len(wanted)}: {pattern}, {sparsity}", file=sys.stderr)
    return loaded


def forward(engine: Engine, ids: list[list[int]]) -> Callable[[], np.ndarray]:
    return partial(engine.forward, ids, [[0] * len(row) for row in ids])


def timed(calls: dict, rounds: int) -> Timings:
    """Times all candidates in turn, `calls_in_turn` at a time; times are per call."""
    probe = interleave(calls, rounds=1)
    repeats = {key: calls_in_turn(probe.minimum(key)) for key in calls}

    def turn(call: Callable[[], np.ndarray], n: int) -> None:
        for _ in range(n):
            call()

    timings = interleave({key: partial(turn, call, repeats[key]) for key, call in calls.items()}, rounds)
    return Timings({key: seconds / repeats[key] for key, seconds in timings.seconds.items()})


def measure(found: dict[tuple[str, float], Engine], length: int, rounds: int) -> list[harness.Row]:
    """One row per pattern and sparsity, for texts of one length."""
    ids = np.random.default_rng(0).integers(1000, 20000, (max(BATCHES), length)).tolist()
    timings = timed({(key, n): forward(engine, ids[:n]) for key, engine in found.items() for n in BATCHES}, rounds)
    rows = []
    for key in found:
        faster = {n: timings.ratio((DENSE, n), (key, n)) for n in BATCHES}
        steps = [timings.ratio((key, n), (key, before)) for before, n in pairwise(BATCHES)]
        growth = [n / before for before, n in pairwise(BATCHES)]
        rows.append({
            "pattern": key[0], "sparsity": key[1], "seq": str(length),
            **{f"batch_{n}": ratio.value for n, ratio in faster.items()},
            "slower": sum(ratio.high < SLOWER for ratio in faster.values()),
            "worst_step": max(step.value / by for step, by in zip(steps, growth, strict=True)),
            "bad_steps": sum(step.low / by > STEP for step, by in zip(steps, growth, strict=True)),
            "intervals": {n: [ratio.low, ratio.high] for n, ratio in faster.items()},
            "ms": {n: 1e3 * timings.median((key, n)) for n in BATCHES},
        })  # fmt: skip
    return rows


def measure_mix(found: dict[tuple[str, float], Engine], texts: list[list[int]], rounds: int) -> list[harness.Row]:
    """One row per pattern and sparsity: batches of mixed lengths against texts of PADDED tokens."""
    batches = [texts[i : i + MIX] for i in range(0, len(texts), MIX)]
    padded = [[(row * PADDED)[:PADDED] for row in batch] for batch in batches]
    calls = {}
    for key, engine in found.items():
        for name, of_it in (("mix", batches), ("padded", padded)):
            parts = [forward(engine, batch) for batch in of_it]
            calls[key, name] = partial(lambda parts: [part() for part in parts], parts)
    timings = timed(calls, rounds)
    rows = []
    for key in found:
        ratio = timings.ratio((key, "padded"), (key, "mix"))
        rows.append({
            "pattern": key[0], "sparsity": key[1], "seq": "mix", f"batch_{MIX}": ratio.value,
            "intervals": {MIX: [ratio.low, ratio.high]}, "ms": {MIX: 1e3 * timings.median((key, "mix")) / len(batches)},
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    harness.add_options(parser, threads=_dispatch.threads())
    parser.add_argument("--model", default="minilm", help="minilm (default), bert-base, bert-large, roberta-base")
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; an interval needs 6 (default 7)")
    args = parser.parse_args()
    if args.rounds < 6:
        parser.error(f"rounds must be at least 6, got {args.rounds}")
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        found = engines(args.model, QUICK if args.quick else PATTERNS, args.dtype, args.threads, Path(folder))
        for length in LENGTHS[:2] if args.quick else LENGTHS:
            rows += measure(found, length, args.rounds)
            print(f"timed texts of {length} tokens", file=sys.stderr)
        mixed = texts_of(Path(folder) / "0" / args.model, BenchConfig(n=4 * MIX))
        rows += measure_mix(found, [row["input_ids"] for row in mixed], args.rounds)
    rows.sort(key=lambda row: list(found).index((row["pattern"], row["sparsity"])))
    notes = NOTES.format(model=args.model, threads=args.threads, dtype=found[DENSE].dtype, rounds=args.rounds)
    harness.report("The engine against itself", rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
