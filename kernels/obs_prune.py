"""obs_sweep on a GPU: SparseGPT's column sweep in Triton, with one launch per block of columns for the recurrence. And
the `removals` of exact OBS, in products of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebert.kernels import require_full_float32
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, zeros_in

# Rows and weights per program. 8 rows are two per warp, so that the work on one hides the shuffles of the other, and
# BERT's 768 rows make 96 programs. With 4,096 weights per program a thread holds 16, the most that does not spill
# registers in float64: at most 239 of 255 registers on sm_90, compiled by Triton 3.4 to 3.9, for blocks of up to 512
# columns and v up to 128.
ROWS, WEIGHTS = 8, 4096
# In `removals`: the downdates of an inverse that wait to be made at once, as one product; and the max number of float64
# values in the inverses of all groups that are worked on together, 2 GiB.
DOWNDATES, INVERSES = 64, 1 << 28


def obs_sweep(
    weight: torch.Tensor, u: torch.Tensor, pattern: Pattern, sparsity: float, block: int = 128
) -> torch.Tensor:
    """`sparsebert.ops.obs_prune.obs_sweep`, given U with H⁻¹ = Uᵀ U. Goes through the columns from left to right and
    sets w ← w - e_j U_j: with e_j = w_j / U_jj if w_j is removed, else 0.

    weight: W*, float32 or float64 [rows, n_in], on a GPU. u: of the same dtype and device, [n_in, n_in], upper
    triangular with a positive diagonal; only i <= j is read. block: columns whose mask is chosen together
    (Unstructured, Grouped); for N:M and V:N:M the max columns per launch (but at least M), which does not change the
    result.
    Arithmetic is in the weight's dtype. In float64 the masks are the reference's except for near-ties of about 1e-15.
    In float32 two weights whose scores differ by a factor of about 1 + 1e-6 may swap places; later choices then differ.
    Returns V, of the weight's shape and dtype, zero where removed; the host does not wait for the device. Raises
    UnsupportedError for float32 if torch may round a matmul's factors to TF32.
    """
    if weight.dtype == torch.float32:
        require_full_float32("obs_sweep in float32", instead="pass float64")
    w, u = weight.detach().clone(memory_format=torch.contiguous_format), u.triu()
    rows, n_in = w.shape
    block, constants = _plan(pattern, block)
    inverse_diagonal = 1 / u.diagonal()
    errors = torch.empty(rows, block, dtype=w.dtype, device=w.device)
    gone = None
    with torch.cuda.device_of(w):
        for start in range(0, n_in, block):
            stop = min(start + block, n_in)
            if not constants["REACH"]:
                scores = (w[:, start:stop] * inverse_diagonal[start:stop]) ** 2
                gone = _lowest(scores, start, pattern, sparsity)
            _sweep_block[(triton.cdiv(rows, constants["STEP"]),)](
                w[:, start:],
                u[start:, start:],
                inverse_diagonal[start:],
                gone,
                errors,
                rows,
                n_in,
                stop - start,
                block,
                **constants,
            )
            w[:, stop:].addmm_(errors[:, : stop - start], u[start:stop, stop:], alpha=-1)
    return w


def _plan(pattern: Pattern, block: int) -> tuple[int, dict[str, int]]:
    """The columns per launch, and the compile-time constants of the kernel."""
    chooses, shared = isinstance(pattern, NofM | VNM), isinstance(pattern, VNM)
    # A program covers all v rows of a V:N:M group, to add up their scores.
    step = pattern.v if shared else ROWS
    if chooses:
        most = min(block, WEIGHTS // triton.next_power_of_2(step))
        block = max(most // pattern.m, 1) * pattern.m
    cols = triton.next_power_of_2(block)
    if not shared:
        step = max(1, min(step, WEIGHTS // cols))
    rows = triton.next_power_of_2(step)
    constants = {
        "STEP": step,
        "KEPT": pattern.n if chooses else 0,
        "REACH": pattern.m if chooses else 0,
        "SHARED": shared,
        "ROWS": rows,
        "COLS": cols,
        "num_warps": max(4, min(8, rows * cols // 256)),
        "enable_fp_fusion": True,
    }
    return block, constants


def _lowest(scores: torch.Tensor, before: int, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """Bool [rows, cols], True for the weights of lowest score that a block of columns loses.

    before: the number of columns to the left of the block.
    """
    rows, cols = scores.shape
    size = pattern.rows if isinstance(pattern, Grouped) else 1
    sums = scores.view(-1, size, cols).sum(1) if size > 1 else scores
    groups = rows // size
    count = zeros_in(groups * (before + cols), sparsity) - zeros_in(groups * before, sparsity)
    lowest = sums.flatten().argsort(stable=True)[:count]
    gone = torch.zeros(groups * cols, dtype=torch.bool, device=scores.device).index_fill_(0, lowest, True)
    return gone.view(groups, cols).repeat_interleave(size, 0)


def removals(
    weight: torch.Tensor, inverse: torch.Tensor, size: int, bank: int, bank_most: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `steps` removals of exact OBS of every `size` consecutive rows, which lose whole columns: columns int64
    [groups, steps], losses float64 [groups, steps]. Each removes the open column p with the lowest sum of w_p² /
    [H⁻¹]_pp over the rows, of equal ones the lowest p. The host does not wait for the device.

    weight: W*, float64 [rows, n_in]. inverse: H⁻¹, float64 [n_in, n_in], symmetric. bank, bank_most: of every `bank`
    columns at most `bank_most` are removed; bank 0: of all. Losses that are not finite show that H⁻¹ has lost its
    positive definiteness.
    """
    n_in = weight.shape[1]
    groups = weight.reshape(-1, size, n_in).split(max(1, INVERSES // n_in**2))
    found = [_removals(part, inverse, bank, bank_most, steps) for part in groups]
    order, losses = (torch.cat(part) for part in zip(*found, strict=True))
    return order, losses


def _removals(
    weight: torch.Tensor, inverse: torch.Tensor, bank: int, bank_most: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`removals` of groups that are worked on together; weight: [groups, size, n_in]."""
    w, (groups, _, n_in) = weight.clone(), weight.shape
    base = inverse.expand(groups, n_in, n_in)  # with all downdates but those in `factors`
    diagonal = inverse.diagonal().repeat(groups, 1)
    factors = w.new_zeros(groups, DOWNDATES, n_in)
    gone = torch.zeros(groups, n_in, dtype=torch.bool, device=w.device)
    order = torch.zeros(groups, steps, dtype=torch.int64, device=w.device)
    losses = w.new_zeros(groups, steps)
    for step in range(steps):
        made = step % DOWNDATES
        if step and not made:
            base = torch.baddbmm(base, factors.transpose(1, 2), factors, alpha=-1)
        scores = (w.square().sum(1) / diagonal).masked_fill(_closed(gone, bank, bank_most), torch.inf)
        losses[:, step], p = scores.min(1)
        order[:, step] = p
        # Column p of the inverse, [groups, n_in].
        across = base.gather(1, p[:, None, None].expand(-1, 1, n_in))[:, 0]
        if made:
            some = factors[:, :made]
            at_p = some.gather(2, p[:, None, None].expand(-1, made, 1))
            across = across - (at_p.transpose(1, 2) @ some)[:, 0]
        pivot = across.gather(1, p[:, None])
        w_p = w.gather(2, p[:, None, None].expand(-1, w.shape[1], 1))
        w -= w_p / pivot[:, None] * across[:, None]
        factor = across / pivot.sqrt()
        factors[:, made] = factor
        diagonal -= factor.square()
        gone.scatter_(1, p[:, None], True)
        w.masked_fill_(gone[:, None], 0.0)
    return order, losses


def _closed(gone: torch.Tensor, bank: int, bank_most: int) -> torch.Tensor:
    """The columns that may not be removed any more, bool [groups, n_in]."""
    if not bank:
        return gone
    full = gone.view(len(gone), -1, bank).sum(2, keepdim=True) == bank_most
    return gone | full.expand(-1, -1, bank).reshape(gone.shape)


@triton.jit
def _sweep_block(
    w_ptr,  # [rows, n_in], starting at the block; the first `width` columns are read and written
    u_ptr,  # [n_in, n_in], starting at the block's corner on the diagonal
    inverse_ptr,  # [width], 1 / U_jj
    gone_ptr,  # bool [rows, width] if REACH is 0, else unused
    errors_ptr,  # [rows, errors_stride], written: e_j, zero where kept
    rows,
    n_in,
    width,
    errors_stride,
    STEP: tl.constexpr,  # rows per program
    KEPT: tl.constexpr,  # N of N:M
    REACH: tl.constexpr,  # M of N:M, whose columns are chosen when the sweep reaches them; 0: all are chosen already
    SHARED: tl.constexpr,  # V:N:M: the program's rows first choose 4 of M columns together
    ROWS: tl.constexpr,  # the tile: STEP and the block's columns, rounded up to powers of two
    COLS: tl.constexpr,
):
    own = tl.arange(0, ROWS)
    row = tl.program_id(0) * STEP + own
    cols = tl.arange(0, COLS)
    inside = ((own < STEP) & (row < rows))[:, None] & (cols < width)[None, :]
    row = row.to(tl.int64)
    w_at = w_ptr + row[:, None] * n_in + cols[None, :]
    w = tl.load(w_at, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + cols, mask=cols < width, other=0.0)[None, :]
    if REACH > 0:
        gone = tl.zeros([ROWS, COLS], tl.int1)
    else:
        gone = tl.load(gone_ptr + row[:, None] * width + cols[None, :], mask=inside, other=0) != 0
    errors = tl.zeros_like(w)
    # A row of U comes from L2, which takes longer than the work on a column: the loads run two rows ahead.
    for j in tl.range(0, width, num_stages=3):
        u_row = tl.load(u_ptr + j * n_in + cols, mask=cols < width, other=0.0)
        if REACH > 0:
            if j % REACH == 0:
                gone |= ((cols >= j) & (cols < j + REACH))[None, :] & _dropped(w * inverse, j, KEPT, REACH, SHARED)
        error = tl.gather(tl.where(gone, w * inverse, 0.0), tl.full([ROWS, 1], j, tl.int32), 1)
        errors = tl.where((cols == j)[None, :], error, errors)
        w -= error * u_row[None, :]
    tl.store(w_at, tl.where(gone, 0.0, w), mask=inside)
    tl.store(errors_ptr + row[:, None] * errors_stride + cols[None, :], errors, mask=inside)


@triton.jit
def _dropped(scaled, first, KEPT: tl.constexpr, REACH: tl.constexpr, SHARED: tl.constexpr):
    """True for those of the REACH columns from `first` on that are not among the KEPT best by scaled².

    Of equal scores the lower column is better. The results for all other columns are meaningless.
    """
    scores = scaled * scaled
    if SHARED:
        best = _rank(tl.sum(scores, 0)[None, :], first, REACH) < 4
        scores = tl.where(best, scores, -1.0)
    return _rank(scores, first, REACH) >= KEPT


@triton.jit
def _rank(scores, first, REACH: tl.constexpr):
    """For each column, the number of the REACH columns from `first` on that come before it by score."""
    cols = tl.arange(0, scores.shape[1])[None, :]
    rank = tl.zeros(scores.shape, tl.int32)
    for i in range(first, first + REACH):
        other = tl.gather(scores, tl.full([scores.shape[0], 1], i, tl.int32), 1)
        rank += ((other > scores) | ((other == scores) & (i < cols))).to(tl.int32)
    return rank
