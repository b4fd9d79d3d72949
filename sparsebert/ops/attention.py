"""attention: attention with dropout, for training. It stores neither its scores nor a dropout mask."""

from __future__ import annotations

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.dropout import LEVELS, check_values, draws, limit_of


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """dropout(softmax(scale q kᵀ)) v for each attention head, [sequences, tokens, heads, size] of q's dtype.

    q, k, v: float32 or bfloat16 [sequences, tokens, heads, size], on the CPU. keep: bool [sequences, tokens], the
    tokens that are attended to; None: all. If a sequence keeps none, its result is 0. Every token attends, kept or not.
    scale: None for 1 / sqrt(size). dropout: probability, from 0 to below 1. seed: as for `ops.dropout`; the same values
    are dropped for the same seed, shapes and `keep`.

    The backward pass computes the scores again [Dao et al. 2022, without its tiles over keys: the scores of 8 to 32
    queries of one attention head fit in the second-level cache up to 512 tokens, the encoders' maximum]. All sums are
    float32. Results do not depend on `threads` and are bit-equal on avx2 and avx512. Differentiable once.
    Raises InputError for another dtype, device or shape.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_values(name, x)
        if x.ndim != 4 or x.shape != q.shape or x.dtype != q.dtype or not x.shape[3]:
            raise InputError(
                f"{name} must be [sequences, tokens, heads, size >= 1] and match q, got {x.dtype} {list(x.shape)}, "
                f"q is {q.dtype} {list(q.shape)}",
                fix="give q, k and v the same shape and dtype",
            )
    if keep is not None and (keep.dtype != torch.bool or keep.shape != q.shape[:2] or keep.device != q.device):
        raise InputError(
            f"keep must be bool {list(q.shape[:2])} on the CPU, got {keep.dtype} {list(keep.shape)} on {keep.device}",
            fix="convert it first",
        )
    keep = None if keep is None else _dispatch.clean(keep)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    how = scale, seed, limit_of(dropout, seed), _dispatch.isa(isa), _dispatch.threads(threads)
    return _Attention.apply(q, k, v, keep, how)


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Reference for `attention`, in float64; the gradients come from autograd."""
    sequences, tokens, heads, size = q.shape
    limit = limit_of(dropout, seed)
    keep = torch.ones(sequences, tokens, dtype=torch.bool) if keep is None else keep
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * (size**-0.5 if scale is None else scale)
    shares = scores.masked_fill(~keep[:, None, None, :], -torch.inf).softmax(-1).nan_to_num(0.0)
    kept = torch.from_numpy(_draws(keep.numpy(), heads, seed) >= limit)
    return torch.einsum("bhij,bjhd->bihd", shares * kept * (LEVELS / (LEVELS - limit)), v.double())


def _draws(keep: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """The draws, uint16 [sequences, heads, queries, keys]: query i and the j-th kept key get half-word j % 8 of the
    counter (i, j // 8, sequence * heads + head, 0).
    """
    sequences, tokens = keep.shape
    groups = -(-tokens // 8)
    counters = np.zeros((sequences * heads, tokens, groups, 4), np.uint32)
    counters[..., 0] = np.arange(tokens)[:, None]
    counters[..., 1] = np.arange(groups)
    counters[..., 2] = np.arange(sequences * heads)[:, None, None]
    ordered = draws(seed, counters).reshape(sequences, heads, tokens, groups * 8)
    places = np.maximum(keep.cumsum(1) - 1, 0)
    return np.take_along_axis(ordered, places[:, None, None, :], 3)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None, how: tuple):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        sequences, tokens, heads, _ = q.shape
        out, stats = torch.empty_like(q), torch.empty(sequences, heads, 2, tokens)
        *options, isa, threads = how
        arrays = [_dispatch.array(x) for x in (q, k, v, keep)]
        _dispatch.core().attention(*arrays, *options, _dispatch.array(out), _dispatch.array(stats), isa, threads)
        ctx.save_for_backward(q, k, v, keep, stats)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor):
        q, k, v, keep, stats = ctx.saved_tensors
        *options, isa, threads = ctx.how
        gradients = [torch.empty_like(q) for _ in range(3)]
        _dispatch.core().attention_backward(
            *(_dispatch.array(x) for x in (q, k, v, keep)),
            *options,
            *(_dispatch.array(x) for x in (stats, d_out, *gradients)),
            isa,
            threads,
        )
        return *gradients, None, None
