"""gram on a GPU: the sums of one batch of tokens, by cuBLAS through torch."""

from __future__ import annotations

import torch

from sparsebert.kernels import require_full_float32

STEP = 256  # tokens that are summed in float32, as on the CPU
AT_ONCE = 1 << 26  # max float32 sums that wait to be added up in float64, 256 MB


def means(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The weighted means over tokens, float32 [n], of float32 [tokens, n]; the plain ones if all weights are 0."""
    if weights is None:
        return values.mean(0, dtype=torch.float64).float()
    weights = torch.where(weights.any(), weights, 1.0)
    return ((values * weights[:, None]).sum(0, dtype=torch.float64) / weights.sum(dtype=torch.float64)).float()


class Batch:
    """The sums of one batch for `sparsebert.ops.gram.Moments`, by the arguments and rules of `gram` there: products in
    float32, summed in float32 over at most 256 tokens, and these sums in float64. shift_*: what is subtracted from x
    and y. Raises UnsupportedError if torch may round a product's factors to TF32.
    """

    def __init__(
        self,
        x: torch.Tensor,
        shift_x: torch.Tensor,
        y: torch.Tensor | None = None,
        shift_y: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ):
        require_full_float32("gram")
        self._tokens, self._weights = len(x), weights
        self._x = x - shift_x
        self._weighted = self._x if weights is None else self._x * weights[:, None]
        self._y = None if y is None else y - shift_y
        weighted_y = self._y if y is None or weights is None else self._y * weights[:, None]
        self._sums = [part.sum(0, dtype=torch.float64) for part in (self._weighted, weighted_y) if part is not None]

    def facts(self) -> tuple[bool, bool, int, float]:
        """(whether all weights are finite and at least 0, whether the sums of w x and w y are finite, number of tokens
        with a weight above 0, sum of the weights). The host waits for the GPU once.
        """
        finite = torch.stack([part.isfinite().all() for part in self._sums]).all()  # not so if a value is not
        w = self._weights
        if w is None:
            return True, bool(finite), self._tokens, float(self._tokens)
        right = ((w >= 0) & w.isfinite()).all()
        found = torch.stack([right.double(), finite.double(), (w > 0).sum().double(), w.sum(dtype=torch.float64)])
        right, finite, tokens, weight = found.tolist()
        return bool(right), bool(finite), int(tokens), weight

    def add_to(
        self,
        sum_x: torch.Tensor,
        sum_xx: torch.Tensor,
        sum_y: torch.Tensor | None = None,
        sum_yx: torch.Tensor | None = None,
    ) -> None:
        """Adds the batch's sums to these, float64, in place."""
        for total, part in zip((sum_x, sum_y), self._sums, strict=False):
            total += part
        _add_products(sum_xx, self._x, self._weighted)
        if self._y is not None:
            _add_products(sum_yx, self._y, self._weighted)


def _add_products(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds aᵀ b to total, float64 [n_a, n_b]. a, b: float32 [tokens, n]."""
    tokens, most = len(a), max(1, AT_ONCE // total.numel()) * STEP
    for start in range(0, tokens, most):
        # Zeros fill up the last step.
        parts = [_filled(values[start : start + most]).view(-1, STEP, values.shape[1]) for values in (a, b)]
        total += torch.bmm(parts[0].transpose(1, 2), parts[1]).sum(0, dtype=torch.float64)


def _filled(values: torch.Tensor) -> torch.Tensor:
    lacking = -len(values) % STEP
    return torch.nn.functional.pad(values, (0, 0, 0, lacking)) if lacking else values
