"""Clustering of rows into groups: rows that need the same columns share a group."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sparsebert.errors import InputError
from sparsebert.ops.admm_prune import admm_prune
from sparsebert.patterns import Grouped

ROUNDS = 8
ENOUGH = 2e-3  # stops when a round lowers the loss by a smaller share
QUICK = 40  # iterations of ADMM for a rough support; the final support gets three times as many
PRICE_STEPS = 300


def row_groups(weight: torch.Tensor, h: torch.Tensor, pattern: Grouped, sparsity: float) -> torch.Tensor:
    """A permutation of the rows, int64 [n_out], after which consecutive rows form groups with a small loss.

    weight: W*, float64 [n_out, n_in], each row scaled by the square root of the weight that its errors have. h: H,
    float64 [n_in, n_in], symmetric positive definite. Lloyd's iteration in the metric of the loss, started from groups
    of rows spread over the whole matrix. In each round a short ADMM finds the columns of every group. Then every row is
    assigned to a group, `pattern.rows` to each, so that the total loss of least squares on the groups' columns is
    smallest (an assignment problem). Stops when a round gains less than ENOUGH.
    """
    groups = len(weight) // pattern.rows
    order = torch.arange(len(weight), device=weight.device).view(pattern.rows, groups).T.flatten()
    chosen, best = order, float("inf")
    for _ in range(ROUNDS):
        keep = admm_prune(weight[order].contiguous(), h, pattern, sparsity, iterations=QUICK)
        losses = row_losses(weight, h, keep[:: pattern.rows]).cpu()
        group = assigned(-losses.numpy(), pattern.rows)
        loss = float(losses[torch.arange(len(weight)), torch.from_numpy(group)].sum())
        if loss > best * (1 - ENOUGH):
            break
        chosen = order = torch.from_numpy(np.argsort(group, kind="stable")).to(weight.device)
        best = loss
    return chosen


def row_losses(weight: torch.Tensor, h: torch.Tensor, supports: torch.Tensor) -> torch.Tensor:
    """(v - w) H (v - w)ᵀ of every row w under every support, v the best row on it: float64 [n_out, supports].

    supports: bool [supports, n_in], True = kept. Raises InputError if H is not positive definite on a support. On a GPU
    the host waits for the numbers of kept columns, and for whether all factorisations worked.
    """
    wh = weight @ h
    losses = (wh * weight).sum(1, keepdim=True).repeat(1, len(supports))
    first = supports.int().argsort(dim=1, descending=True, stable=True)  # the kept columns, then the others
    failed = []
    for columns, count, loss in zip(first, supports.sum(1).tolist(), losses.T, strict=True):
        kept = columns[:count]
        factor, info = torch.linalg.cholesky_ex(h[kept][:, kept])
        failed.append(info)
        loss -= torch.linalg.solve_triangular(factor, wh[:, kept].T, upper=False).square().sum(0)
    if torch.stack(failed).any():
        raise InputError(
            "h must be positive definite on every support of a group",
            fix="raise the damping or give more calibration tokens",
        )
    return losses


def assigned(gain: np.ndarray, rows: int) -> np.ndarray:
    """The group of every row, `rows` rows per group, with the greatest sum of `gain` [n_out, groups].

    Exact, by a linear assignment of rows to seats. Every seat is taken, so a price per group changes the sum of all
    assignments equally. Prices at which each group is the first choice of about `rows` rows leave the solver few
    conflicts: 1536 rows take a twentieth of the time.
    """
    step = 0.2 * np.median(gain.std(1))  # the median, because a few rows may have nearly all of the gain
    prices = np.zeros(gain.shape[1])
    for i in range(PRICE_STEPS):
        first = np.bincount((gain - prices).argmax(1), minlength=len(prices))
        prices += step / (1 + i / 20) * (first / rows - 1)
    _, seats = linear_sum_assignment(np.repeat(gain - prices, rows, 1), maximize=True)
    return seats // rows
