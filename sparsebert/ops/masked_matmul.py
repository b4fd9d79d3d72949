"""masked_matmul: a linear layer whose weight is masked by learned scores, with straight-through gradients. Mask
training [Liu et al. 2022, Alg. 2] runs it in each step.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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
    """y = x (W ⊙ 1[ŝ ≥ φ])ᵀ + b, [..., n_out] of x's dtype; neither the mask nor the masked weight is stored.

    x: float32 or bfloat16 [..., n_in], of any strides. weight: float32 [n_out, n_in], n_out and n_in at least 1.
    scores: ŝ, float32 [score_rows, n_in]; n_out / score_rows consecutive rows share a score.
    threshold: φ, float32 [], or [score_rows, n_in / m]: one for every m consecutive inputs. bias: float32 [n_out].
    A NaN score is not >= its threshold, so its weights are not kept. If x is not finite, weights that are not kept may
    or may not turn it into NaN.

    Gradients are straight-through: the gradient of the mask is used for ŝ. With G = dYᵀ X, dŝ is the sum of G ⊙ W over
    the rows that share a score, whether kept or not; dW = G ⊙ mask, dX = dY (W ⊙ mask), db = Σ dY. dX has x's dtype,
    the others are float32; the threshold has no gradient. Only the gradients that are needed are computed, and G is not
    stored.

    With bfloat16, y and dX are computed from weights rounded to bfloat16, and G ⊙ W from the float32 weights. Sums are
    float32. Results do not depend on `threads`; in float32 they are bit-equal on avx2 and avx512. bfloat16 has its own
    kernels on amx and avx512_bf16, and a slow reference kernel on scalar; elsewhere it is multiplied as float32. From
    128 tokens on, y and dX multiply only the kept weights if fewer than 35 % are kept (12 % with the bfloat16 kernel of
    avx512_bf16; never with the bfloat16 kernel of amx). In float32 this gives the same bits.
    On a GPU the kernels are in Triton; `threads` and `isa` are ignored.
    Raises InputError for another dtype, shape or layout, or tensors on different devices, and on a GPU UnsupportedError
    if Triton is missing.
    """
    _check(x, weight, scores, threshold, bias)
    # torch.compile needs an operator of torch's library. Calling one takes longer than a small layer: 0.2 ms per step.
    call = _masked_matmul if torch.compiler.is_compiling() else _Direct.apply
    return call(x, weight, scores, threshold, bias, isa or "", threads or 0)


def masked_matmul_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference for `masked_matmul`, in float64 throughout and without rounding to bfloat16; the gradients come from
    autograd.
    """
    share = len(weight) // len(scores)
    mask = _Straight.apply(scores.double(), _limits(scores, threshold).double()).repeat_interleave(share, 0)
    return F.linear(x.double(), weight.double() * mask, None if bias is None else bias.double())


class _Straight(torch.autograd.Function):
    """1[s >= t]; its gradient is passed on to s unchanged."""

    @staticmethod
    def forward(ctx, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s >= t).to(s.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None,
    isa: str,
    threads: int,
) -> torch.Tensor:
    """`isa` "" and `threads` 0 stand for None."""
    if x.is_cuda:
        y = _kernel().masked_matmul(x.reshape(-1, x.shape[-1]).contiguous(), weight, scores, threshold, bias)
        return y.view(*x.shape[:-1], len(weight))
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    _dispatch.core().masked_matmul(
        _rows(x), *map(_dispatch.array, (weight, scores, threshold, bias)), _rows(y), *_run_on(isa, threads)
    )
    return y


_masked_matmul = torch.library.custom_op("sparsebert::masked_matmul", _forward, mutates_args=())


@_masked_matmul.register_fake
def _(x, weight, scores, threshold, bias, isa, threads):
    return x.new_empty(*x.shape[:-1], len(weight))


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    needed: list[bool],
    isa: str,
    threads: int,
) -> list[torch.Tensor]:
    """Those of dX, dW and dŝ that are `needed`, in this order."""
    if x.is_cuda:
        flat = (part.reshape(-1, part.shape[-1]).contiguous() for part in (dy, x))
        found = _kernel().masked_matmul_backward(*flat, weight, scores, threshold, tuple(needed))
        return [found[0].view(x.shape), *found[1:]] if needed[0] else found
    gradients = [
        torch.empty(like.shape, dtype=like.dtype) if wanted else None
        for like, wanted in zip((x, weight, scores), needed, strict=True)
    ]
    dx, d_weight, d_scores = gradients
    _dispatch.core().masked_matmul_backward(
        *map(_rows, (x, dy)),
        *map(_dispatch.array, (weight, scores, threshold)),
        None if dx is None else _rows(dx),
        *map(_dispatch.array, (d_weight, d_scores)),
        *_run_on(isa, threads),
    )
    return [gradient for gradient in gradients if gradient is not None]


