"""masked_matmul: a linear layer whose mask is being learnt, and its straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch


def masked_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """y = x (W ⊙ 1[m̂ ≥ φ])ᵀ + b, and by autograd, with G = dyᵀ x and the indicator's derivative taken for 1,
    dL/dm̂ = G ⊙ W, dL/dW = G ⊙ 1[m̂ ≥ φ], dL/dx = dy (W ⊙ 1[m̂ ≥ φ]). [Liu et al. 2022, Eq. 2 and 4]

    x: float32 or bfloat16 [..., n_in]; y [..., n_out] and dL/dx are of its type. weight: W, float32 [n_out, n_in].
    scores: m̂, float32 [n_out / g, n_in]: g consecutive rows share a score, whose gradient is the sum of theirs. A NaN
    score is not kept. threshold: φ, float32 [] or, for N:M, [n_out / g, n_in / m], one for m consecutive inputs; it has
    no gradient. bias: float32 [n_out].

    On the CPU neither mask nor W ⊙ mask nor G is ever whole in memory: the mask is applied as W is packed, dL/dm̂ made
    where a tile of G is finished. Sums are float32; with bfloat16 x, W is rounded to it before it is multiplied, y and
    dL/dx at the end. The result does not depend on `threads`. On a GPU plain torch computes the same.
    Raises InputError for other types, shapes or devices.
    """
    _check(x, weight, scores, threshold, bias)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return _forward_op(x, weight, scores, threshold, bias, isa, threads)
    # An operator of torch's library takes 0.2 ms a step more than this, as long as a small layer's products.
    return _Layer.apply(x, weight, scores, threshold, bias, isa, threads)


def masked_matmul_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
    grad_y: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(y, and where grad_y is given dL/dx, dL/dW, dL/dm̂, dL/db) in float64."""
    keep = kept(weight, scores, threshold)
    x64, w64 = x.double(), weight.double()
    y = x64 @ (w64 * keep).T + (0 if bias is None else bias.double())
    if grad_y is None:
        return (y,)
    grad_y = grad_y.double()
    flat, flat_x = grad_y.reshape(-1, len(weight)), x64.reshape(-1, x.shape[-1])
    g = flat.T @ flat_x
    grad_scores = (g * w64).view(len(scores), -1, weight.shape[1]).sum(1)
    return y, grad_y @ (w64 * keep), g * keep, grad_scores, flat.sum(0)


