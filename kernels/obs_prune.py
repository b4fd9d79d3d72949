"""obs_sweep on a GPU: SparseGPT's column sweep, one launch for the recurrence inside a block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebert.errors import UnsupportedError
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, zeros_in

# What a launch covers. 8 rows are two a warp, whose work hides each other's shuffles, and 96 programs for BERT's 768
# rows. At 4,096 weights a program a thread holds 16, the most that spills nothing in float64: at most 239 of 255
# registers on sm_90, compiled by Triton 3.4 to 3.9, for blocks of up to 512 columns and v up to 128.
ROWS, WEIGHTS = 8, 4096


def obs_sweep(
    weight: torch.Tensor, u: torch.Tensor, pattern: Pattern, sparsity: float, block: int = 128
) -> torch.Tensor:
    """`sparsebert.ops.obs_prune.obs_sweep` given U, H⁻¹ = Uᵀ U: columns left to right, w ← w - e_j U_j: with
    e_j = w_j / U_jj where w_j is removed.

    weight: W*, float32 or float64 [rows, n_in], on a GPU. u: of its dtype and device, [n_in, n_in], upper triangular
    with a positive diagonal; only i <= j is read. block: columns whose mask is chosen together (Unstructured, Grouped);
    for N:M and V:N:M at most so many columns a launch, which does not change the result.
    Arithmetic is in the weight's dtype. In float64 the masks are the reference's but for near-ties of about 1e-15; in
    float32 weights whose scores differ by about 1e-6 of themselves may change places, and what follows changes with it.
    Returns V, like weight, zero where removed; the host does not wait for the device. Raises UnsupportedError for
    float32 while torch may round a matmul's factors to TF32.
    """
    if weight.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        raise UnsupportedError(
            "obs_sweep in float32 needs full float32 matmuls, torch.backends.cuda.matmul.fp32_precision is 'tf32'",
            fix="set it to 'ieee', or pass float64",
        )
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
    """The columns of a launch, and what it is compiled for."""
    chooses, shared = isinstance(pattern, NofM | VNM), isinstance(pattern, VNM)
    # A program sees all v rows of a V:N:M group, to add up their scores.
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
    else:
        gone = tl.load(gone_ptr + row[:, None] * width + cols[None, :], mask=inside, other=0) != 0
    errors = tl.zeros_like(w)
    # U comes from L2, farther away than a column's work takes: the loads run two rows ahead.
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
        other = tl.gather(scores, tl.full([scores.shape[0], 1], i, tl.int32), 1)
        rank += ((other > scores) | ((other == scores) & (i < cols))).to(tl.int32)
    return rank
