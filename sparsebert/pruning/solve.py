"""Sparse least squares for one linear: min ‖Y - V X̂‖² + λ‖V - W‖² over V with zeros of a given pattern.

With H = G + λI and T = C + λW (G the Gram matrix of X̂, C its cross moments with Y) the minimum without zeros is W* = T
H⁻¹, and the objective is const + tr((V - W*) H (V - W*)ᵀ): to re-solve densely and then to prune W* under H loses
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from sparsebert.errors import InputError
from sparsebert.pruning.calibrate import Stage


@dataclass(frozen=True, eq=False)
class Quadratic:
    """H = gram + λI with λ = damping times the mean diagonal of gram, [n_in, n_in] float64.

    Raises InputError for a gram without any variance, and, when it is factored, for one that damping does not make
    positive definite, naming the pivot and the damping tried. An input that never varied (a dead column) needs no rule
    of its own: its weight is worth nothing under H and is the first to go, or stays as it is.
    """

    gram: torch.Tensor
    damping: float

    @cached_property
    def ridge(self) -> float:
        """λ."""
        mean = self.gram.diagonal().mean().item()
        if not mean > 0:
            raise InputError(
                f"moments must have some variance, the mean diagonal of the Gram matrix is {mean:g}",
                fix="give calibration texts that differ",
            )
        return self.damping * mean

    @cached_property
    def h(self) -> torch.Tensor:
        """H."""
        return self.gram + self.ridge * torch.eye(len(self.gram), dtype=self.gram.dtype)

    @cached_property
    def factor(self) -> torch.Tensor:
        """Lower Cholesky factor of H."""
        factor, info = torch.linalg.cholesky_ex(self.h)
        if info.item() > 0:
            raise InputError(
                f"Hessian must be positive definite, pivot {info.item()} of {len(self.h)} is not, with damping "
                f"{self.damping:g}",
                fix="raise --damping or --calibration-tokens",
            )
        return factor

    def minimum(self, target: torch.Tensor) -> torch.Tensor:
        """W* = T H⁻¹, float64 [n_out, n_in]."""
        return torch.cholesky_solve(target.T, self.factor).T.contiguous()


def set_affine(module: nn.Linear, weight: torch.Tensor, stage: Stage, name: str) -> None:
    """Sets V and the bias that is best with it, mean_y - V mean_x: neither under the ridge nor pruned."""
    module.weight.copy_(weight)
    if module.bias is not None:
        module.bias.copy_(stage.mean_y(name) - weight @ stage.moments.mean_x)
