"""The quality of the pruning methods: every cell is one dense model, one draw of calibration texts and one setting.

python -m bench.study_pruning main|patterns|ladder --dense DIR [DIR …] --work FOLDER [--task sst2] [--markdown FILE]

`main` compares the methods at 87.5 %, `patterns` at other sparsities and patterns, `ladder` adds the steps of
`knowledge` one by one and takes each away. A finished cell is a row of FOLDER/ledger.sqlite: the same command resumes.
Cells are
paired: a ratio is taken within a dense model and draw, and its mean over them is geometric.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy import stats

from bench import harness
from sparsebert import checkpoint, data, encoders, ledger
from sparsebert.config import PruneConfig
from sparsebert.pruning import CODE, METHODS, OPS, draw, prune
from sparsebert.robustness.evaluation import compare

BASE = "adaptive"
KNOWLEDGE = {f"knowledge {tier}": {"method": "knowledge", "tier": tier} for tier in (0, 1, 2)}
MAIN = {name: {"method": name} for name in reversed(METHODS) if name != "knowledge"} | {
    "adaptive as published": {"method": "adaptive", "as_published": True},
    **KNOWLEDGE,
}
FEW = {name: MAIN[name] for name in ("sparsegpt", "adaptive", *KNOWLEDGE)}
SPACES = {
    "30 %": {"sparsity": 0.3},
    "50 %": {"sparsity": 0.5},
    "75 %": {"sparsity": 0.75},
    "95 %": {"sparsity": 0.95},
    "2:4": {"pattern": "2:4"},
    "16x1": {"pattern": "16x1"},
    "32x1": {"pattern": "32x1"},
    "32x1 50 %": {"pattern": "32x1", "sparsity": 0.5},
}


def _ladder() -> dict[str, dict]:
    """SparseGPT, then each step added, then each taken from the whole."""
    steps = ["refit", "target", "admm", "cls", "heads", "tokens", "outputs", "allocation", "distill", "perturb"]
    tiers = {"tokens": 1, "outputs": 1, "allocation": 1, "distill": 2, "perturb": 2}
    rungs = {"sparsegpt": {"method": "sparsegpt"}}
    for i, step in enumerate(steps):
        tier = max(tiers.get(s, 0) for s in steps[: i + 1])
        missing = [s for s in steps[i + 1 :] if tiers.get(s, 0) <= tier]
        rungs[f"+ {step}"] = {"method": "knowledge", "tier": tier, "without": ",".join(missing)}
    for step in steps:
        # Without distillation there is nothing to perturb, and the last rung but one has that.
        if step not in ("distill", "perturb"):
            rungs[f"all - {step}"] = {"method": "knowledge", "tier": 2, "without": step}
    for name in ("sparsegpt", "adaptive"):
        rungs[name] = {"method": name}
    return rungs


def settings(which: str) -> Iterator[tuple[str, str, dict]]:
    """(space, name, configuration) of every row of a table."""
    if which == "main":
        yield from (("87.5 %", name, config) for name, config in MAIN.items())
    elif which == "ladder":
        yield from (("87.5 %", name, config) for name, config in _ladder().items())
    else:
        for space, where in SPACES.items():
            yield from ((space, name, config | where) for name, config in FEW.items())


def cell(dense: Path, task: str, config: PruneConfig) -> dict:
    """One dense model pruned and compared with itself on the reported split."""
    spec = data.get_task(task)
    model, tokenizer = checkpoint.load(dense)
    examples = data.load(spec, spec.test)
    wanted = encoders.predict(model, tokenizer, examples, max_length=spec.max_length)
    texts = draw(model, tokenizer, data.load(spec, spec.train), config.calibration_tokens, spec.max_length, config.seed)
    result = prune(model, texts, config)
    logits = encoders.predict(model, tokenizer, examples, max_length=spec.max_length)
    dense_accuracy = float((wanted.argmax(1) == examples.labels).mean())
    return asdict(compare(spec, examples, logits, wanted)) | {
        "dense_accuracy": dense_accuracy,
        "sparsity": result.sparsity,
        "seconds": result.seconds,
        "peak_rss_mb": result.peak_rss_mb,
        "tokens": result.tokens,
    }


def summary(cells: dict[tuple[str, str], list[dict]]) -> list[harness.Row]:
    """One row a (space, name): means over its cells, and the ratio of KL to the base method's in the same cells."""
    rows = []
    for (space, name), found in cells.items():
        base = cells.get((space, BASE), [])
        row: harness.Row = {
            "space": space,
            "method": name,
            "cells": len(found),
            "sparsity": float(np.mean([c["sparsity"] for c in found])),
            "accuracy": 100 * float(np.mean([c["accuracy"] for c in found])),
            "change": 100 * float(np.mean([c["difference"] for c in found])),
            "agreement": 100 * float(np.mean([c["agreement"] for c in found])),
            "kl": float(np.mean([c["kl_to_dense"] for c in found])),
            "seconds": float(np.median([c["seconds"] for c in found])),
        }
        if len(base) == len(found):
            logs = np.log([c["kl_to_dense"] / b["kl_to_dense"] for c, b in zip(found, base, strict=True)])
            row["ratio"] = float(np.exp(logs.mean()))
            if len(logs) > 2 and name != BASE:
                half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
                row["low"], row["high"] = float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))
        rows.append(row)
    return rows


