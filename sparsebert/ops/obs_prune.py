"""obs_prune: the optimal brain surgeon on the rows of a linear, exact, one weight at a time; and `obs_sweep`, its
approximation by one sweep over the columns.

Both prune W* under H: they look for a V of the given pattern with a small tr((V - W*) H (V - W*)ᵀ).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
import torch

from sparsebert.errors import InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.ops.masked_lstsq import masked_lstsq, masked_lstsq_ref
from sparsebert.ops.topk_mask import topk_mask_ref
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, Unstructured, kept_in, require_fits, zeros_in

LARGEST = 1e150  # bound on |w| / U_jj, whose squares are added up in float64


def obs_prune(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    per_row: bool = True,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """Exact OBS: removes from each row, one at a time, the weight p with the lowest w_p² / [H⁻¹]_pp, and moves the
    other weights to the new optimum: w ← w - H⁻¹_:p w_p / [H⁻¹]_pp, H⁻¹ ← H⁻¹ - H⁻¹_:p H⁻¹_p: / [H⁻¹]_pp.

    weight: W*, float64 [rows, n_in], on the CPU or a GPU. h: float64 [n_in, n_in], symmetric positive definite; only
    i <= j is read.
    Unstructured, per_row: floor(sparsity * n_in) removals per row [Li et al. 2023]. Otherwise the removals with the
    lowest losses over all rows. The j-th removal of a row counts as the largest of the row's first j losses, so that it
    is never taken before an earlier one; of equal losses the lower row goes first [Frantar & Alistarh 2022, ExactOBS,
    global selection].
    N:M: once a row has lost m - n weights of a block of m consecutive columns, it loses no more of that block.
    Grouped: consecutive rows form a group and lose a whole column at a time: the one with the lowest sum of w_p² /
    [H⁻¹]_pp over the group. Budgets are as for unstructured, counted in columns. With kept_multiple, the columns of a
    group are cut into chunks of that many in the order of their removal, and the chunks with the highest total cost are
    kept (per_row: the same number in each group).
    V:N:M: groups of v rows first keep 4 of every m columns; then each row keeps n of these 4.
    Of equal scores the lower column is removed first.

    Returns V, float64 [rows, n_in], the exact optimum on its support, zero elsewhere. Arithmetic is float64; the
    result does not depend on `threads`. On a GPU `threads` and `isa` are ignored; the host waits for it some ten times,
    and with V:N:M three times per group, but for no column. Raises InputError for a wrong type or shape, a pattern that
    does not fit, and an H that is not positive definite; on a GPU UnsupportedError if Triton is missing or the CUDA
    kernels are not built.
    """
    _check(weight, h, pattern, sparsity)
    h = torch.triu(h) + torch.triu(h, 1).T
    target, inverse = weight @ h, _inverse(h)
    trace = partial(_trace, threads=threads, isa=isa)
    if isinstance(pattern, VNM):
        keep = _keep_vnm(weight, inverse, target, h, pattern, trace)
    else:
        size = pattern.rows if isinstance(pattern, Grouped) else 1
        if per_row or isinstance(pattern, NofM):
            steps = weight.shape[1] - kept_in(pattern, size, weight.shape[1], sparsity) // size
            keep = _kept(trace(weight, inverse, size, steps, pattern)[0], weight.shape[1])
        else:
            keep = _keep(*trace(weight, inverse, size, weight.shape[1], pattern), pattern, sparsity, per_row)
        keep = keep.repeat_interleave(size, 0)
    return masked_lstsq(target, h, keep, threads=threads, isa=isa)


def _trace(
    weight: torch.Tensor,
    inverse: torch.Tensor,
    size: int,
    steps: int,
    pattern: Pattern,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The removals of every `size` consecutive rows, each as `_trace_ref` gives them: columns int64 [groups, steps],
    losses [groups, steps].
    """
    bank = (pattern.m, pattern.m - pattern.n) if isinstance(pattern, NofM) else (0, 0)
    if weight.is_cuda:
        order, losses = _kernel().removals(weight, inverse, size, *bank, steps)
    else:
        arrays = (array.contiguous().numpy() for array in (weight, inverse))
        run = _dispatch.isa(isa), _dispatch.threads(threads)
        order, losses = map(torch.from_numpy, _dispatch.core().obs_prune(*arrays, size, *bank, steps, *run))
    if not losses.isfinite().all():
        group, step = (~losses.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"h must be positive definite, its inverse no longer is after {step} removals in group {group}",
            fix="raise the damping or give more calibration tokens",
        )
    return order.long(), losses


