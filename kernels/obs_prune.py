"""obs_sweep on a GPU: SparseGPT's column sweep, one launch for the recurrence inside a block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebert.errors import UnsupportedError
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, zeros_in


def obs_sweep(weight: torch.Tensor, u: torch.Tensor, pattern: Pattern, sparsity: float, block: int = 128) -> torch.Tensor:
    """`sparsebert.ops.obs_prune.obs_sweep` given U: H⁻¹ = Uᵀ U; columns left to right, e_j = w_j / U_jj where w_j is
    removed: w ← w - e_j U_j:.

    weight: W*, float32 or float64 [rows, n_in]. u: same dtype and device, [n_in, n_in], upper triangular with a positive
    diagonal; only i <= j is read. block: columns a launch; it also sets which columns share a budget (Unstructured,
    Grouped), and is rounded up to a multiple of m (N:M, V:N:M).
    Arithmetic is the dtype's own. In float64 the masks are the reference's but for near-ties, about 1e-15 apart; in
    float32 weights whose scores differ by about 1e-6 of themselves may change places, and what follows from them.
    Returns V, like weight, zero where removed. Nothing waits for the device. Raises UnsupportedError for float32 while
    torch may round the factors of a matmul to TF32.
    """
    if weight.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        raise UnsupportedError(
            "obs_sweep in float32 needs matmuls in full float32, torch.backends.cuda.matmul.fp32_precision is 'tf32'",
            fix="set it to 'ieee', or pass float64",
        )
    w, u = weight.clone(memory_format=torch.contiguous_format), u.contiguous()
    rows, n_in = w.shape
    chooses = isinstance(pattern, NofM | VNM)
    shared = isinstance(pattern, VNM)
    if chooses:
        block = -(-block // pattern.m) * pattern.m
    # A program sees all rows of a V:N:M group, so that it can add up their scores.
    step = pattern.v if shared else ROWS
    tile = triton.next_power_of_2(step), triton.next_power_of_2(block)
    warps = max(4, min(16, tile[0] * tile[1] // 512))
    inverse_diagonal = 1 / u.diagonal()
    errors = torch.empty(rows, block, dtype=w.dtype, device=w.device)
    gone = None
    with torch.cuda.device_of(w):
        for start in range(0, n_in, block):
            stop = min(start + block, n_in)
            if not chooses:
                scores = (w[:, start:stop] * inverse_diagonal[start:stop]) ** 2
                gone = _lowest(scores, start, pattern, sparsity)
            _sweep_block[(triton.cdiv(rows, step),)](
                w[:, start:],
                u[start:, start:],
                inverse_diagonal[start:],
                gone,
                errors,
                rows,
                n_in,
                stop - start,
                block,
                STEP=step,
                KEPT=pattern.n if chooses else 0,
                REACH=pattern.m if chooses else 0,
                SHARED=shared,
                ROWS=tile[0],
                COLS=tile[1],
                num_warps=warps,
                enable_fp_fusion=True,
            )
            w[:, stop:].addmm_(errors[:, : stop - start], u[start:stop, stop:], alpha=-1)
    return w


# Two rows a warp hide the latency of its shuffles; more would leave a GPU without work at BERT's 768 rows.
ROWS = 8


def _lowest(scores: torch.Tensor, before: int, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """What goes of a block of columns with `before` columns to its left, by its scores [rows, cols]. Bool."""
    rows, cols = scores.shape
    size = pattern.rows if isinstance(pattern, Grouped) else 1
    sums = scores.view(-1, size, cols).sum(1) if size > 1 else scores
    groups = rows // size
    count = zeros_in(groups * (before + cols), sparsity) - zeros_in(groups * before, sparsity)
    lowest = sums.flatten().argsort(stable=True)[:count]
    gone = torch.zeros(groups * cols, dtype=torch.bool, device=scores.device).index_fill_(0, lowest, True)
    return gone.view(groups, cols).repeat_interleave(size, 0)


@triton.jit
def _sweep_block(
    w_ptr,  # [rows, n_in] from the block's first column on; its first `width` columns are read and written
    u_ptr,  # [n_in, n_in] from the block's corner on the diagonal
    inverse_ptr,  # [width], 1 / U_jj
    gone_ptr,  # bool [rows, width] where REACH is 0, else unused
    errors_ptr,  # [rows, errors_stride], written: e_j, zero where kept
    rows,
    n_in,
    width,
    errors_stride,
    STEP: tl.constexpr,  # rows a program
    KEPT: tl.constexpr,  # N of N:M
    REACH: tl.constexpr,  # M of N:M: columns chosen when the sweep reaches them; 0: all are chosen already
    SHARED: tl.constexpr,  # V:N:M: the program's rows first choose 4 columns of M together
    ROWS: tl.constexpr,  # the tile: STEP and the block's columns, as powers of two
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
        reach = REACH
    else:
        gone = tl.load(gone_ptr + row[:, None] * width + cols[None, :], mask=inside, other=0) != 0
        reach = width
    errors = tl.zeros_like(w)
    # One row ahead: U comes from L2, farther away than a column's work takes.
    u_row = tl.load(u_ptr + cols, mask=cols < width, other=0.0)
    for first in range(0, width, reach):
        if REACH > 0:
            gone |= ((cols >= first) & (cols < first + REACH))[None, :] & _dropped(
                w * inverse, first, KEPT, REACH, SHARED
            )
        for j in range(first, first + reach):
            u_next = tl.load(u_ptr + (j + 1) * n_in + cols, mask=(cols > j) & (cols < width), other=0.0)
            here = (cols == j)[None, :]
            # A register has no index at run time: a column comes out of the tile as a sum of it and zeros.
            error = tl.sum(tl.where(here & gone, w * inverse, 0.0), 1)[:, None]
            errors = tl.where(here, error, errors)
            w -= error * u_row[None, :]
            u_row = u_next
    tl.store(w_at, tl.where(gone, 0.0, w), mask=inside)
    tl.store(errors_ptr + row[:, None] * errors_stride + cols[None, :], errors, mask=inside)


@triton.jit
def _dropped(scaled, first, KEPT: tl.constexpr, REACH: tl.constexpr, SHARED: tl.constexpr):
    """Not among the KEPT best of the REACH columns from `first` on, by scaled²; of equals the lower column is better.

    What it says of other columns means nothing.
    """
    scores = scaled * scaled
    if SHARED:
        best = _rank(tl.sum(scores, 0)[None, :], first, REACH) < 4
        scores = tl.where(best, scores, -1.0)
    return _rank(scores, first, REACH) >= KEPT


@triton.jit
def _rank(scores, first, REACH: tl.constexpr):
    """How many of the REACH columns from `first` on come before each column."""
    cols = tl.arange(0, scores.shape[1])[None, :]
    rank = tl.zeros(scores.shape, tl.int32)
    for i in range(first, first + REACH):
        other = tl.sum(tl.where(cols == i, scores, 0.0), 1)[:, None]
        rank += ((other > scores) | ((other == scores) & (i < cols))).to(tl.int32)
    return rank
