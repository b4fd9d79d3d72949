"""Which rows share a group: those that want the same columns."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import Grouped

ROUNDS = 20
PRICE_STEPS = 300


def row_groups(scores: torch.Tensor, pattern: Grouped, sparsity: float) -> torch.Tensor:
    """A permutation of the rows, int64 [n_out], after which consecutive rows form groups that lose little: the sum of
    the scores that `pattern` keeps is a local maximum.

    scores: float32 [n_out, n_in], at least 0, what each weight is worth; every row counts the same, whatever its scale.
    Alternates between the columns that are best for the groups, and the assignment of rows to groups that is best for
    the columns (a linear assignment problem); neither step can lose. Starts from groups of similar rows: the most
    unlike row left, with the rows nearest to it.
    """
    scores = scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    order = _similar(scores.sqrt().numpy(), pattern.rows)
    best = -1.0
    for _ in range(ROUNDS):
        kept = pattern_mask(scores[order], pattern, sparsity)
        value = float(scores[order][kept].sum())
        if value <= best * (1 + 1e-6):
            break
        best, chosen = value, order
        gain = scores @ kept[:: pattern.rows].float().T
        order = torch.from_numpy(np.argsort(assigned(gain.numpy(), pattern.rows), kind="stable"))
    return chosen


def assigned(gain: np.ndarray, rows: int) -> np.ndarray:
    """The group of every row, `rows` rows to a group, of the greatest sum of `gain` [n_out, groups].

    Exact, by a linear assignment of rows to seats. As every seat is taken, a price a group changes no choice between
    assignments; prices at which each group is the first choice of about `rows` rows leave the solver few conflicts, and
    1536 rows take a twentieth of the time.
    """
    step = 0.2 * gain.std()
    prices = np.zeros(gain.shape[1])
    for i in range(PRICE_STEPS):
        first = np.bincount((gain - prices).argmax(1), minlength=len(prices))
        prices += step / (1 + i / 20) * (first / rows - 1)
    _, seats = linear_sum_assignment(np.repeat(gain - prices, rows, 1), maximize=True)
    return seats // rows


def _similar(profiles: np.ndarray, rows: int) -> torch.Tensor:
    """Rows in groups: each group the row farthest from the mean of those left, and its nearest neighbours."""
    left = np.arange(len(profiles))
    order = []
    while len(left):
        part = profiles[left]
        seed = part[np.argmax(((part - part.mean(0)) ** 2).sum(1))]
        nearest = np.argsort(-(part @ seed), kind="stable")[:rows]
        order.append(left[nearest])
        left = np.delete(left, nearest)
    return torch.from_numpy(np.concatenate(order))
