"""sparse_encoder against stock torch on the same weights: whole classifiers, random weights, float32, from token ids.

python -m bench.bench_sparse_encoder [--threads N] [--quick] [--json] [--markdown FILE]
pytest bench/bench_sparse_encoder.py --benchmark-only      the quick cases, one candidate at a time
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers

from bench import harness
from bench.shapes import random_mask
from sparsebert.architectures import facts as facts_of
from sparsebert.engine import architectures
from sparsebert.engine.costs import costs
from sparsebert.engine.formats import pack_cheapest
from sparsebert.engine.rivals import torch_threads
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import PackedEncoder, sparse_encoder

MODELS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {},
}
PATTERNS = {"unstructured": 1, "16x1": 16, "32x1": 32}  # rows that share their columns
DENSE = "dense"
TOLERANCE = 1e-4  # logits are about 0.3 in size
COLUMNS = {
    "model": "", "pattern": "", "sparsity": ".2f", "batch": "d", "seq": "", "isa": "", "ours_ms": ".3f",
    "torch_ms": ".2f", "ratio": ".2f", "low": ".2f", "high": ".2f", "dense_ms": ".2f", "tokens_per_s": ".0f",
    "error": ".0e",
}  # fmt: skip
NOTES = (
    "`ours_ms` and `torch_ms` are medians of the time per batch, `ratio` the median over rounds of torch's time over "
    "ours with its 95 % interval, `dense_ms` the time of this op without sparsity, on the same weights before pruning. "
    "`seq` mix: lengths of 4 to 64 tokens, 27 on average; torch pads them to the longest. The other rows have no "
    "padding. `error` is the largest difference of a logit from torch's."
)


class Case(NamedTuple):
    model: str
    pattern: str
    sparsity: float
    batch: int
    seq: int | str

    def __str__(self) -> str:
        return f"{self.model}, {self.pattern} at {self.sparsity}, batch {self.batch} x {self.seq}"


SIZES = ((1, 16), (1, 32), (1, 128), (8, 128), (32, "mix"))
CASES = [
    Case(model, pattern, sparsity, *size)
    for model in MODELS
    for pattern, sparsity in (("unstructured", 0.9), ("16x1", 0.9), ("unstructured", 0.0))
    for size in SIZES
]
QUICK_CASES = [Case("minilm", "unstructured", 0.9, *size) for size in ((1, 32), (8, 128))]


@cache
def classifier(name: str, pattern: str, sparsity: float) -> tuple[torch.nn.Module, PackedEncoder]:
    """A classifier with random weights and random zeros, as torch's module and packed."""
    config = transformers.BertConfig(**MODELS[name], vocab_size=4096, num_labels=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for module in model.bert.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.from_numpy(random_mask(*module.weight.shape, sparsity, PATTERNS[pattern], rng))
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    table = costs(_dispatch.float32_isas()[-1])
    facts = facts_of(json.loads(config.to_json_string()), Path(name))
    return model, architectures.build(weights, facts, lambda weight, _: pack_cheapest(weight, table))[-1]


def lengths_of(case: Case) -> np.ndarray:
    if case.seq != "mix":
        return np.full(case.batch, case.seq)
    return np.clip(np.random.default_rng(1).lognormal(3.15, 0.55, case.batch), 4, 64).astype(int)


def candidates(case: Case, threads: int) -> tuple[dict[str, Callable[[], np.ndarray]], np.ndarray]:
    """(name -> call, torch's logits). The calls: each instruction set that is timed here, the dense op, and torch."""
    model, packed = classifier(case.model, case.pattern, case.sparsity)
    dense_model, dense = classifier(case.model, "unstructured", 0.0)
    lengths = lengths_of(case)
    ids = np.random.default_rng(2).integers(0, 4096, lengths.sum(), np.int32)
    inputs = ids, np.zeros_like(ids), np.cumsum([0, *lengths])
    padded = torch.zeros(case.batch, int(lengths.max()), dtype=torch.long)
    mask = torch.arange(padded.shape[1]) < torch.from_numpy(lengths)[:, None]
    padded[mask] = torch.from_numpy(ids).long()
    masked = None if mask.all() else mask.long()

    def run_torch(model: torch.nn.Module) -> np.ndarray:
        with torch.inference_mode():
            return model(padded, masked).logits.numpy()

    best = _dispatch.float32_isas()[-1]
    calls: dict[str, Callable[[], np.ndarray]] = {"torch": partial(run_torch, model)}
    for isa in _dispatch.float32_isas():
        if isa != "scalar" or best == "scalar":
            calls[isa] = partial(sparse_encoder, *inputs, packed, threads=threads, isa=isa)
    expected = run_torch(model)
    shift = expected - run_torch(dense_model)  # the dense op has other logits; the shift lets the same check cover them
    calls[DENSE] = lambda: sparse_encoder(*inputs, dense, threads=threads, isa=best) + shift
    return calls, expected


def measure(case: Case, threads: int, rounds: int) -> list[harness.Row]:
    """One row per instruction set. Raises harness.WrongOutput."""
    calls, expected = candidates(case, threads)
    timings, error = harness.time_checked(str(case), calls, expected, TOLERANCE, rounds=rounds, threads=threads)
    rows = []
    for isa in calls:
        if isa in ("torch", DENSE):
            continue
        seconds, ratio = timings.median(isa), timings.ratio("torch", isa)
        rows.append({
            "model": case.model, "pattern": case.pattern, "sparsity": case.sparsity, "batch": case.batch,
            "seq": case.seq, "threads": threads, "isa": isa, "ours_ms": seconds * 1e3,
            "torch_ms": timings.median("torch") * 1e3, "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
            "dense_ms": timings.median(DENSE) * 1e3, "tokens_per_s": float(lengths_of(case).sum() / seconds),
            "error": error,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser)
    args = parser.parse_args()
    cases, rounds = (QUICK_CASES, 7) if args.quick else (CASES, 15)
    with torch_threads(args.threads):
        rows, complete = harness.measured(partial(measure, case, args.threads, rounds) for case in cases)
    title = f"sparse_encoder against torch, {args.threads} thread{'s' if args.threads > 1 else ''}"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0 if complete else 1


@pytest.mark.parametrize("name", ["torch", DENSE, _dispatch.float32_isas()[-1]])
@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_speed(benchmark, case: Case, name: str):
    benchmark.group = str(case)
    with torch_threads(1):
        calls, expected = candidates(case, threads=1)
        harness.check(str(case), {name: calls[name]}, expected, TOLERANCE)
        benchmark.pedantic(calls[name], rounds=15, iterations=3, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
