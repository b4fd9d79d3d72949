"""Measures how far a model is from the dense one on texts unlike the task's. Needs no labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsebert import data
from sparsebert.data import Examples, general_texts, in_pairs
from sparsebert.errors import InputError
from sparsebert.heads import Problem
from sparsebert.robustness import statistics
from sparsebert.robustness.evaluation import agreement, divergences

LONG, MOST = 150, 100  # min words per longer text; max number of longer texts
OUTSIDE = LONGER, GENERAL = "longer texts", "general texts"


def unlike(examples: Examples) -> dict[str, Examples]:
    """Texts unlike `examples`, without labels; pairs if these are pairs. "longer texts" are made by joining `examples`;
    "general texts" are packaged sentences of a dictionary that nothing calibrates on (data.general_texts).
    """
    pairs = in_pairs(general_texts(unseen=True), examples.texts_b is not None)
    general = Examples("general", "unseen", *pairs, None)
    return {LONGER: joined(examples, LONG).sample(MOST, 0), GENERAL: general}


def joined(examples: Examples, words: int, seed: int = 0) -> Examples:
    """Texts of at least `words` words, without labels. Each is made of several examples in a seeded order. Of pairs
    both sides are joined, and the words of the first side count. No example is used twice; leftover ones are dropped,
    unless there is nothing else.
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


def unlabelled(files: Sequence[str], pair: bool, named: tuple[str, ...] = ()) -> list[Examples]:
    """The texts of each file once (data.read_texts, which takes `named` too), named as the file is; labels are ignored.
    pair: whether the task is of pairs; single texts are then paired, first half and second half (data.in_pairs).
    InputError for pairs if it is not, and for a single text if it is; DataError as of read_texts.
    """
    each: dict[Path, str] = {}
    for file in files:
        each.setdefault(Path(file).resolve(), file)
    found = []
    for file in each.values():
        columns, _ = data.read_texts(Path(file), named)
        if len(columns) == 2 and not pair:
            raise InputError(f"{file} has pairs, the task has single texts", fix="name a file of single texts")
        texts, texts_b = columns if len(columns) == 2 else in_pairs(columns[0], pair)
        if not texts:
            raise InputError(f"{file} must have at least two texts, as the task has pairs, has one", fix="add texts")
        found.append(Examples(file, "texts", texts, texts_b, None))
    return found


def drift(problem: Problem, dense: np.ndarray, logits: np.ndarray) -> dict:
    """Compares `logits` [n, labels] with the dense model's on the same texts. Returns n, kl (mean divergence from
    dense, nats), kl_ci (95 %), agreement, agreement_ci.
    """
    values = divergences(problem, dense, logits)
    return {
        "n": len(logits),
        "kl": float(values.mean()),
        "kl_ci": statistics.bootstrap_mean(values),
        **agreement(problem, problem.predict(logits), problem.predict(dense)),
    }
