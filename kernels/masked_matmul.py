"""masked_matmul on a GPU. The mask is applied when a tile of the weight is loaded; the gradients of the scores are
computed together with a tile of G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A tile of results is BLOCK x BLOCK. Tensor cores do not multiply float32, which therefore uses more warps and shorter
# steps. The values were chosen so that no register spills on sm_90, not by timing.
BLOCK = 64
STEPS = {torch.float32: 16, torch.bfloat16: 32}  # terms of a sum that are multiplied at a time
OPTIONS = {torch.float32: {"num_warps": 8, "num_stages": 3}, torch.bfloat16: {"num_warps": 4, "num_stages": 3}}


def masked_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns y like `sparsebert.ops.masked_matmul.masked_matmul`, no gradients. x: contiguous [tokens, n_in]."""
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    return _times_kept(x, weight, scores, threshold, bias, False, y)


def masked_matmul_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> list[torch.Tensor]:
    """Returns those of dX, dW and dŝ that are `needed`. dy: contiguous dY [tokens, n_out], of x's dtype."""
    gradients = []
    if needed[0]:
        gradients.append(_times_kept(dy, weight, scores, threshold, None, True, torch.empty_like(x)))
    if not needed[1] and not needed[2]:
        return gradients
    d_weight = torch.empty_like(weight) if needed[1] else None
    d_scores = torch.empty_like(scores) if needed[2] else None
    (n_out, n_in), share = weight.shape, len(weight) // len(scores)
    constants = _constants(x.dtype, weight, scores, threshold) | _rows_plan(share)
    grid = (triton.cdiv(n_out, constants["SPAN"]), triton.cdiv(n_in, BLOCK))
    with torch.cuda.device_of(x):  # a launch goes to the current device
        _gradients[grid](
            dy, x, weight, scores, threshold, d_weight, d_scores, len(x), n_out, n_in, **constants, **OPTIONS[x.dtype]
        )
    return gradients + [gradient for gradient in (d_weight, d_scores) if gradient is not None]


def _times_kept(x, weight, scores, threshold, bias, across: bool, out: torch.Tensor) -> torch.Tensor:
    n_out, n_in = weight.shape
    grid = (triton.cdiv(len(x), BLOCK), triton.cdiv(n_in if across else n_out, BLOCK))
    if len(x):
        constants = _constants(x.dtype, weight, scores, threshold) | {"ACROSS": across}
        with torch.cuda.device_of(x):
            _product[grid](
                x, weight, scores, threshold, bias, out, len(x), n_out, n_in, **constants, **OPTIONS[x.dtype]
            )
    return out