def kept(weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """1[m̂ ≥ φ], bool [n_out, n_in]."""
    if threshold.ndim:
        threshold = threshold.repeat_interleave(scores.shape[1] // threshold.shape[1], 1)
    return (scores >= threshold).repeat_interleave(len(weight) // len(scores), 0)


def _forward(x, weight, scores, threshold, bias, isa: str | None, threads: int | None) -> torch.Tensor:
    flat = _bits(x.reshape(-1, x.shape[-1]))
    y = x.new_empty(*x.shape[:-1], len(weight))
    _dispatch.core().masked_matmul(
        flat,
        *map(_bits, (weight, scores, threshold, bias)),
        _bits(y).reshape(len(flat), len(weight)),
        _dispatch.isa(isa),
        _dispatch.threads(threads),
    )
    return y


def _backward(
    grad_y, x, weight, scores, threshold, wanted: Sequence[bool], isa: str | None, threads: int | None
) -> list[torch.Tensor | None]:
    """dL/dx, dL/dW, dL/dm̂, None where it is not wanted."""
    made = [
        torch.empty_like(of, memory_format=torch.contiguous_format) if want else None
        for of, want in zip((x, weight, scores), wanted, strict=True)
    ]
    grad_x, grad_weight, grad_scores = map(_bits, made)
    flat_y, flat_x = (_bits(part.reshape(-1, part.shape[-1])) for part in (grad_y, x))
    _dispatch.core().masked_matmul_backward(
        flat_y,
        flat_x,
        *map(_bits, (weight, scores, threshold)),
        grad_x,
        grad_scores,
        grad_weight,
        _dispatch.isa(isa),
        _dispatch.threads(threads),
    )
    return made


class _Layer(torch.autograd.Function):
    """On the CPU by the core, on other devices in plain torch."""

    @staticmethod
    def forward(ctx, x, weight, scores, threshold, bias, isa, threads):
        ctx.save_for_backward(x, weight, scores, threshold)
        ctx.how = isa, threads
        if x.device.type == "cpu":
            return _forward(x, weight, scores, threshold, bias, isa, threads)
        masked = (weight * kept(weight, scores, threshold)).to(x.dtype)
        return torch.nn.functional.linear(x, masked, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, scores, threshold = ctx.saved_tensors
        wanted, for_bias = ctx.needs_input_grad[:3], None
        if ctx.needs_input_grad[4]:
            for_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32)
        if not any(wanted):
            found = [None, None, None]
        elif x.device.type == "cpu":
            found = _backward(grad_y, x, weight, scores, threshold, wanted, *ctx.how)
        else:
            found = _backward_torch(grad_y, x, weight, scores, threshold, wanted)
        return *found, None, for_bias, None, None


def _backward_torch(grad_y, x, weight, scores, threshold, wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    """The same as `_backward` for devices without a kernel that was measured."""
    found: list[torch.Tensor | None] = [None, None, None]
    keep = kept(weight, scores, threshold)
    if wanted[0]:
        found[0] = grad_y @ (weight * keep).to(x.dtype)
    if wanted[1] or wanted[2]:
        g = (grad_y.reshape(-1, grad_y.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float()
        found[1] = g * keep if wanted[1] else None
        found[2] = (g * weight).view(len(scores), -1, weight.shape[1]).sum(1) if wanted[2] else None
    return found


# The same as operators of torch's library, which torch.compile sees.


@torch.library.custom_op("sparsebert::masked_matmul", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None,
    isa: str | None,
    threads: int | None,
) -> torch.Tensor:
    return _forward(x, weight, scores, threshold, bias, isa, threads)


@_forward_op.register_fake
def _(x, weight, scores, threshold, bias, isa, threads):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("sparsebert::masked_matmul_backward", mutates_args=())
def _backward_op(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    wanted: list[bool],
    isa: str | None,
    threads: int | None,
) -> list[torch.Tensor]:
    """Those of dL/dx, dL/dW, dL/dm̂ that are wanted; of the others, nothing."""
    found = _backward(grad_y, x, weight, scores, threshold, wanted, isa, threads)
    return [made for made in found if made is not None]


@_backward_op.register_fake
def _(grad_y, x, weight, scores, threshold, wanted, isa, threads):
    return [torch.empty_like(of) for of, want in zip((x, weight, scores), wanted, strict=True) if want]


def _keep_inputs(ctx, inputs, output):
    *tensors, _, ctx.isa, ctx.threads = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_y):
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(())
    if any(wanted):
        found = iter(_backward_op(grad_y.contiguous(), *ctx.saved_tensors, wanted, ctx.isa, ctx.threads))
    for_bias = None
    if ctx.needs_input_grad[4]:
        for_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32)
    return *(next(found) if want else None for want in wanted), None, for_bias, None, None


_forward_op.register_autograd(_gradients, setup_context=_keep_inputs)


def _bits(tensor: torch.Tensor | None) -> np.ndarray | None:
    """As numpy sees it: bfloat16 as its bits."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None
) -> None:
    floats = {"weight": weight, "scores": scores, "threshold": threshold} | ({} if bias is None else {"bias": bias})
    for name, tensor in floats.items():
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise InputError(
                f"{name} must be float32 on {x.device}, got {tensor.dtype} on {tensor.device}", fix="convert it first"
            )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"x must be float32 or bfloat16, got {x.dtype}", fix="convert it first")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"x must be [..., n_in] for weight [n_out, n_in], got {list(x.shape)} for {list(weight.shape)}",
            fix="correct x",
        )
    n_out, n_in = weight.shape
    if scores.ndim != 2 or scores.shape[1] != n_in or not len(scores) or n_out % len(scores):
        raise InputError(
            f"scores must be [n_out / g, n_in] of weight {list(weight.shape)}, got {list(scores.shape)}",
            fix="correct scores",
        )
    shared = (
        threshold.ndim == 2 and len(threshold) == len(scores) and threshold.shape[1] and not n_in % threshold.shape[1]
    )
    if threshold.ndim != 0 and not shared:
        raise InputError(
            f"threshold must be [] or [{len(scores)}, n_in / m] with n_in = {n_in}, got {list(threshold.shape)}",
            fix="correct threshold",
        )
    if bias is not None and bias.shape != (n_out,):
        raise InputError(f"bias must be [{n_out}], got {list(bias.shape)}", fix="correct bias")
