"""gram: streaming second moments of a layer's inputs, and their cross moments with the layer's target outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsebert.errors import InputError
from sparsebert.kernels import gram as kernel
from sparsebert.ops import _dispatch


@dataclass(eq=False)
class Moments:
    """Running weighted sums over tokens of x [n_in] and, if given, y [n_y]; `gram` adds to them.

    Sums are float64, of x - shift_x and y - shift_y, so that products of nearly constant values lose no digits. The
    properties are the centred moments, float64.
    """

    tokens: int  # those with a weight above 0
    weight: float  # sum of w
    shift_x: torch.Tensor  # float32 [n_in]
    sum_x: torch.Tensor  # [n_in], sum of w (x - shift_x)
    sum_xx: torch.Tensor  # [n_in, n_in], sum of w (x - shift_x)(x - shift_x)ᵀ; only i <= j is kept up to date
    shift_y: torch.Tensor | None = None  # float32 [n_y]
    sum_y: torch.Tensor | None = None  # [n_y]
    sum_yx: torch.Tensor | None = None  # [n_y, n_in]

    @property
    def mean_x(self) -> torch.Tensor:
        """[n_in], sum of w x / sum of w."""
        return self.shift_x + self.sum_x / self.weight

    @property
    def mean_y(self) -> torch.Tensor:
        """[n_y]."""
        return self.shift_y + self.sum_y / self.weight

    @property
    def gram(self) -> torch.Tensor:
        """[n_in, n_in], symmetric: sum of w (x - mean_x)(x - mean_x)ᵀ / sum of w."""
        mean = self.sum_x / self.weight
        upper = torch.triu(self.sum_xx) / self.weight
        return upper + torch.triu(upper, 1).T - torch.outer(mean, mean)

    @property
    def cross(self) -> torch.Tensor:
        """[n_y, n_in]: sum of w (y - mean_y)(x - mean_x)ᵀ / sum of w."""
        return self.sum_yx / self.weight - torch.outer(self.sum_y / self.weight, self.sum_x / self.weight)


def gram(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    into: Moments | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> Moments:
    """Adds a batch of tokens to `into` and returns it; without `into`, starts new moments, shifted by this batch's
    means.

    x: float32 [tokens, n_in], contiguous, on the CPU or a GPU, where the moments then are; the first batch has at least
    1 token.
    y: float32 [tokens, n_y], or None for no cross moments; the same choice in every batch.
    weights: float32 [tokens], each at least 0, or None for 1 each. A token of weight 0 adds exactly nothing.

    Products are float32. They are summed in float32 over at most 256 tokens, and these sums in float64. Products of
    values further than 1e18 from the shift may overflow. The result does not depend on `threads`, and is bit-equal on
    avx2 and avx512. On a GPU `threads` and `isa` are ignored, and the host waits once per batch, for what the checks
    found. Raises InputError for a wrong type or shape, for a weight that is negative or not finite, and for
    values that are not finite, whatever their weight, naming the first such token and column; `into` is then unchanged.
    Raises UnsupportedError on a GPU if torch's matrix products are set to TF32.
    """
    _check(x, y, weights, into)
    if x.is_cuda:
        return _on_gpu(x, y, weights, into)
    _check_weights(weights)
    run = _dispatch.isa(isa), _dispatch.threads(threads)
    if into is not None and not len(x):
        return into
    moments = _start(x, y, weights, run) if into is None else into
    finite = _dispatch.core().gram(
        *map(_array, (x, moments.shift_x, y, moments.shift_y, weights)),
        *map(_array, (moments.sum_x, moments.sum_xx, moments.sum_y, moments.sum_yx)),
        *run,
    )
    if not finite:
        raise _not_finite(x, y)
    moments.tokens += len(x) if weights is None else int((weights > 0).sum())
    moments.weight += _total(x, weights)
    return moments


def _on_gpu(x: torch.Tensor, y: torch.Tensor | None, weights: torch.Tensor | None, into: Moments | None) -> Moments:
    if into is not None and not len(x):
        return into
    moments = into
    if moments is None:
        moments = _empty(*(None if values is None else kernel.means(values, weights) for values in (x, y)))
    batch = kernel.Batch(x, moments.shift_x, y, moments.shift_y, weights)
    weights_right, finite, tokens, weight = batch.facts()
    if not weights_right:
        _check_weights(weights)
    if not finite:
        raise _not_finite(x, y)
    batch.add_to(moments.sum_x, moments.sum_xx, moments.sum_y, moments.sum_yx)
    moments.tokens += tokens
    moments.weight += weight
    return moments


def gram_ref(
    x: torch.Tensor, y: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reference for `gram`: (gram [n_in, n_in], cross [n_y, n_in]) of one batch, in float64, in two passes."""
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    w = w / w.sum()
    x = x.double()
    x = x - w @ x
    if y is None:
        return (x * w[:, None]).T @ x, None
    y = y.double()
    y = y - w @ y
    return (x * w[:, None]).T @ x, (y * w[:, None]).T @ x


