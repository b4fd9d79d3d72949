"""masked_lstsq: exact least squares on a fixed support, for all rows of a linear at once."""

from __future__ import annotations

import numpy as np
import torch

from sparsebert.errors import InputError
from sparsebert.kernels import masked_lstsq as kernel
from sparsebert.kernels import require_full_float32
from sparsebert.ops import _dispatch

CG_STEPS, CG_TOLERANCE = 60, 1e-6


def masked_lstsq(
    target: torch.Tensor,
    h: torch.Tensor,
    mask: torch.Tensor,
    *,
    row_metric: torch.Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """V = argmin tr(V H Vᵀ) - 2 tr(V Tᵀ) over V that is zero outside the mask: H_SS v_S = t_S for each row's support S.

    target: T, float64 [rows, n_in]; with T = W* H the objective is tr((V - W*) H (V - W*)ᵀ) + const. On the CPU or a
    GPU, as all tensors.
    h: H, float64 [n_in, n_in], symmetric positive definite; only i <= j is read.
    mask: bool [rows, n_in], True = kept; a row may be empty.
    Returns V, float64 [rows, n_in], exactly zero outside the mask. Rows of equal support (a group of a pattern, in any
    order) share one factorisation. If supports keep more than half of n_in, and enough of them do to pay for one dense
    inverse, the removed part is solved for instead: V = W* - W*_R (H⁻¹_RR)⁻¹ H⁻¹_R:, with R the removed columns and W*
    = T H⁻¹. This gives the same V. The result does not depend on `threads`; other rows affect a row only through this
    choice.
    row_metric: B, float64 [rows, rows], symmetric positive definite; B_ij weights the product of the errors of rows i
    and j, which matters if supports differ between rows. The objective is then tr(B V H Vᵀ) - 2 tr(B T Vᵀ). Conjugate
    gradients minimise it, starting from the V above, in float32 (torch's products, on torch's threads), preconditioned
    by both diagonals, until the squared residual is at most CG_TOLERANCE times its first value, or for CG_STEPS steps.

    On a GPU `threads` and `isa` are ignored. The host waits six times per call at most, and once per step of the
    conjugate gradients.
    Raises InputError for wrong types or shapes, for values that are not finite, and for an H that is not positive
    definite on a support, naming row and pivot. Raises UnsupportedError on a GPU if the CUDA kernels are not built, and
    with a row_metric if torch's matrix products are set to TF32.
    """
    _check(target, h, mask, row_metric)
    mask = _dispatch.clean(mask)
    solution = _on_gpu(target, h, mask) if target.is_cuda else _on_cpu(target, h, mask, threads, isa)
    return solution if row_metric is None else _coupled(solution, target, _symmetric(h), mask, row_metric)


def _on_cpu(
    target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, threads: int | None, isa: str | None
) -> torch.Tensor:
    """`masked_lstsq` without a row_metric."""
    keep = mask.numpy()
    first, group_of = _distinct(keep)
    kept, sizes = keep[first].sum(1), np.bincount(group_of)
    complement, dense = _plan(target, h, kept, sizes)
    # Groups to solve directly come first, then the others. In both parts the largest systems come first, so that no
    # thread starts a large one at the end.
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


def _on_gpu(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`masked_lstsq` without a row_metric."""
    supports = kernel.supports_of(mask)
    complement, dense = _plan(target, h, supports.kept, supports.sizes)
    if dense is None:
        return kernel.masked_lstsq(target, h, mask, supports=supports)
    v = kernel.masked_lstsq(*dense, mask, complement=True, supports=supports, which=complement)
    if not complement.all():
        v += kernel.masked_lstsq(target, h, mask, supports=supports, which=~complement)
    return v


def masked_lstsq_ref(
    target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, *, row_metric: torch.Tensor | None = None
) -> torch.Tensor:
    """Reference for `masked_lstsq`: row by row, or with a row_metric as one system of equations."""
    h = _symmetric(h)
    if row_metric is not None:
        kept = mask.flatten()
        both = torch.kron(row_metric, h)[kept][:, kept]
        v = torch.zeros(target.numel(), dtype=torch.float64)
        v[kept] = torch.linalg.solve(both, (row_metric @ target).flatten()[kept])
        return v.view(target.shape)
    v = torch.zeros_like(target)
    for row, keep in enumerate(mask):
        v[row, keep] = torch.linalg.solve(h[keep][:, keep], target[row, keep])
    return v


def _symmetric(h: torch.Tensor) -> torch.Tensor:
    return torch.triu(h) + torch.triu(h, 1).T


def _coupled(
    v: torch.Tensor, target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, row_metric: torch.Tensor
) -> torch.Tensor:
    """The minimum under a row_metric, by conjugate gradients that start from v."""
    if v.is_cuda:
        require_full_float32("masked_lstsq with a row_metric")
    # The first residual is a difference of large numbers, so it alone is computed in float64.
    residual = ((row_metric @ (target - v @ h)) * mask).float()
    inverse = 1 / (row_metric.diagonal()[:, None] * h.diagonal()).float()
    row_metric, h = row_metric.float(), h.float()
    change, z = torch.zeros_like(residual), residual * inverse
    direction, reached = z, (residual * z).sum()
    enough = CG_TOLERANCE * reached
    for _ in range(CG_STEPS):
        if not reached > enough:
            break
        curved = (row_metric @ direction @ h) * mask
        step = reached / (direction * curved).sum()
        change += step * direction
        residual -= step * curved
        z = residual * inverse
        before, reached = reached, (residual * z).sum()
        direction = z + reached / before * direction
    return v + change.double()


def _distinct(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each set of equal rows, int64 [groups], and each row's group, int64 [rows]."""
    packed = np.packbits(mask, axis=1)
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, group_of = np.unique(keys, return_index=True, return_inverse=True)
    return first, group_of


def _plan(
    target: torch.Tensor, h: torch.Tensor, kept: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, tuple[torch.Tensor, torch.Tensor] | None]:
    """Which groups to solve by their complement, bool [groups], and (W*, H⁻¹), or None if no group is.

    Both ways cost a factorisation and its solves; the complement also costs a product with rows of H⁻¹. All groups
    share the inverse.
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
    """Fills the given rows of v, in groups whose ends in `rows` are given by `ends`. Returns (row, pivot) for each
    group that fails.
    """
    row_ptr = np.concatenate([[0], ends])
    pivots = _dispatch.core().masked_lstsq(target.numpy(), h.numpy(), keep, row_ptr, rows, complement, v, isa, threads)
    return [(int(rows[row_ptr[group]]), int(pivots[group])) for group in np.flatnonzero(pivots >= 0)]


def _check(target: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, row_metric: torch.Tensor | None) -> None:
    tensors = {"target": (target, torch.float64), "h": (h, torch.float64), "mask": (mask, torch.bool)}
    if row_metric is not None:
        tensors["row_metric"] = (row_metric, torch.float64)
    device, where = _dispatch.place(target)
    for name, (array, dtype) in tensors.items():
        if array.dtype != dtype or array.ndim != 2 or array.device != device or not array.is_contiguous():
            raise InputError(
                f"{name} must be 2-d contiguous {dtype} on {where}, got {array.dtype} {list(array.shape)} on "
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
    if row_metric is not None and list(row_metric.shape) != [rows, rows]:
        raise InputError(
            f"row_metric must be [rows = {rows}, rows], got {list(row_metric.shape)}",
            fix="match target and row_metric",
        )
    # One pass, no temporary: a sum is not finite if a term is not.
    floats = {name: array for name, (array, dtype) in tensors.items() if dtype != torch.bool}
    _dispatch.require_finite({name: array.sum().isfinite() for name, array in floats.items()})