_masked_matmul_backward = torch.library.custom_op("sparsebert::masked_matmul_backward", _backward, mutates_args=())


@_masked_matmul_backward.register_fake
def _(dy, x, weight, scores, threshold, needed, isa, threads):
    return [like.new_empty(like.shape) for like, wanted in zip((x, weight, scores), needed, strict=True) if wanted]


def _kernel() -> ModuleType:
    with _dispatch.needing_triton("masked_matmul"):
        from sparsebert.kernels import masked_matmul
    return masked_matmul


def _save(ctx, inputs, output) -> None:
    x, weight, scores, threshold, _, ctx.isa, ctx.threads = inputs
    ctx.save_for_backward(x, weight, scores, threshold)


def _gradients(ctx, dy: torch.Tensor, backward=_masked_matmul_backward):
    *needed, _, bias = ctx.needs_input_grad[:5]
    found = iter(())
    if any(needed):
        found = iter(backward(dy, *ctx.saved_tensors, needed, ctx.isa, ctx.threads))
    d_bias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32) if bias else None
    return *(next(found) if wanted else None for wanted in needed), None, d_bias, None, None


_masked_matmul.register_autograd(_gradients, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The same as `_masked_matmul`, without a custom operator of torch's library."""

    @staticmethod
    def forward(ctx, *inputs) -> torch.Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        return _gradients(ctx, dy, _backward)


def _limits(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """The threshold of each score."""
    return threshold.repeat_interleave(scores.shape[1] // threshold.shape[1], 1) if threshold.ndim else threshold


def _run_on(isa: str, threads: int) -> tuple[str, int]:
    return _dispatch.isa(isa or None), _dispatch.threads(threads or None)


def _rows(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as an array [tokens, n]; a view if the tensor is contiguous."""
    return _dispatch.array(tensor.reshape(-1, tensor.shape[-1]))


def _check(x, weight, scores, threshold, bias) -> None:
    for name, value in (("weight", weight), ("scores", scores)):
        if value.dtype != torch.float32 or value.ndim != 2 or not value.numel() or not value.is_contiguous():
            raise InputError(
                f"{name} must be contiguous float32 [rows >= 1, n_in >= 1], got {_describe(value)}",
                fix="convert it first",
            )
    n_out, n_in = weight.shape
    if scores.shape[1] != n_in or n_out % len(scores):
        raise InputError(
            f"scores must be [score_rows, {n_in}], score_rows dividing n_out = {n_out}, got {list(scores.shape)}",
            fix="match the weight and its scores",
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or x.ndim < 1 or x.shape[-1] != n_in:
        raise InputError(
            f"x must be float32 or bfloat16 [..., n_in = {n_in}], got {_describe(x)}", fix="convert it first"
        )
    per_inputs = threshold.ndim == 2 and len(threshold) == len(scores) and threshold.shape[1] > 0
    if (
        threshold.dtype != torch.float32
        or not threshold.is_contiguous()
        or not (threshold.ndim == 0 or (per_inputs and n_in % threshold.shape[1] == 0))
    ):
        raise InputError(
            f"threshold must be contiguous float32 [] or [{len(scores)}, n_in / m], m dividing n_in = {n_in}, got "
            f"{_describe(threshold)}",
            fix="give one threshold, or one for every m consecutive inputs of each row of scores",
        )
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (n_out,) or not bias.is_contiguous()):
        raise InputError(f"bias must be contiguous float32 [{n_out}], got {_describe(bias)}", fix="convert it first")
    if x.device.type not in ("cpu", "cuda"):
        raise InputError(f"x must be on the CPU or an NVIDIA GPU, got {x.device}", fix="move it to one of these")
    others = [weight, scores, threshold] + ([] if bias is None else [bias])
    if any(other.device != x.device for other in others):
        raise InputError(
            f"all tensors must be on x's device {x.device}, got {sorted({str(other.device) for other in others})}",
            fix="move them to that device",
        )


def _describe(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}{'' if value.is_contiguous() else ', strided'}"