def _constants(
    dtype: torch.dtype, weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor
) -> dict[str, int]:
    """The compile-time constants of both kernels."""
    reach = weight.shape[1] // threshold.shape[1] if threshold.ndim else 0
    return {"SHARE": len(weight) // len(scores), "REACH": reach, "BLOCK": BLOCK, "STEP": STEPS[dtype]}


def _rows_plan(share: int) -> dict[str, int]:
    """SPAN, the rows per program, and SETS, the rows of scores per tile. A program covers all rows that share a score,
    so that no two programs add to the same score.
    """
    whole = BLOCK % share == 0
    return {"SPAN": BLOCK if whole else share, "SETS": BLOCK // share if whole else 1}


@triton.jit
def _kept(scores_ptr, threshold_ptr, rows, cols, inside, n_in, SHARE: tl.constexpr, REACH: tl.constexpr):
    """True for the weights at rows x cols (broadcast) that are kept; one whose score is NaN is not kept."""
    score_rows = rows // SHARE
    scores = tl.load(scores_ptr + score_rows * n_in + cols, mask=inside, other=0.0)
    if REACH == 0:  # no return here: what follows one is compiled too, and an n_in of 1, a constant, divided by 0
        limits = tl.load(threshold_ptr)
    else:
        limits = tl.load(threshold_ptr + score_rows * (n_in // REACH) + cols // REACH, mask=inside, other=0.0)
    return scores >= limits


@triton.jit
def _product(
    x_ptr,  # [tokens, n_in]; ACROSS: [tokens, n_out]
    weight_ptr,  # float32 [n_out, n_in]
    scores_ptr,  # float32 [n_out / SHARE, n_in]
    threshold_ptr,  # float32 [], or [n_out / SHARE, n_in / REACH]
    bias_ptr,  # float32 [n_out], or None
    out_ptr,  # [tokens, n_out]; ACROSS: [tokens, n_in]; of x's type
    tokens,
    n_out,
    n_in,
    SHARE: tl.constexpr,  # rows per score
    REACH: tl.constexpr,  # inputs per threshold; 0: there is only one threshold
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACROSS: tl.constexpr,  # multiply x by the kept weight instead of its transpose
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    depth, columns = (n_out, n_in) if ACROSS else (n_in, n_out)
    x_at = x_ptr + token.to(tl.int64)[:, None] * depth
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, depth, STEP):
        k = start + tl.arange(0, STEP)
        x = tl.load(x_at + k[None, :], mask=(token < tokens)[:, None] & (k < depth)[None, :], other=0.0)
        inside = (k < depth)[:, None] & (column < columns)[None, :]
        if ACROSS:
            rows, cols = k.to(tl.int64)[:, None], column[None, :]
        else:
            rows, cols = column.to(tl.int64)[None, :], k[:, None]
        weight = tl.load(weight_ptr + rows * n_in + cols, mask=inside, other=0.0)
        kept = _kept(scores_ptr, threshold_ptr, rows, cols, inside, n_in, SHARE, REACH)
        sums = tl.dot(x, tl.where(kept, weight, 0.0).to(x.dtype), sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + column, mask=column < columns, other=0.0)[None, :]
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * columns + column[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=(token < tokens)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _gradients(
    dy_ptr,  # [tokens, n_out]
    x_ptr,  # [tokens, n_in]
    weight_ptr,  # float32 [n_out, n_in]
    scores_ptr,  # float32 [n_out / SHARE, n_in]
    threshold_ptr,  # float32 [], or [n_out / SHARE, n_in / REACH]
    d_weight_ptr,  # float32 [n_out, n_in], or None
    d_scores_ptr,  # float32 [n_out / SHARE, n_in], or None
    tokens,
    n_out,
    n_in,
    SHARE: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,  # rows per program
    SETS: tl.constexpr,  # rows of scores per tile
):
    first = tl.program_id(0) * SPAN
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = column[None, :]
    shared = tl.zeros([SETS, BLOCK], tl.float32)
    for begin in range(0, SPAN, BLOCK):
        own = begin + tl.arange(0, BLOCK)
        row = first + own
        there = (own < SPAN) & (row < n_out)
        g = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, tokens, STEP):
            token = start + tl.arange(0, STEP)
            at = token.to(tl.int64)
            dy = tl.load(
                dy_ptr + at[None, :] * n_out + row[:, None], mask=there[:, None] & (token < tokens)[None, :], other=0.0
            )
            x = tl.load(
                x_ptr + at[:, None] * n_in + cols, mask=(token < tokens)[:, None] & (column < n_in)[None, :], other=0.0
            )
            g = tl.dot(dy, x, g, input_precision="ieee")
        inside = there[:, None] & (column < n_in)[None, :]
        rows = row.to(tl.int64)[:, None]
        if d_weight_ptr is not None:
            kept = _kept(scores_ptr, threshold_ptr, rows, cols, inside, n_in, SHARE, REACH)
            tl.store(d_weight_ptr + rows * n_in + cols, tl.where(kept, g, 0.0), mask=inside)
        if d_scores_ptr is not None:
            product = g * tl.load(weight_ptr + rows * n_in + cols, mask=inside, other=0.0)
            shared += tl.sum(tl.reshape(product, [SETS, BLOCK // SETS, BLOCK]), 1)
    if d_scores_ptr is not None:
        score_row = first // SHARE + tl.arange(0, SETS)
        tl.store(
            d_scores_ptr + score_row.to(tl.int64)[:, None] * n_in + cols,
            shared,
            mask=(score_row < n_out // SHARE)[:, None] & (column < n_in)[None, :],
        )
