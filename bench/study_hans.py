"""The effect of a debiased loss on HANS: on the answer a model prefers, or on how well it tells the classes apart.

python -m bench.study_hans MODELS [--n 6000] [--seed 0] [--json] [--markdown FILE]

MODELS: the folder of fine-tuned models that `sparsebert study srnets` writes, mnli-<loss>-<seed>-<settings>.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert import checkpoint
from sparsebert.cli.output import progress
from sparsebert.robustness import evaluate
from sparsebert.robustness.statistics import mean_interval, paired_over_seeds

FIGURES = ("accuracy", "hans_accuracy", "entailment", "non_entailment", "auroc")
COLUMNS = {"loss": "", "figure": "", "seeds": "d", "mean": ".3f", "low": ".3f", "high": ".3f", "over_ce": "+.3f",
           "over_low": "+.3f", "over_high": "+.3f", "p": ".3f"}  # fmt: skip
NOTES = (
    "Means over seeds with their 95 % t intervals; `over_ce`: the paired difference from cross-entropy on the same "
    "seeds, with its interval and the p of an exact sign-flip test. `accuracy`: MNLI-m; `entailment` and "
    "`non_entailment`: the share of each class of HANS that the largest logit finds; `auroc`: the probability that an "
    "example of entailment gets higher odds of it than one of non-entailment, 0.5 for a model that cannot tell them "
    "apart, whichever answer it prefers. Both sets are seeded random subsets of {n} examples."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--n", type=int, default=6000, help="examples of each set (default 6000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subset")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    paths = [path for path in sorted(args.models.glob("mnli-*")) if checkpoint.read_manifest(path) is not None]
    for path in paths:
        _, *loss, seed, _ = path.name.split("-")
        with progress(path.name) as update:
            result = evaluate(path, "mnli", ood="hans", n=args.n, seed=args.seed, progress=update)
        hans = result.ood["hans"]
        figures = {**hans, "hans_accuracy": hans["accuracy"], "accuracy": result.accuracy}
        found["-".join(loss)][int(seed)] = figures
    rows = []
    for loss, by_seed in sorted(found.items()):
        for figure in FIGURES:
            values = np.array([by_seed[seed][figure] for seed in sorted(by_seed)])
            low, high = mean_interval(values)
            row = {
                "loss": loss,
                "figure": figure,
                "seeds": len(values),
                "mean": values.mean(),
                "low": low,
                "high": high,
            }
            both = sorted(by_seed.keys() & found["ce"].keys())
            if loss != "ce" and len(both) >= 2:
                mine, base = (np.array([of[seed][figure] for seed in both]) for of in (by_seed, found["ce"]))
                over = paired_over_seeds(mine, base)
                row |= {
                    "over_ce": over.difference, "over_low": over.difference_ci[0], "over_high": over.difference_ci[1],
                    "p": over.sign_flip_p,
                }  # fmt: skip
            rows.append(row)
    harness.report("Debiased losses on HANS", rows, COLUMNS, NOTES.format(n=args.n), args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