COLUMNS = {
    "space": "", "method": "", "cells": "d", "sparsity": ".4f", "accuracy": ".2f", "change": "+.2f",
    "agreement": ".2f", "kl": ".4f", "ratio": ".3f", "low": ".3f", "high": ".3f", "seconds": ".0f",
}  # fmt: skip
NOTES = (
    "`accuracy`, its `change` from the same dense model, and `agreement` with it in percent; `kl` is the mean "
    "KL(dense ‖ pruned) in nats; all are means over cells (a dense model and a draw of calibration texts). `ratio` is "
    f"the geometric mean over cells of `kl` over that of `{BASE}` in the same cell, `low` and `high` its 95 % interval "
    "(t, over cells). `seconds` is the median time of a prune, on a machine that may have been busy with other work."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["main", "patterns", "ladder"])
    parser.add_argument("--dense", type=Path, nargs="+", required=True, help="dense model directories, one a seed")
    parser.add_argument("--work", type=Path, required=True, help="folder of the ledger")
    parser.add_argument("--draws", type=int, default=2, help="draws of calibration texts a dense model (default 2)")
    parser.add_argument("--diagonal", action="store_true", help="one draw a dense model, a different one each")
    parser.add_argument("--only", nargs="+", default=[], help="names of methods or rungs (default: all)")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--tokens", type=int, default=150_000, help="calibration tokens")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    book = ledger.Ledger(args.work / "ledger.sqlite")
    pairs = [(d, i) for i, d in enumerate(args.dense)]
    if not args.diagonal:
        pairs = [(d, draw_seed) for draw_seed in range(args.draws) for d in args.dense]
    rows = [row for row in settings(args.which) if not args.only or row[1] in args.only]
    cells: dict[tuple[str, str], list[dict]] = {}
    for dense, seed in pairs:
        weights = checkpoint.weights_sha256(dense)
        for space, name, fields in rows:
            config = PruneConfig(seed=seed, calibration_tokens=args.tokens, **fields)
            inputs = {"weights": weights, "task": args.task, "config": config.model_dump()}
            found = book.once(
                "study", inputs, lambda dense=dense, config=config: cell(dense, args.task, config), *CODE, *OPS
            )
            print(f"{dense.name} {seed} {space} {name}: kl {found['kl_to_dense']:.4f}", file=sys.stderr, flush=True)
            cells.setdefault((space, name), []).append(found)
    harness.report(f"Pruning {args.task}: {args.which}", summary(cells), COLUMNS, NOTES, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
