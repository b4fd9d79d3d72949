"""masked_matmul on a GPU: the mask is made in registers, as tiles of W and of its scores are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebert.errors import UnsupportedError

# Of a program's tile of the result, and how much of the sum's dimension it reads at a time. 64 x 64 sums of 4 warps
# take 32 registers a thread, which leaves room for two tiles of operands in flight.
TILE, DEPTH = 64, 32
OPTIONS = {"num_warps": 4, "num_stages": 3}


def masked_matmul(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y of `sparsebert.ops.masked_matmul`, which see for shapes and types, on a GPU; x [tokens, n_in], contiguous.

    float32 products are IEEE's, sums float32. Raises UnsupportedError where rows that share a score are no power of two
    of at most 64.
    """
    tokens, (n_out, n_in) = len(x), weight.shape
    y = x.new_empty(tokens, n_out)
    constants = _constants(x, weight, scores, threshold)
    with torch.cuda.device_of(x):
        _multiply[_grid(tokens, n_out)](
            x, weight, scores, threshold, bias, y, tokens, n_out, n_in, n_in, BACK=False, **constants
        )
    return y


def masked_matmul_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """Those of dL/dx, dL/dW, dL/dm̂ that are wanted, in this order; see `masked_matmul`."""
    tokens, (n_out, n_in) = len(x), weight.shape
    constants = _constants(x, weight, scores, threshold)
    grad_x = torch.empty_like(x) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_scores = torch.empty_like(scores) if wanted[2] else None
    with torch.cuda.device_of(x):
        if grad_x is not None:
            _multiply[_grid(tokens, n_in)](
                grad_y, weight, scores, threshold, None, grad_x, tokens, n_in, n_out, n_in, BACK=True, **constants,
            )  # fmt: skip
        if grad_weight is not None or grad_scores is not None:
            _gradients[_grid(n_out, n_in)](
                grad_y, x, weight, scores, threshold, grad_weight, grad_scores, tokens, n_out, n_in, **constants
            )
    return [made for made in (grad_x, grad_weight, grad_scores) if made is not None]


def _grid(rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE), triton.cdiv(cols, TILE)


def _constants(x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor) -> dict[str, int]:
    share = len(weight) // len(scores)
    if share > TILE or share & (share - 1):
        raise UnsupportedError(
            f"rows that share a score must be a power of two of at most {TILE}, got {share}", fix="use another pattern"
        )
    reach = weight.shape[1] // threshold.shape[1] if threshold.ndim else 0
    # The interpreter multiplies the bits of bf16, not its values; of float32 the products are the same.
    widen = triton.knobs.runtime.interpret
    constants = {"SHARE": share, "REACH": reach, "WIDEN": widen, "TILE": TILE}
    # IEEE's float32 has no tensor cores: operands wait in registers, of which a deeper tile or fewer warps would need
    # more than there are (sm_90).
    if x.dtype == torch.float32:
        return constants | {"DEPTH": 16, "num_warps": 8, "num_stages": 2}
    return constants | {"DEPTH": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _kept(scores_ptr, threshold_ptr, rows, cols, inside, n_in, SHARE: tl.constexpr, REACH: tl.constexpr):
    """1[m̂ ≥ φ] of a tile of W, by its row and column indices; a NaN score is not kept."""
    shared = rows // SHARE
    scores = tl.load(scores_ptr + shared * n_in + cols, mask=inside, other=0.0)
    if REACH > 0:
        threshold = tl.load(threshold_ptr + shared * (n_in // REACH) + cols // REACH, mask=inside, other=0.0)
    else:
        threshold = tl.load(threshold_ptr)
    return scores >= threshold


@triton.jit
def _multiply(
    left_ptr,  # [rows, depth]: x, or grad_y
    weight_ptr,  # [n_out, n_in]
    scores_ptr,  # [n_out / SHARE, n_in]
    threshold_ptr,  # [] or [n_out / SHARE, n_in / REACH]
    bias_ptr,  # [cols] or None
    out_ptr,  # [rows, cols]
    rows,
    cols,
    depth,
    n_in,
    BACK: tl.constexpr,  # left times W, and not times its transpose
    SHARE: tl.constexpr,
    REACH: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply as float32
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    sums = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(left_ptr + row * depth + k[None, :], mask=(row < rows) & (k[None, :] < depth), other=0.0)
        # Of W a tile [DEPTH, TILE]: in a forward product its rows are the result's columns.
        of_row, of_col = (k[:, None], col) if BACK else (col, k[:, None])
        inside = (k[:, None] < depth) & (col < cols)
        at = of_row * n_in + of_col
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        keep = _kept(scores_ptr, threshold_ptr, of_row, of_col, inside, n_in, SHARE, REACH)
        right = tl.where(keep, weight, 0.0).to(left.dtype)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums += tl.dot(left, right, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + col, mask=col < cols, other=0.0)
    tl.store(out_ptr + row * cols + col, sums.to(out_ptr.dtype.element_ty), mask=(row < rows) & (col < cols))


@triton.jit
def _gradients(
    grad_y_ptr,  # [tokens, n_out]
    x_ptr,  # [tokens, n_in]
    weight_ptr,
    scores_ptr,
    threshold_ptr,
    grad_weight_ptr,  # [n_out, n_in] or None
    grad_scores_ptr,  # [n_out / SHARE, n_in] or None
    tokens,
    n_out,
    n_in,
    SHARE: tl.constexpr,
    REACH: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply as float32
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first = tl.program_id(0) * TILE
    row = (first + tl.arange(0, TILE)).to(tl.int64)
    col = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    g = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, tokens, DEPTH):
        t = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(
            grad_y_ptr + t[None, :] * n_out + row[:, None],
            mask=(t[None, :] < tokens) & (row[:, None] < n_out),
            other=0.0,
        )
        right = tl.load(x_ptr + t[:, None] * n_in + col, mask=(t[:, None] < tokens) & (col < n_in), other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        g += tl.dot(left, right, input_precision="ieee")
    inside = (row[:, None] < n_out) & (col < n_in)
    at = row[:, None] * n_in + col
    if grad_weight_ptr is not None:
        keep = _kept(scores_ptr, threshold_ptr, row[:, None], col, inside, n_in, SHARE, REACH)
        tl.store(grad_weight_ptr + at, tl.where(keep, g, 0.0), mask=inside)
    if grad_scores_ptr is not None:
        # A tile holds whole groups of rows that share a score.
        products = g * tl.load(weight_ptr + at, mask=inside, other=0.0)
        shared = tl.sum(tl.reshape(products, [TILE // SHARE, SHARE, TILE]), 1)
        group = first // SHARE + tl.arange(0, TILE // SHARE)
        inside_groups = (group[:, None] < n_out // SHARE) & (col < n_in)
        tl.store(grad_scores_ptr + group[:, None].to(tl.int64) * n_in + col, shared, mask=inside_groups)
