"""Sparse least squares for one linear: min ‖Y - V X̂‖² + λ‖V - W‖² over V with a given number of zeros.

With H = G + λI and T = C + λW (G the Gram matrix of X̂, C its cross moments with Y) the minimum without zeros is W* = T
H⁻¹, and the objective is const + tr((V - W*) H (V - W*)ᵀ): to re-solve densely and then to prune W* under H loses
nothing.
"""

from __future__ import annotations

import torch

from sparsebert.errors import InputError
from sparsebert.patterns import zeros_in


def damped(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(H, λ): the Gram matrix [n_in, n_in] float64 with λ = damping times its mean diagonal added to the diagonal."""
    ridge = damping * gram.diagonal().mean().item()
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype), ridge


def cholesky(h: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor of H, float64; InputError names the failing pivot and the damping tried."""
    factor, info = torch.linalg.cholesky_ex(h)
    if info.item() > 0:
        raise InputError(
            f"Hessian must be positive definite, pivot {info.item()} of {len(h)} is not, with damping {damping:g}",
            fix="raise --damping or --calibration",
        )
    return factor


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool mask, True at exactly `count` lowest scores; ties go to the lower index. Any shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.flatten(), stable=True)[:count]] = True
    return mask.view_as(scores)


def column_sweep(weight: torch.Tensor, factor: torch.Tensor, sparsity: float, block: int = 128) -> torch.Tensor:
    """Prunes W* under H column by column, each removal compensated in the columns to its right.

    weight: [n_out, n_in] float64, W*. factor: upper Cholesky factor U of H⁻¹ (H⁻¹ = Uᵀ U), float64. Returns float32
    with exactly floor(sparsity * n_out * n_in) zeros, spread evenly over the blocks of `block` columns: within one,
    those of lowest w² / U_jj².
    [Frantar & Alistarh 2023, SparseGPT, Algorithm 1; the code they released thresholds and can remove ties beyond the
    budget.]
    """
    w = weight.float()
    u = factor.float()
    rows, cols = w.shape
    removed = 0
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        budget = zeros_in(rows * stop, sparsity) - removed
        removed += budget
        part, u_part = w[:, start:stop], u[start:stop, start:stop]
        gone = lowest((part / u_part.diagonal()) ** 2, budget)
        error = torch.empty_like(part)
        for j in range(stop - start):
            error[:, j] = torch.where(gone[:, j], part[:, j] / u_part[j, j], 0.0)
            part[:, j:] -= torch.outer(error[:, j], u_part[j, j:])
        part[gone] = 0.0  # what rounding left of them
        w[:, stop:] -= error @ u[start:stop, stop:]
    return w
