"""dropout: draws its random numbers again in the backward pass, so that no mask is stored."""

from __future__ import annotations

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch

LEVELS = 1 << 16  # possible values of a draw
BLOCK = 128  # values drawn from 16 consecutive counters


def dropout(
    x: torch.Tensor, p: float, seed: int, *, threads: int | None = None, isa: str | None = None
) -> torch.Tensor:
    """Sets each value to 0 with probability p, and the others to x / (1 - p). Returns x's shape and dtype.

    x: float32 or bfloat16, on the CPU, of any strides. p: from 0 to below 1, rounded to a multiple of 1 / 65536. seed:
    from 0 to below 2^64; the same values are dropped for the same seed and number of values, on any number of threads
    and any instruction set. The draws are Philox4x32-7 [Salmon et al. 2011]. Differentiable once.
    Raises InputError for another dtype, device, p or seed.
    """
    check_values("x", x)
    if (limit := limit_of(p, seed)) == 0:
        return x
    return _Dropout.apply(x, seed, limit, _dispatch.isa(isa), _dispatch.threads(threads))


def dropout_ref(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Reference for `dropout`, in float64."""
    limit = limit_of(p, seed)
    blocks = -(-x.numel() // BLOCK)
    counters = np.zeros((blocks, 16, 4), np.uint32)
    number = np.arange(blocks * 16, dtype=np.uint64).reshape(blocks, 16)
    counters[..., 0], counters[..., 1] = number & 0xFFFFFFFF, number >> np.uint64(32)
    drawn = draws(seed, counters).transpose(0, 2, 1).reshape(-1)[: x.numel()].reshape(x.shape)
    return x.double() * torch.from_numpy(drawn >= limit) * (LEVELS / (LEVELS - limit))


def draws(seed: int, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-7 of `counters`, uint32 [..., 4]. Returns uint16 [..., 8]: each word is cut into its lower and its
    upper half.
    """
    c = [counters[..., i].astype(np.uint64) for i in range(4)]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    word = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        first, third = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (third >> np.uint64(32)) ^ c[1] ^ np.uint64(low),
            third & word,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(high),
            first & word,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype("<u4").view("<u2")


def limit_of(p: float, seed: int) -> int:
    """The draw below which a value is dropped. Raises InputError for a p or seed out of range."""
    limit = round(p * LEVELS) if 0 <= p < 1 else LEVELS
    if limit >= LEVELS:
        raise InputError(f"dropout must be from 0 to below 1, got {p!r}", fix="pass a value in that range")
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed must be from 0 to below 2^64, got {seed!r}", fix="pass a value in that range")
    return limit


def check_values(name: str, x: torch.Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        raise InputError(
            f"{name} must be float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}", fix="convert it first"
        )


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, seed: int, limit: int, isa: str, threads: int) -> torch.Tensor:
        ctx.how = seed, limit, isa, threads
        return _drop(x, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        return _drop(dy, *ctx.how), None, None, None, None


def _drop(x: torch.Tensor, seed: int, limit: int, isa: str, threads: int) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _dispatch.core().dropout(_dispatch.array(x), seed, limit, _dispatch.array(y), isa, threads)
    return y
