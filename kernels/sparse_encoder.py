"""sparse_encoder on a GPU: what stands between the linears. Sequences are concatenated without padding, activations
are stored by feature, [n, tokens], and sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Chosen so that no register spills on sm_90 with heads of up to 128, not by timing.
BLOCK = {torch.float32: 32, torch.bfloat16: 64}  # queries per program, and keys at a time
NORMED = 16384  # values per program of the kernels that end in a layer norm, which hold them in registers
MOST_TOKENS = 64  # per such program
ALIGNED = tl.constexpr(16)  # tokens, at whose multiples blocks of keys begin
WARPS = 8


def attention(
    qkv: torch.Tensor,
    first: torch.Tensor,
    stop: torch.Tensor,
    tokens: torch.Tensor,
    heads: int,
    out: torch.Tensor,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """Each token attends to the tokens of its sequence: softmax(q kᵀ / √d) v for each attention head, d its size.

    qkv: contiguous [3 H, T], query, key and value stacked; heads divides H.
    first, stop: int32 [T], of each token the first token of its sequence and the one after the last.
    tokens: int32 [1] on the device, at most T: only the first so many columns of the result are defined.
    invariant: a sequence's result is bit-equal whatever the other sequences; its keys are then loaded one by one, as
    they may begin at any address. Otherwise the order of its sums depends on where it begins.
    Returns out, contiguous [H, T] of qkv's dtype. No value of a sequence affects another.
    """
    hidden, width = qkv.shape[0] // 3, qkv.shape[1]
    size, plan = hidden // heads, _attention_plan(hidden // heads, qkv.dtype)
    scale = math.log2(math.e) / math.sqrt(size)
    with torch.cuda.device_of(qkv):  # a launch goes to the current device
        _attend[triton.cdiv(width, plan["BLOCK"]), heads](
            qkv, first, stop, tokens, out, width, hidden, scale, EXACT=invariant, **plan
        )
    return out


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    tokens: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Layer norm of x + residual over the features.

    x, residual: contiguous [n, T]. norm: weight and bias, float32 [n]. tokens: as for `attention`.
    Returns out, contiguous [n, T], which may be x or residual.
    """
    n, width = x.shape
    plan = _norm_plan(n)
    with torch.cuda.device_of(x):
        _add_norm[(triton.cdiv(width, plan["TOKENS"]),)](x, residual, *norm, tokens, out, n, width, eps, **plan)
    return out


