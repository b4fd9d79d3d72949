"""The engine against dense torch on a whole MiniLM-L6-sized classifier: real sentences, random sparse weights.

python -m bench.bench_end_to_end [--sparsity 0.875] [--rounds 15] [--markdown FILE]
pytest bench/bench_end_to_end.py --benchmark-only      the same cases, one candidate at a time
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import BenchConfig, PruneConfig
from sparsebert.encoders import collate, tokenize
from sparsebert.engine import Engine
from sparsebert.engine.rivals import compare_with_torch, torch_threads
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune

TASK, MAX_LENGTH = "mr", 128
COLUMNS = {
    "batch": "d", "threads": "d", "torch_ms": ".2f", "sparsebert_ms": ".2f", "speedup": ".2f", "low": ".2f",
    "high": ".2f", "torch_p99_ms": ".1f", "sparsebert_p99_ms": ".1f", "error": ".0e",
}  # fmt: skip
NOTES = (
    "Float32 on both sides, tokenizing outside both timings, sentences of MR (27 tokens on average). `torch_ms` and "
    "`sparsebert_ms` are milliseconds a sentence, `speedup` the median over rounds of their ratio with its 95 % "
    "interval by order statistics, the p99 columns milliseconds a batch, `error` the largest logit difference."
)


class Case(NamedTuple):
    batch: int
    threads: int


CASES = [Case(batch, threads) for threads in sorted({1, _dispatch.threads()}) for batch in (1, 8, 32)]


def model_directory(folder: Path, sparsity: float) -> Path:
    """A classifier of MiniLM-L6's shape with random weights, its linears pruned to `sparsity`, under `folder`."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    prune(model, [], PruneConfig(method="magnitude", sparsity=sparsity))
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.resolve("minilm"), local_files_only=True)
    checkpoint.save(model, tokenizer, folder / "model", recipe={"command": "bench"}, key="bench", figures={})
    return folder / "model"


def measure(directory: Path, case: Case, rounds: int) -> harness.Row:
    """One row. Raises CheckpointError where the two sides' logits differ."""
    task = data.get_task(TASK)
    examples = data.load(task, task.test, limit=128)
    settings = BenchConfig(n=128, batch=case.batch, rounds=rounds, threads=case.threads)
    result = compare_with_torch(directory, examples, settings, max_length=MAX_LENGTH)
    low, high = result["speedup_ci"]
    return {
        "batch": case.batch, "threads": case.threads, "speedup": result["speedup"], "low": low, "high": high,
        "torch_ms": result["latency_ms"]["torch"], "sparsebert_ms": result["latency_ms"]["sparsebert"],
        "torch_p99_ms": result["p99_ms"]["torch"], "sparsebert_p99_ms": result["p99_ms"]["sparsebert"],
        "error": result["max_logit_error"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.875)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = model_directory(Path(folder), args.sparsity)
        rows = [measure(directory, case, args.rounds) for case in CASES]
    title = f"A pruned MiniLM-L6 ({args.sparsity:.1%} zeros, unstructured) against dense torch"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown)
    return 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return model_directory(tmp_path_factory.mktemp("bench"), 0.875)


@pytest.mark.parametrize("name", ["torch", "sparsebert"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(benchmark, directory: Path, case: Case, name: str):
    benchmark.group = str(case)
    task = data.get_task(TASK)
    model, tokenizer = checkpoint.load(directory)  # verifies the golden logits, as does Engine.load
    encoded = tokenize(tokenizer, data.load(task, task.test, limit=case.batch), MAX_LENGTH)
    padded = collate(tokenizer, encoded, range(case.batch))
    engine = Engine.load(directory, threads=case.threads)

    def run_torch():
        with torch.inference_mode():
            model(**padded)

    def run_engine():
        engine.forward([row["input_ids"] for row in encoded], [row["token_type_ids"] for row in encoded])

    with torch_threads(case.threads):
        benchmark.pedantic({"torch": run_torch, "sparsebert": run_engine}[name], rounds=15, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
