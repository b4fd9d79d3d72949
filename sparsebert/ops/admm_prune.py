"""admm_prune: which weights of a linear to keep, by the alternating direction method of multipliers."""

from __future__ import annotations

import torch

from sparsebert.patterns import Pattern


def admm_prune(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    per_row: bool = False,
    iterations: int = 120,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """The support of a V of the given pattern with a small tr((V - W*) H (V - W*)ᵀ): bool [rows, n_in], True = kept.

    weight: W*, float64 [rows, n_in]. h: float64 [n_in, n_in], symmetric positive definite.
    In units in which H has a unit diagonal (B0 = W* D, Hn = D⁻¹ H D⁻¹, D² = diag H), each iteration projects B + U on
    the pattern (Z), adds what was lost to U, and solves (Hn + ρ) for the next B. The sparsity climbs to its end by a
    cubic over the first 40 % of the iterations; from there on ρ grows by a constant factor an iteration, U shrinking
    with it, until the support stands still. The weights themselves are `masked_lstsq`'s work.
    [Boyd et al. 2011 §9.1; Boža 2024, whose released global branch skips the climb.]
    Iterations are float32. Raises InputError for a wrong type or shape, a pattern that does not fit, and an H that is
    not positive definite.
    """
    _check(weight, h, pattern, sparsity)
    raise NotImplementedError