def _keep_vnm(
    weight: torch.Tensor, inverse: torch.Tensor, target: torch.Tensor, h: torch.Tensor, pattern: VNM, trace: Callable
) -> torch.Tensor:
    """The V:N:M mask, bool [rows, n_in]: first 4 of every m columns for each group, then n of these 4 for each row."""
    rows, n_in = weight.shape
    order, _ = trace(weight, inverse, pattern.v, n_in // pattern.m * (pattern.m - 4), NofM(4, pattern.m))
    keep = torch.zeros(rows, n_in, dtype=torch.bool, device=weight.device)
    # The kept columns in order: their number is known, so no host waits for it.
    kept = _kept(order, n_in).int().argsort(dim=1, descending=True, stable=True)[:, : n_in // pattern.m * 4]
    for group, columns in enumerate(kept):
        part = slice(group * pattern.v, (group + 1) * pattern.v)
        inverse = _inverse(h[columns][:, columns])
        optimum = target[part, columns] @ inverse
        order, _ = trace(optimum, inverse, 1, len(columns) // 4 * (4 - pattern.n), NofM(pattern.n, 4))
        keep[part, columns] = _kept(order, len(columns))
    return keep


def _kept(order: torch.Tensor, n_in: int) -> torch.Tensor:
    """The columns that were not removed, bool [groups, n_in]."""
    return torch.ones(len(order), n_in, dtype=torch.bool, device=order.device).scatter_(1, order, False)


def obs_prune_ref(
    weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float, *, per_row: bool = True
) -> torch.Tensor:
    """Reference for `obs_prune`, by the formula: downdates the whole inverse at every removal."""
    rows, n_in = weight.shape
    if isinstance(pattern, VNM):
        blocks = n_in // pattern.m
        keep = torch.zeros(rows, n_in, dtype=torch.bool)
        for start in range(0, rows, pattern.v):
            group = slice(start, start + pattern.v)
            order, _ = _trace_ref(weight[group], h, blocks * (pattern.m - 4), NofM(4, pattern.m))
            kept = torch.ones(n_in, dtype=torch.bool).index_fill_(0, order, False).nonzero().flatten()
            # On the remaining columns this is a separate N:4 problem, which starts from the optimum there.
            h_kept = h[kept][:, kept]
            w_kept = torch.linalg.solve(h_kept, (weight[group] @ h)[:, kept], left=False)
            keep[group, kept] = obs_prune_ref(w_kept, h_kept, NofM(pattern.n, 4), 0.0) != 0
    else:
        size = pattern.rows if isinstance(pattern, Grouped) else 1
        if isinstance(pattern, NofM):
            steps = n_in - kept_in(pattern, 1, n_in, sparsity)
        else:
            steps = n_in
        traces = [_trace_ref(group, h, steps, pattern) for group in weight.split(size)]
        order, losses = (torch.stack(part) for part in zip(*traces, strict=True))
        if isinstance(pattern, NofM):
            keep = _kept(order, n_in)
        else:
            keep = _keep(order, losses, pattern, sparsity, per_row).repeat_interleave(size, 0)
    return masked_lstsq_ref(weight @ h, h, keep)


def _trace_ref(
    weight: torch.Tensor, h: torch.Tensor, steps: int, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """The removals of one group of rows that lose their columns together: columns int64 [steps], losses [steps]."""
    w, inverse = weight.clone(), torch.linalg.inv(h)
    gone = torch.zeros(w.shape[1], dtype=torch.bool)
    order, losses = [], []
    for _ in range(steps):
        closed = gone
        if isinstance(pattern, NofM):
            full = gone.view(-1, pattern.m).sum(1) == pattern.m - pattern.n
            closed = gone | full.repeat_interleave(pattern.m)
        score = ((w**2).sum(0) / inverse.diagonal()).masked_fill(closed, torch.inf)
        p = int(score.argmin())
        order.append(p)
        losses.append(score[p])
        w -= torch.outer(w[:, p] / inverse[p, p], inverse[p])
        inverse -= torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        gone[p] = True
        w[:, gone] = 0.0
        inverse[gone] = 0.0
        inverse[:, gone] = 0.0
        inverse[gone, gone] = 1.0
    return torch.tensor(order), torch.stack(losses) if losses else torch.empty(0, dtype=torch.float64)


def _keep(
    order: torch.Tensor, losses: torch.Tensor, pattern: Unstructured | Grouped, sparsity: float, per_row: bool
) -> torch.Tensor:
    """The columns that each group of rows keeps, bool [groups, n_in], given its complete trace."""
    groups, n_in = order.shape
    multiple = pattern.kept_multiple if isinstance(pattern, Grouped) else 1
    if per_row:
        rows = pattern.rows if isinstance(pattern, Grouped) else 1
        require_fits(pattern, rows, n_in, sparsity, "each group")
        counts = torch.full((groups,), kept_in(pattern, rows, n_in, sparsity) // rows, device=order.device)
    else:
        kept = groups * n_in - zeros_in(groups * n_in, sparsity)
        # In reverse order of removal: costs fall along a row, and of equal costs topk keeps the one removed later.
        cost = losses.cummax(1).values.flip(1).view(groups, -1, multiple).sum(2)
        # Rows in reverse order too: of equal costs, those of the lower row are removed first.
        chosen = topk_mask_ref(cost.flip(0).flatten(), kept // multiple).view_as(cost).flip(0)
        counts = chosen.sum(1) * multiple
    position = torch.arange(n_in, device=order.device).expand(groups, -1)
    kept = torch.zeros(groups, n_in, dtype=torch.bool, device=order.device)
    return kept.scatter_(1, order.flip(1), position < counts[:, None])


def obs_sweep(
    weight: torch.Tensor,
    h: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    block: int = 128,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """SparseGPT: goes through the columns from left to right; the columns to the right compensate each removal. With
    H⁻¹ = Uᵀ U, U upper triangular, and e_j = w_j / U_jj if w_j is removed: w ← w - e_j U_j:.

    weight: W*, float64 [rows, n_in]. h: float64 [n_in, n_in], symmetric positive definite; only i <= j is read.
    Unstructured: of each `block` columns, over all rows together, the weights with the lowest (w / U_jj)² at the
    block's start are removed; of equal ones the lower index (row-major) goes first. After each block, floor(sparsity *
    rows * columns so far) weights are removed in total. Grouped: the same, on sums over consecutive rows. N:M: n of
    every m columns are kept, chosen when the sweep reaches them (`block` is rounded up to a multiple of m). V:N:M:
    likewise, 4 of m columns by their sums over v rows, then n of these 4 by each row.
    Returns V, [rows, n_in], zero where removed. V is not the optimum on its support; `masked_lstsq` computes that.
    On a CUDA device (Triton) weight may also be float32. The sweep then runs in float32, and nearly equal scores may be
    ordered differently, which changes the mask. `threads` and `isa` are ignored there.
    Raises InputError as `obs_prune` does, and also for a block below 1 and for scores that would overflow. Raises
    UnsupportedError for Grouped with a kept_multiple, and on a GPU if Triton is missing or torch's matrix products are
    set to TF32.
    [Frantar & Alistarh 2023, Algorithm 1; their released code removes all weights <= a threshold: one weight per block
    more, and every tie.]
    """
    _check(weight, h, pattern, sparsity, narrow=weight.is_cuda)
    if isinstance(pattern, Grouped) and pattern.kept_multiple > 1:
        raise UnsupportedError(
            f"obs_sweep cannot keep columns in multiples, which pattern {pattern} requires",
            fix=f"use {pattern.rows}x1, or another method",
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise InputError(f"block must be an integer of at least 1, got {block!r}", fix="use the default, 128")
    u = _inverse_factor(h)
    # Squared and summed over a group, this is a score. Scores that overflow would compare as equal, or not at all.
    largest = float(weight.abs().max() / u.diagonal().min())
    if not largest < LARGEST:
        raise InputError(
            f"weight over the square root of h's inverse must stay below {LARGEST:g}, got {largest:g}",
            fix="scale weight or h down",
        )
    if weight.is_cuda:
        return _kernel().obs_sweep(weight, u.to(weight.dtype), pattern, sparsity, block)
    how = {"threads": _dispatch.threads(threads), "isa": _dispatch.isa(isa)}
    return _sweep(weight, u, pattern, sparsity, block, **how)


def _sweep(
    weight: torch.Tensor,
    u: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    block: int,
    *,
    threads: int,
    isa: str,
) -> torch.Tensor:
    """`obs_sweep`, given U."""
    rows, n_in = weight.shape
    n, m, removals = 0, 0, []
    if isinstance(pattern, NofM | VNM):
        group, n, m = getattr(pattern, "v", 1), pattern.n, pattern.m
        block = -(-block // m) * m
    else:
        group = getattr(pattern, "rows", 1)
        ends = [*range(block, n_in, block), n_in]
        removals = np.diff([zeros_in(rows // group * end, sparsity) for end in ends], prepend=0)
    v = _dispatch.core().obs_sweep(
        weight.contiguous().numpy(),
        u.T.contiguous().numpy(),
        group,
        n,
        m,
        isinstance(pattern, VNM),
        np.asarray(removals, np.int64),
        block,
        isa,
        threads,
    )
    return torch.from_numpy(v)


def _kernel() -> ModuleType:
    with _dispatch.needing_triton("obs_prune"):
        from sparsebert.kernels import obs_prune
    return obs_prune


def obs_sweep_ref(
    weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float, *, block: int = 128
) -> torch.Tensor:
    """Reference for `obs_sweep`: one column at a time, over all rows."""
    w, u = weight.clone(), _inverse_factor(h)
    rows, n_in = w.shape
    reach = pattern.m if isinstance(pattern, NofM | VNM) else block  # number of columns whose mask is chosen at once
    gone = torch.zeros(rows, n_in, dtype=torch.bool)
    for j in range(n_in):
        if j % reach == 0:
            part = slice(j, min(j + reach, n_in))
            scores = (w[:, part] / u.diagonal()[part]) ** 2
            gone[:, part] = ~_sweep_keep(scores, gone[:, :j], pattern, sparsity)
        error = torch.where(gone[:, j], w[:, j] / u[j, j], 0.0)
        w[:, j:] -= torch.outer(error, u[j, j:])
    return w.masked_fill(gone, 0.0)


def _sweep_keep(scores: torch.Tensor, gone: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """The mask of the columns just reached, True = kept. gone: True at the weights removed from the columns before
    them.
    """
    cols = scores.shape[1]
    if isinstance(pattern, NofM):
        return topk_mask_ref(scores, pattern.n)
    if isinstance(pattern, VNM):
        shared = topk_mask_ref(scores.view(-1, pattern.v, cols).sum(1), 4).repeat_interleave(pattern.v, 0)
        return topk_mask_ref(scores.masked_fill(~shared, -1.0), pattern.n)
    size = pattern.rows if isinstance(pattern, Grouped) else 1
    sums = scores.view(-1, size, cols).sum(1)
    budget = zeros_in(sums.shape[0] * (gone.shape[1] + cols), sparsity) - int(gone[::size].sum())
    lowest = topk_mask_ref(-sums.flatten(), budget).view_as(sums)
    return ~lowest.repeat_interleave(size, 0)


def _inverse(h: torch.Tensor) -> torch.Tensor:
    """H⁻¹, symmetric to the last bit. Raises InputError if H is not positive definite."""
    u = _inverse_factor(h)
    inverse = u.T @ u
    return torch.triu(inverse) + torch.triu(inverse, 1).T


def _inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ U. Raises InputError if H is not positive definite.

    H = R Rᵀ with R upper triangular (Cholesky from the last row up) gives U = R⁻¹: one factorisation, and no explicit
    inverse of H.
    """
    # Cholesky reads the lower half, which is the upper half of H after the flip.
    flipped, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if info.item():
        raise InputError(
            f"h must be positive definite, pivot {len(h) + 1 - info.item()} of {len(h)} (from the last row up) "
            "is not above 0",
            fix="raise the damping or give more calibration tokens",
        )
    return _lower_inverse(flipped.flip(0, 1).T).T


def _lower_inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix, by halves: matrix products run at twice the speed of triangular solves
    with an identity.
    """
    n = len(lower)
    if n <= 128:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
    inverse, half = torch.zeros_like(lower), n // 2
    first, last = _lower_inverse(lower[:half, :half]), _lower_inverse(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ lower[half:, :half] @ first)
    return inverse


def _check(weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float, *, narrow: bool = False) -> None:
    """narrow: whether weight may also be float32."""
    device, where = _dispatch.place(weight)
    for name, array in (("weight", weight), ("h", h)):
        right = array.dtype == torch.float64 or (narrow and array is weight and array.dtype == torch.float32)
        if not right or array.ndim != 2 or array.device != device:
            raise InputError(
                f"{name} must be 2-d float64 on {where}, got {array.dtype} {list(array.shape)} on {array.device}",
                fix="convert it first",
            )
    _dispatch.require_finite({"weight": weight.isfinite().all(), "h": h.isfinite().all()})
    if list(h.shape) != [weight.shape[1]] * 2:
        raise InputError(f"h must be [n_in = {weight.shape[1]}, n_in], got {list(h.shape)}", fix="match weight and h")
    require_fits(pattern, *weight.shape, sparsity)
