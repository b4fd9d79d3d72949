"""masked_lstsq: exact least squares on a fixed support, every row of a linear at once."""

from __future__ import annotations

import numpy as np
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
    order) share one factorisation. Where supports keep more than half of n_in, and enough of them to pay for one dense
    inverse, the removed half is solved for instead: V = W* - W*_R (H⁻¹_RR)⁻¹ H⁻¹_R:, with R the removed columns and
    W* = T H⁻¹; the same V. The result does not depend on `threads`, nor on the other rows but by that choice.

    Raises InputError for wrong types or shapes, for values that are not finite, and for an H that is not positive
    definite on a support, naming row and pivot.
    """
    _check(target, h, mask)
    keep = mask.numpy()
    first, group_of = _distinct(keep)
    kept, sizes = keep[first].sum(1), np.bincount(group_of)
    complement, dense = _plan(target, h, kept, sizes)
    # Groups to solve directly, then the others; of both the largest systems first, so that none is left for the end.
    order = np.lexsort((np.where(complement, kept, -kept), complement))
    rows = np.argsort(np.argsort(order)[group_of], kind="stable").astype(np.int32)
    ends = np.cumsum(sizes[order])
    direct, indirect = np.split(ends, [np.count_nonzero(~complement)])
    solved = sizes[~complement].sum()
    v = np.zeros(target.shape)
    options = (v, _dispatch.isa(isa), _dispatch.threads(threads))
    failed = _solve(target, h, keep, rows[:solved], direct, False, *options)
    if dense is not None:
        failed += _solve(*dense, keep, rows[solved:], indirect - solved, True, *options)
    if failed:
        row, pivot = min(failed)
        raise InputError(
            f"h must be positive definite on every support, pivot {pivot} of row {row} is not above 0",
            fix="raise the damping or give more calibration tokens",
        )
    return torch.from_numpy(v)


def masked_lstsq_ref(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `masked_lstsq` computes, row by row."""
    h = torch.triu(h) + torch.triu(h, 1).T
    v = torch.zeros_like(target)
    for row, keep in enumerate(mask):
        v[row, keep] = torch.linalg.solve(h[keep][:, keep], target[row, keep])
    return v


def _distinct(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each set of equal rows, int64 [groups], and each row's group, int64 [rows]."""
    packed = np.packbits(mask, axis=1)
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, group_of = np.unique(keys, return_index=True, return_inverse=True)
    return first, group_of


def _plan(
    target: torch.Tensor, h: torch.Tensor, kept: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, tuple[torch.Tensor, torch.Tensor] | None]:
    """Which groups to solve by their complement, bool [groups], and (W*, H⁻¹), None where there are none.

    Both cost a factorisation and its solves, the complement also a product with rows of H⁻¹; the inverse is shared.
    """
    rows, n_in = target.shape
    kept = kept.astype(float)
    removed = n_in - kept
    direct = kept**3 / 3 + 2 * kept**2 * sizes
    indirect = removed**3 / 3 + 2 * (removed + n_in) * removed * sizes
    complement = indirect < direct
    if (direct - indirect)[complement].sum() > n_in**3 + 2 * n_in**2 * rows:
        factor, info = torch.linalg.cholesky_ex(h, upper=True)
        # An H that is singular as a whole may still be positive definite on the supports.
        if info.item() == 0:
            w_star = torch.cholesky_solve(target.T, factor, upper=True).T.contiguous()
            return complement, (w_star, torch.cholesky_inverse(factor, upper=True).contiguous())
    return np.zeros_like(complement), None


def _solve(
    target: torch.Tensor,
    h: torch.Tensor,
    keep: np.ndarray,
    rows: np.ndarray,
    ends: np.ndarray,
    complement: bool,
    v: np.ndarray,
    isa: str,
    threads: int,
) -> list[tuple[int, int]]:
    """Fills the given rows of v, in groups that end where `ends` says; returns (row, pivot) for each that fails."""
    row_ptr = np.concatenate([[0], ends])
    pivots = _dispatch.core().masked_lstsq(target.numpy(), h.numpy(), keep, row_ptr, rows, complement, v, isa, threads)
    return [(int(rows[row_ptr[group]]), int(pivots[group])) for group in np.flatnonzero(pivots >= 0)]


def _check(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor) -> None:
    for name, array, dtype in (("target", target, torch.float64), ("h", h, torch.float64), ("mask", mask, torch.bool)):
        if array.dtype != dtype or array.ndim != 2 or array.device.type != "cpu" or not array.is_contiguous():
            raise InputError(
                f"{name} must be 2-d contiguous {dtype} on the CPU, got {array.dtype} {list(array.shape)} on "
                f"{array.device}",
                fix="convert it first",
            )
    rows, n_in = target.shape
    if rows < 1 or n_in < 1:
        raise InputError(f"target must be [rows >= 1, n_in >= 1], got {[rows, n_in]}", fix="leave empty layers out")
    if list(h.shape) != [n_in, n_in]:
        raise InputError(f"h must be [n_in = {n_in}, n_in], got {list(h.shape)}", fix="match target and h")
    if mask.shape != target.shape:
        raise InputError(f"mask must match target {[rows, n_in]}, got {list(mask.shape)}", fix="match target and mask")
    for name, array in (("target", target), ("h", h)):
        # One pass, no temporary: a sum is not finite where a term is not.
        if not array.sum().isfinite():
            raise InputError(f"{name} must be finite, got inf or NaN", fix="repair what it is made from")