def _start(x: torch.Tensor, y: torch.Tensor | None, weights: torch.Tensor | None, run: tuple[str, int]) -> Moments:
    """Empty moments, shifted by the weighted means of a batch, or by the plain means if all weights are 0."""
    total = _total(x, weights)
    if total == 0:
        weights, total = None, len(x)

    def mean(values: torch.Tensor) -> torch.Tensor:
        n = values.shape[1]
        sums = _dispatch.core().token_sums(_array(values), _array(weights), np.zeros(n, np.float32), *run)
        return torch.from_numpy((sums / total).astype(np.float32))

    return _empty(mean(x), None if y is None else mean(y))


def _empty(shift_x: torch.Tensor, shift_y: torch.Tensor | None) -> Moments:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=shift_x.device)

    n_in = len(shift_x)
    moments = Moments(0, 0.0, shift_x, zeros(n_in), zeros(n_in, n_in))
    if shift_y is not None:
        n_y = len(shift_y)
        moments.shift_y, moments.sum_y, moments.sum_yx = shift_y, zeros(n_y), zeros(n_y, n_in)
    return moments


def _not_finite(x: torch.Tensor, y: torch.Tensor | None) -> InputError:
    """The error for a batch whose sums are not finite."""
    for name, values in (("x", x), ("y", y)):
        if values is not None and not (finite := torch.isfinite(values)).all():
            token, column = (~finite).nonzero()[0].tolist()
            return InputError(
                f"{name} must be finite, got {values[token, column]:g} at token {token}, column {column}",
                fix="find the layer that makes it, or leave the sentence out",
            )
    return InputError("the sums of w x and w y must stay within float32's range", fix="scale the weights down")


def _total(x: torch.Tensor, weights: torch.Tensor | None) -> float:
    return float(len(x)) if weights is None else float(_array(weights).sum(dtype=np.float64))


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy()


def _check(x: torch.Tensor, y: torch.Tensor | None, weights: torch.Tensor | None, into: Moments | None) -> None:
    place = _dispatch.place(x) if isinstance(x, torch.Tensor) else (torch.device("cpu"), "the CPU")
    _check_tokens("x", "n_in", x, place)
    if into is None and not len(x):
        raise InputError(f"the first batch must have a token, got x {list(x.shape)}", fix="leave the empty batch out")
    if y is not None:
        _check_tokens("y", "n_y", y, place)
        if len(y) != len(x):
            raise InputError(f"y must have x's {len(x)} tokens, got {list(y.shape)}", fix="match y and x")
    if weights is not None:
        if not _plain(weights, place[0]) or weights.shape != x.shape[:1]:
            raise InputError(
                f"weights must be contiguous float32 [{len(x)}] on {place[1]}, got {_describe(weights)}",
                fix="convert them first",
            )
    if into is not None:
        if into.shift_x.device != place[0]:
            raise InputError(f"x must be on {into.shift_x.device} as before, got {_describe(x)}", fix="move it there")
        if x.shape[1] != len(into.shift_x):
            raise InputError(f"x must be [tokens, {len(into.shift_x)}] as before, got {list(x.shape)}", fix="match it")
        before = None if into.shift_y is None else len(into.shift_y)
        now = None if y is None else y.shape[1]
        if before != now:
            raise InputError(
                f"every batch must have the same n_y, got {now} after {before} (None: without y)",
                fix="start new moments for it",
            )


def _check_weights(weights: torch.Tensor | None) -> None:
    if weights is not None and (bad := ~((weights >= 0) & torch.isfinite(weights))).any():
        token = int(bad.nonzero()[0])
        raise InputError(
            f"weights must be finite and at least 0, got {weights[token]:g} at token {token}",
            fix="repair them",
        )


def _check_tokens(name: str, size: str, values: torch.Tensor, place: tuple[torch.device, str]) -> None:
    if not _plain(values, place[0]) or values.ndim != 2 or values.shape[1] < 1:
        raise InputError(
            f"{name} must be contiguous float32 [tokens, {size} >= 1] on {place[1]}, got {_describe(values)}",
            fix="convert it first",
        )


def _plain(value: object, device: torch.device) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.device == device
        and value.is_contiguous()
    )


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}{'' if value.is_contiguous() else ', strided'}"
