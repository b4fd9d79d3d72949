"""masked_lstsq: exact least squares on a fixed support, every row of a linear at once."""

from __future__ import annotations

import torch

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch


def masked_lstsq(
    target: torch.Tensor,
    h: torch.Tensor,
    mask: torch.Tensor,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """V = argmin tr(V H Vᵀ) - 2 tr(V Tᵀ) over V that is zero outside the mask: H_SS v_S = t_S for each row's support S.

    target: T, float64 [rows, n_in]; with T = W* H the objective is tr((V - W*) H (V - W*)ᵀ) + const.
    h: H, float64 [n_in, n_in], symmetric positive definite; only i <= j is read.
    mask: bool [rows, n_in], True = kept; a row may be empty.
    Returns V, float64 [rows, n_in], exactly zero outside the mask. Rows of equal support (a group of a pattern, in any
    order) share one factorisation. Where a row keeps more than half of n_in the removed half is solved for instead: V =
    W* - W*_R (H⁻¹_RR)⁻¹ H⁻¹_R:, with R the removed columns; the same V.

    Raises InputError for wrong types or shapes, and for an H that is not positive definite on a support, naming row and
    pivot.
    """
    _check(target, h, mask)
    raise NotImplementedError


def masked_lstsq_ref(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `masked_lstsq` computes, row by row."""
    h = torch.triu(h) + torch.triu(h, 1).T
    v = torch.zeros_like(target)
    for row, keep in enumerate(mask):
        v[row, keep] = torch.linalg.solve(h[keep][:, keep], target[row, keep])
    return v