def embed(
    ids: torch.Tensor,
    types: torch.Tensor,
    first: torch.Tensor,
    words: torch.Tensor,
    positions: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    tokens: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Layer norm of words[id] + positions[type, t - first[t]] for each token t.

    ids, types: int32 [T], below the vocabulary and the token types. first, tokens: as for `attention`. Of all three
    only the first `tokens` are read.
    words: contiguous [vocabulary, n]. positions: contiguous [types, max_length, n]. norm: float32 [n] each.
    Returns out, contiguous [n, T].
    """
    n, width = out.shape
    plan = _norm_plan(n)
    with torch.cuda.device_of(words):
        _embed[(triton.cdiv(width, plan["TOKENS"]),)](
            ids, types, first, words, positions, *norm, tokens, out, positions.shape[1], n, width, eps, **plan
        )
    return out


def _attention_plan(size: int, dtype: torch.dtype) -> dict[str, int]:
    """The constants and options of attention for heads of this size."""
    cols = max(16, triton.next_power_of_2(size))
    warps = 4 if cols <= 64 else 8
    return {"SIZE": size, "COLS": cols, "BLOCK": BLOCK[dtype], "num_warps": warps, "num_stages": 2}


def _norm_plan(n: int) -> dict[str, int]:
    """The tile of a program that norms n features: all of them, of as many tokens as registers hold."""
    cols = triton.next_power_of_2(n)
    return {"COLS": cols, "TOKENS": max(1, min(MOST_TOKENS, NORMED // cols)), "num_warps": WARPS}


@triton.jit
def _attend(
    qkv_ptr,  # [3 * hidden, width]
    first_ptr,  # int32 [width]
    stop_ptr,  # int32 [width]
    tokens_ptr,  # int32 [1]
    out_ptr,  # [hidden, width]
    width,
    hidden,
    scale,  # log2(e) / √SIZE
    SIZE: tl.constexpr,  # of an attention head
    COLS: tl.constexpr,  # SIZE, rounded up to a power of two
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,  # a sequence's first block of keys begins with its first token
):
    at = tl.program_id(0) * BLOCK
    query = at + tl.arange(0, BLOCK)
    end = tl.minimum(at + BLOCK, tl.load(tokens_ptr))
    feature = tl.arange(0, COLS)
    real = feature < SIZE
    row = (tl.program_id(1) * SIZE + feature).to(tl.int64) * width
    apart = hidden.to(tl.int64) * width  # from a query's value to the key's
    # Loads are masked by `width`: the compiler knows that it is a multiple of 16, and so loads several at a time.
    q = tl.load(qkv_ptr + row[None, :] + query[:, None], mask=(query < width)[:, None] & real[None, :], other=0.0)
    # One sequence after the other, so that a value of one, such as NaN, is never multiplied with those of another.
    while at < end:
        first, stop = tl.load(first_ptr + at), tl.load(stop_ptr + at)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, COLS], tl.float32)
        begin = first
        if not EXACT:
            begin = first // ALIGNED * ALIGNED
        for start in range(begin, stop, BLOCK):
            if not EXACT:
                start = tl.multiple_of(start, ALIGNED)
            key = start + tl.arange(0, BLOCK)
            there = ((key >= first) & (key < stop))[None, :]
            loaded = real[:, None] & (key < width)[None, :]
            k = tl.load(qkv_ptr + apart + row[:, None] + key[None, :], mask=loaded, other=0.0)
            scores = tl.where(there, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
            larger = tl.maximum(most, tl.max(scores, 1))
            shrunk = tl.exp2(most - larger)
            weights = tl.exp2(scores - larger[:, None])
            total = total * shrunk + tl.sum(weights, 1)
            v = tl.load(qkv_ptr + 2 * apart + row[:, None] + key[None, :], mask=loaded, other=0.0)
            v = tl.where(there, v, 0.0)
            sums = tl.dot(weights.to(v.dtype), tl.trans(v), sums * shrunk[:, None], input_precision="ieee")
            most = larger
        mine = (query >= at) & (query < tl.minimum(stop, end))
        tl.store(
            out_ptr + row[None, :] + query[:, None],
            (sums / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=mine[:, None] & real[None, :],
        )
        at = stop


@triton.jit
def _add_norm(
    x_ptr,  # [n, width]
    residual_ptr,  # [n, width]
    weight_ptr,  # float32 [n]
    bias_ptr,  # float32 [n]
    tokens_ptr,  # int32 [1]
    out_ptr,  # [n, width]
    n,
    width,
    eps,
    COLS: tl.constexpr,  # n, rounded up to a power of two
    TOKENS: tl.constexpr,
):
    tokens = tl.load(tokens_ptr)
    first = tl.program_id(0) * TOKENS
    if first >= tokens:
        return
    token = first + tl.arange(0, TOKENS)
    col = tl.arange(0, COLS)
    inside = (col < n)[:, None] & (token < width)[None, :]
    at = col.to(tl.int64)[:, None] * width + token[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, _normed(x, col, weight_ptr, bias_ptr, n, eps).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _embed(
    ids_ptr,  # int32 [width]
    types_ptr,  # int32 [width]
    first_ptr,  # int32 [width]
    words_ptr,  # [vocabulary, n]
    positions_ptr,  # [types, max_length, n]
    weight_ptr,  # float32 [n]
    bias_ptr,  # float32 [n]
    tokens_ptr,  # int32 [1]
    out_ptr,  # [n, width]
    max_length,
    n,
    width,
    eps,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.load(tokens_ptr)
    first = tl.program_id(0) * TOKENS
    if first >= tokens:
        return
    token = first + tl.arange(0, TOKENS)
    real = token < tokens
    col = tl.arange(0, COLS)
    inside = (col < n)[:, None] & (token < width)[None, :]
    # The others embed word 0 at position 0: what stands in their place may point anywhere.
    word = tl.load(ids_ptr + token, mask=real, other=0).to(tl.int64)
    position = tl.where(real, token - tl.load(first_ptr + token, mask=real, other=0), 0)
    position += tl.load(types_ptr + token, mask=real, other=0) * max_length
    x = tl.load(words_ptr + word[None, :] * n + col[:, None], mask=inside, other=0.0).to(tl.float32)
    at = position.to(tl.int64)[None, :] * n + col[:, None]
    x += tl.load(positions_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = col.to(tl.int64)[:, None] * width + token[None, :]
    tl.store(out_ptr + at, _normed(x, col, weight_ptr, bias_ptr, n, eps).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, col, weight_ptr, bias_ptr, n, eps):
    """Layer norm over the first axis of x, of which the entries from n on are 0."""
    real = (col < n)[:, None]
    weight = tl.load(weight_ptr + col, mask=col < n, other=0.0)[:, None]
    bias = tl.load(bias_ptr + col, mask=col < n, other=0.0)[:, None]
    centred = tl.where(real, x - (tl.sum(x, 0) / n)[None, :], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    return centred * scale[None, :] * weight + bias
