"""Dense torch on the same weights, timed in turn with the engine. The only place below the engine that may import
torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, machine
from sparsebert.config import BenchConfig
from sparsebert.data import Examples
from sparsebert.engine.engine import Engine
from sparsebert.engine.measure import interleave
from sparsebert.errors import CheckpointError
from sparsebert.ops import _dispatch


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch on `threads` threads inside the block, as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_with_torch(
    directory: str | Path,
    examples: Examples,
    config: BenchConfig,
    *,
    max_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Times `Engine` against torch fp32 on the classifier in `directory`: same weights, sentences, batches and threads.

    torch runs the stock model, whose matrices are dense whatever zeros they hold, in inference mode, each batch padded
    to its longest sentence. Tokenizing is outside both timings. Returns the document that `sparsebert bench` prints:
    latency_ms are milliseconds a sentence (median over rounds), p50_ms and p99_ms a batch, speedup is the median of the
    rounds' ratios with its 95 % interval (null below 6 rounds), max_logit_error is over all sentences.
    Raises CheckpointError where the two sides' logits differ by more than the golden tolerance.
    """
    import torch

    from sparsebert.encoders import collate, token_limit, tokenize

    threads = _dispatch.threads(config.threads)
    engine = Engine.load(directory, threads=threads)
    model, tokenizer = checkpoint.load(directory)
    encoded = tokenize(tokenizer, examples, token_limit(model, max_length))
    starts = range(0, len(encoded), config.batch)
    padded = [collate(tokenizer, encoded, range(i, min(i + config.batch, len(encoded)))) for i in starts]
    ragged = [
        [[row[part] for row in encoded[i : i + config.batch]] for part in ("input_ids", "token_type_ids")]
        for i in starts
    ]

    def run_torch(i: int) -> np.ndarray:
        with torch.inference_mode():
            return model(**padded[i]).logits.numpy()

    def run_engine(i: int) -> np.ndarray:
        return engine.forward(*ragged[i])

    runners = {"torch": run_torch, "sparsebert": run_engine}
    calls: dict[str, list[float]] = {name: [] for name in runners}
    turns = 0

    def turn(name: str) -> None:
        """One pass over all batches, each call timed on its own for the percentiles."""
        nonlocal turns
        for i in range(len(padded)):
            start = time.perf_counter()
            runners[name](i)
            calls[name].append(time.perf_counter() - start)
        turns += 1
        progress(turns, len(runners) * (config.rounds + 1))

    with torch_threads(threads):
        error = float(np.max([np.abs(run_torch(i) - run_engine(i)).max() for i in range(len(padded))]))
        if not error <= checkpoint.GOLDEN_TOLERANCE:
            raise CheckpointError(
                f"{directory}: the engine's logits must be torch's within {checkpoint.GOLDEN_TOLERANCE:g}, "
                f"differ by {error:g}",
                fix="run `sparsebert doctor`, then try SPARSEBERT_ISA=scalar",
            )
        timings = interleave({name: partial(turn, name) for name in runners}, config.rounds, warmup=1)
    measured = {name: np.array(seconds[len(padded) :]) * 1e3 for name, seconds in calls.items()}  # without the warm-up
    ratio = timings.ratio("torch", "sparsebert")
    return {
        "latency_ms": {name: timings.median(name) / len(examples) * 1e3 for name in runners},
        "p50_ms": {name: float(np.percentile(ms, 50)) for name, ms in measured.items()},
        "p99_ms": {name: float(np.percentile(ms, 99)) for name, ms in measured.items()},
        "speedup": ratio.value,
        "speedup_ci": [ratio.low, ratio.high],
        "max_logit_error": error,
        "batch": config.batch,
        "n": len(examples),
        "tokens": int(sum(len(row) for batch in ragged for row in batch[0])),
        "threads": threads,
        "density": engine.density,
        "rounds": config.rounds,
        "machine": machine.card(),
    }
