"""Wall time and peak memory of pruning whole models, each in its own process.

python -m bench.bench_prune [--dense DIR] [--models minilm bert-base …] [--tier 0] [--pattern unstructured] [--json]

Encoders other than MiniLM are built from their configuration with random weights, as time and memory are measured, not
quality. Texts are MR's training sentences, joined to the length that a case names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench import harness

SPARSITY = 0.875


class Case(NamedTuple):
    """words: the length of a text, None for MR's own sentences. goal_s, goal_mib: the design's goals, if it has any."""

    tokens: int
    words: int | None
    goal_s: float | None = None
    goal_mib: float | None = None


CASES = {
    "minilm": Case(150_000, None, 120, 4096),
    "bert-base": Case(64_000, None, 720, 24 * 1024),
    "roberta-base": Case(64_000, 200, None, 24 * 1024),
    "bert-large": Case(64_000, None, None, 24 * 1024),
}
COLUMNS = {
    "case": "", "tokens": "d", "weights": ".1f", "seconds": ".1f", "goal_s": ".0f", "plan_s": ".0f", "peak_mib": ".0f",
    "goal_mib": ".0f", "plan_mib": ".0f", "sparsity": ".4f",
}  # fmt: skip
NOTES = (
    "`seconds` is the wall time of `prune` on the loaded model, without saving; `peak_mib` the peak memory of the "
    "process, Python and torch included; `weights` the prunable weights in millions; the `goal` columns are the "
    "design's goals, if it has any, the `plan` columns the estimates of --dry-run on the same machine."
)


def one(name: str, dense: Path | None, config: dict) -> dict:
    """Runs one case in this process."""
    import numpy as np
    import torch
    import transformers

    from sparsebert import checkpoint, data
    from sparsebert.config import PruneConfig
    from sparsebert.pruning import draw, prune
    from sparsebert.pruning.plan import plan_model

    case = CASES[name]
    examples = data.training(data.get_task("mr"))
    if case.words:  # the same sentences, end to end
        words = " ".join(examples.texts).split()
        texts = [" ".join(words[i : i + case.words]) for i in range(0, len(words), case.words)]
        examples = data.Examples("mr", "train", texts, None, np.zeros(len(texts), dtype=np.int64))
    model, tokenizer = checkpoint.load(dense or "minilm", **({} if dense else {"num_labels": 2}))
    if name != "minilm":
        sizes = {"vocab_size": len(tokenizer), "num_labels": 2, "pad_token_id": 0}
        kind = transformers.RobertaConfig if name.startswith("roberta") else transformers.BertConfig
        if name == "bert-large":
            sizes |= {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            }  # fmt: skip
        if kind is transformers.RobertaConfig:
            sizes |= {"max_position_embeddings": 514, "type_vocab_size": 2}
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(kind(**sizes))
    settings = PruneConfig(sparsity=SPARSITY, calibration_tokens=case.tokens, **config)
    texts = draw(model, tokenizer, examples, case.tokens, 512, seed=0)
    planned = plan_model(model, settings)
    start = time.perf_counter()
    result = prune(model, texts, settings)
    return {
        "case": name, "tokens": result.tokens, "weights": planned.weights / 1e6,
        "seconds": time.perf_counter() - start, "goal_s": case.goal_s, "plan_s": planned.seconds["total"],
        "peak_mib": result.peak_rss_mb, "goal_mib": case.goal_mib, "plan_mib": planned.memory_mb["peak"],
        "sparsity": result.sparsity,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, help="fine-tuned MiniLM directory (default: the packaged encoder)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=["minilm", "bert-base"])
    parser.add_argument("--method", default="knowledge")
    parser.add_argument("--tier", type=int, default=0, help="tier of method knowledge (default 0)")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = {"method": args.method, "pattern": args.pattern}
    if args.method == "knowledge":
        config["tier"] = args.tier
    if args.alone:
        print(json.dumps(one(args.alone, args.dense if args.alone == "minilm" else None, config)))
        return 0
    rows = []
    for name in args.models:
        command = [sys.executable, "-m", "bench.bench_prune", *sys.argv[1:], "--alone", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    title = f"Pruning whole models: {args.method}" + (f" tier {args.tier}" if args.method == "knowledge" else "")
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
