"""How far a model is from the dense one on texts unlike the task's: no labels are needed."""

from __future__ import annotations

import numpy as np

from sparsebert.data import Examples, general_texts, in_pairs
from sparsebert.heads import Problem
from sparsebert.robustness import statistics
from sparsebert.robustness.evaluation import agreement, divergences

LONG, MOST = 150, 100  # words of a longer text at least; of such texts at most
OUTSIDE = LONGER, GENERAL = "longer texts", "general texts"


def unlike(examples: Examples) -> dict[str, Examples]:
    """Texts unlike `examples`, packaged all: "longer texts", made of them, and "general texts", sentences of a
    dictionary that nothing calibrates on (data.general_texts); without labels, pairs if these are.
    """
    pairs = in_pairs(general_texts(unseen=True), examples.texts_b is not None)
    general = Examples("general", "unseen", *pairs, None)
    return {LONGER: joined(examples, LONG).sample(MOST, 0), GENERAL: general}


def joined(examples: Examples, words: int, seed: int = 0) -> Examples:
    """Texts of at least so many words, each made of several in a seeded order, without labels; of pairs both sides are
    joined, and the first counts. None is in two, and those left over are dropped, unless they are all.
    """
    groups: list[list[int]] = [[]]
    length = 0
    for row in np.random.default_rng(seed).permutation(len(examples)):
        groups[-1].append(row)
        length += len(examples.texts[row].split())
        if length >= words:
            groups.append([])
            length = 0
    whole = groups[:-1] or groups

    def together(side: list[str]) -> list[str]:
        return [" ".join(side[i] for i in rows) for rows in whole]

    texts_b = None if examples.texts_b is None else together(examples.texts_b)
    return Examples(examples.task, examples.split, together(examples.texts), texts_b, None)


def drift(problem: Problem, dense: np.ndarray, logits: np.ndarray) -> dict:
    """The figures of `logits` [n, labels] beside the dense model's on the same texts: n, kl (mean divergence from
    dense, nats), kl_ci (95 %), agreement.
    """
    values = divergences(problem, dense, logits)
    return {
        "n": len(logits),
        "kl": float(values.mean()),
        "kl_ci": statistics.bootstrap_mean(values),
        "agreement": agreement(problem, problem.predict(logits), problem.predict(dense)),
    }
