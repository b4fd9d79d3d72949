"""The effect of a debiased loss on HANS: on the answer a model prefers, or on how well it tells the classes apart.

python -m bench.study_hans MODELS [--n 6000] [--seed 0] [--json] [--markdown FILE]

MODELS: the folder of fine-tuned models that `sparsebert study srnets` writes, mnli-LOSS-SEED-SETTINGS; those saved on
the way there, …-at-SHARE, get rows of their own, compared with each other.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench import harness
from sparsebert import checkpoint
from sparsebert.cli.output import progress
from sparsebert.errors import InputError
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


NAME = re.compile(r"mnli-(?P<loss>[a-z-]+)-(?P<seed>\d+)-[0-9a-f]{12}(-at-(?P<share>[0-9.e-]+))?")
Kind = tuple[str, str]  # a loss, and " at SHARE" for models from before the end of their fine-tuning, else ""


def kind_of(name: str) -> tuple[str, str, int]:
    """(loss, " at SHARE" or "", seed) of a model, by the name of its directory. InputError for another name."""
    if (match := NAME.fullmatch(name)) is None:
        raise InputError(f"models must be named mnli-LOSS-SEED-SETTINGS, got {name}", fix="move it to another folder")
    return match["loss"], f" at {match['share']}" if match["share"] else "", int(match["seed"])


def rows_of(found: dict[Kind, dict[int, dict]]) -> list[harness.Row]:
    """One row per kind of model and figure. found: the figures by kind and seed."""
    rows = []
    for (loss, at), by_seed in sorted(found.items()):
        base = found.get(("ce", at), {})
        both = sorted(by_seed.keys() & base.keys())
        for figure in FIGURES:
            values = np.array([by_seed[seed][figure] for seed in sorted(by_seed)])
            low, high = mean_interval(values)
            row = {
                "loss": loss + at, "figure": figure, "seeds": len(values), "mean": values.mean(), "low": low,
                "high": high,
            }  # fmt: skip
            if loss != "ce" and len(both) >= 2:
                over = paired_over_seeds(*(np.array([of[seed][figure] for seed in both]) for of in (by_seed, base)))
                row |= {
                    "over_ce": over.difference, "over_low": over.difference_ci[0], "over_high": over.difference_ci[1],
                    "p": over.sign_flip_p,
                }  # fmt: skip
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--n", type=int, default=6000, help="examples of each set (default 6000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subset")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    found: dict[Kind, dict[int, dict]] = defaultdict(dict)
    paths = [path for path in sorted(args.models.glob("mnli-*")) if checkpoint.read_manifest(path) is not None]
    kinds = [kind_of(path.name) for path in paths]  # before any is evaluated
    if len(set(kinds)) < len(kinds):
        loss, at, seed = next(kind for kind in kinds if kinds.count(kind) > 1)
        raise InputError(
            f"{args.models} must hold one model of a loss and a seed, got several of {loss}{at}, seed {seed}",
            fix="move the others to another folder",
        )
    for path, (loss, at, seed) in zip(paths, kinds, strict=True):
        with progress(path.name) as update:
            result = evaluate(path, "mnli", ood="hans", n=args.n, seed=args.seed, progress=update)
        hans = result.ood["hans"]
        found[loss, at][seed] = {**hans, "hans_accuracy": hans["accuracy"], "accuracy": result.accuracy}
    rows = rows_of(found)
    harness.report("Debiased losses on HANS", rows, COLUMNS, NOTES.format(n=args.n), args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
