"""The engine of this checkout against that of an earlier one, in the cells of bench_cells: a core that was rewritten
must not be slower in any.

python -m bench.bench_versions DIR [--model minilm] [--dtype fp32] [--threads N] [--rounds N] [--quick] [--json]
                               [--markdown FILE]
DIR: a checkout of the earlier commit, whose extension is built: git worktree add DIR COMMIT, then
     `python setup.py build_ext --inplace` in DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from bench import harness
from bench.bench_cells import BATCHES, LENGTHS, PATTERNS, QUICK, TURN_S, calls_in_turn, cells_of
from bench.shapes import random_directory
from sparsebert.engine.measure import Timings, in_order, ratio_text
from sparsebert.ops import _dispatch

COLUMNS = {
    "pattern": "", "sparsity": ".2f", "seq": "d", **{f"batch_{batch}": ".2f" for batch in BATCHES}, "slower": "d",
    "worst": "", "error": ".0e",
}  # fmt: skip
NOTES = (
    "{model}, random weights, {threads} threads, {dtype}, from token ids to logits. Each checkout has a process of its "
    "own; the two take turns of about {turn:.0f} ms in each of {rounds} rounds. Batches of more than {most:,} tokens "
    "are left out. `batch_N`: the median over rounds of the earlier one's time over this one's, so above 1 this one is "
    "faster; `slower` the number of these ratios whose 95 % interval by order statistics is wholly below 1; `worst` "
    "the smallest ratio with its interval. `error`: the largest difference of a logit between the two."
)
MOST_TOKENS = 8192  # larger batches are the same work, more often
TOLERANCE = 1e-3  # of a logit in fp32: the same products, perhaps in another order
# Runs in either checkout, so it uses only what both have. Asked for a batch and a number of calls, it answers with
# seconds per call; asked for no calls, with logits.
WORKER = """
import json, sys, time
from sparsebert.engine import Engine

directory, dtype, threads, ids = json.loads(sys.stdin.readline())
engine = Engine.load(directory, dtype=dtype, threads=threads)
print("ready", flush=True)
for line in sys.stdin:
    length, batch, calls = json.loads(line)
    rows = [row[:length] for row in ids[:batch]]
    types = [[0] * length for row in rows]
    if not calls:
        answer = engine.forward(rows, types).tolist()
    else:
        if calls > 1:
            engine.forward(rows, types)
        start = time.perf_counter()
        for _ in range(calls):
            engine.forward(rows, types)
        answer = (time.perf_counter() - start) / calls
    print("answer " + json.dumps(answer), flush=True)
"""
Ask = Callable[[int, int, int], float | list[list[float]]]
HERE = Path(__file__).resolve().parents[1]
THIS, EARLIER = "this", "earlier"


def worker(checkout: Path, stack: ExitStack, *settings: object) -> Ask:
    """A process in a checkout that has loaded a model. settings: its directory, dtype, threads, token ids. Call it with
    (tokens, batch, calls) for seconds per call, or for logits if there are no calls.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)

    def ask(*question: object) -> str:
        print(json.dumps(question), file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith(("ready", "answer ")):
                return line.removeprefix("answer ")
        raise RuntimeError(f"the process in {checkout} ended with code {process.wait()}")

    ask(*settings)
    return lambda *question: json.loads(ask(*question))


def compared(case: str, asks: dict[str, Ask], length: int, batch: int, rounds: int) -> tuple[Timings, float]:
    """Seconds per call of the two, in turn, and the largest difference of their logits. Raises WrongOutput."""
    logits = {name: np.array(ask(length, batch, 0)) for name, ask in asks.items()}
    error = harness.check(case, {THIS: lambda: logits[THIS]}, logits[EARLIER], TOLERANCE)
    calls = calls_in_turn(min(ask(length, batch, 1) for ask in asks.values()))
    seconds = {name: np.empty(rounds) for name in asks}
    for turn in range(rounds):
        for name in in_order(asks, turn):
            seconds[name][turn] = asks[name](length, batch, calls)
    return Timings(seconds), error


def measure(directory: Path, pattern: str, sparsity: float, lengths: tuple[int, ...], args) -> list[harness.Row]:
    """One row per length. Raises WrongOutput if the two compute different logits."""
    ids = np.random.default_rng(0).integers(1000, 20000, (max(BATCHES), max(lengths))).tolist()
    rows = []
    with ExitStack() as stack:
        asks = {
            name: worker(checkout, stack, str(directory), args.dtype, args.threads, ids)
            for name, checkout in ((THIS, HERE), (EARLIER, args.checkout))
        }
        for length in lengths:
            ratios, errors = {}, []
            for batch in BATCHES:
                if batch * length <= MOST_TOKENS:
                    case = f"{pattern} {sparsity}, {batch} x {length}"
                    timings, error = compared(case, asks, length, batch, args.rounds)
                    ratios[batch] = timings.ratio(EARLIER, THIS)
                    errors.append(error)
            worst = min(ratios.values())
            rows.append({
                "pattern": pattern, "sparsity": sparsity, "seq": length,
                **{f"batch_{batch}": ratio.value for batch, ratio in ratios.items()},
                "slower": sum(ratio.high < 1 for ratio in ratios.values()),
                "worst": ratio_text(worst.value, worst[1:]), "error": max(errors),
                "intervals": {batch: [ratio.low, ratio.high] for batch, ratio in ratios.items()},
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    harness.add_options(parser, threads=_dispatch.threads())
    parser.add_argument("checkout", metavar="DIR", type=Path, help="a checkout of the earlier commit, built")
    parser.add_argument("--model", default="minilm", help="minilm (default), bert-base, bert-large, roberta-base")
    parser.add_argument("--dtype", default="fp32", help="fp32 (default), bf16 or int8")
    parser.add_argument("--rounds", type=int, default=9, help="rounds; an interval needs 6 (default 9)")
    args = parser.parse_args()
    if args.rounds < 6:
        parser.error(f"rounds must be at least 6, got {args.rounds}")
    args.checkout = args.checkout.resolve()
    if not list(args.checkout.glob("sparsebert/_C.*.so")):
        parser.error(f"{args.checkout} must hold a built sparsebert: run `python setup.py build_ext --inplace` there")

    def case(pattern: str, sparsity: float) -> list[harness.Row]:
        with tempfile.TemporaryDirectory() as folder:
            directory = random_directory(args.model, pattern, sparsity, Path(folder), args.dtype)
            found = measure(directory, pattern, sparsity, LENGTHS[:2] if args.quick else LENGTHS, args)
        print(f"{pattern} {sparsity}: worst {', '.join(row['worst'] for row in found)}", file=sys.stderr)
        return found

    rows, right = harness.measured(partial(case, *of) for of in cells_of(QUICK if args.quick else PATTERNS))
    notes = NOTES.format(
        model=args.model, threads=args.threads, dtype=args.dtype, rounds=args.rounds, turn=1e3 * TURN_S,
        most=MOST_TOKENS,
    )  # fmt: skip
    harness.report("The engine of two versions", rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
