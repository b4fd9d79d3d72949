"""gram: streaming second moments of a layer's inputs, and cross moments with what the layer should give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch


@dataclass(eq=False)
class Moments:
    """Running weighted sums over tokens of x [n_in] and, where there is one, y [n_y]; `gram` adds to them.

    Sums are float64 and taken about `shift_x`, `shift_y`, so that products of nearly constant values lose no digits;
    the properties are the centred results, float64.
    """

    tokens: int  # of weight above 0
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
    """Adds a batch of tokens to `into` and returns it; without `into`, starts anew about this batch's means.

    x: float32 [tokens, n_in], CPU, contiguous; tokens at least 1 for the first batch.
    y: float32 [tokens, n_y], or None where no cross moments are wanted; the same choice in every batch.
    weights: float32 [tokens], each at least 0, or None for 1 each.

    Products are float32, summed in float32 over at most 256 tokens and in float64 from there on. The result does not
    depend on `threads`. Raises InputError for a wrong type or shape, a negative weight, and for values that are not
    finite, naming the first such token and column; `into` is then as it was.
    """
    moments = _start(x, y, weights) if into is None else into
    _check(x, y, weights, moments)
    raise NotImplementedError


def gram_ref(
    x: torch.Tensor, y: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gram, cross) of one batch in float64, in two passes. [n_in, n_in], [n_y, n_in]."""
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    w = w / w.sum()
    x = x.double()
    x = x - w @ x
    if y is None:
        return (x * w[:, None]).T @ x, None
    y = y.double()
    y = y - w @ y
    return (x * w[:, None]).T @ x, (y * w[:, None]).T @ x
