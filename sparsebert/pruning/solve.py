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
from sparsebert.heads import Problem
from sparsebert.pruning.stages import Stage

DEAD = 1e-10  # of the largest variance
HEAD_RIDGE = 1e-4  # on the squared distance from the least squares solution, beside a KL in nats


@dataclass(frozen=True, eq=False)
class Quadratic:
    """H = gram + λI with λ = damping times the mean diagonal of gram, [n_in, n_in] float64.

    The weight of an input that never varied (a dead column) is worth nothing under H: it is the first to go, or stays
    as it is. Where none varied, because what comes before is pruned away, H is damping times I: the smallest weights
    go, and as long as the bias takes up the mean of what they gave, the function is the same. Raises InputError, when H
    is factored, for one that is not positive definite, naming the pivot and the damping tried.
    """

    gram: torch.Tensor
    damping: float

    @cached_property
    def ridge(self) -> float:
        """λ."""
        return self.damping * (self.gram.diagonal().mean().item() or 1.0)

    @cached_property
    def h(self) -> torch.Tensor:
        """H."""
        return self.gram + self.ridge * torch.eye(len(self.gram), dtype=self.gram.dtype)

    @cached_property
    def dead(self) -> torch.Tensor:
        """bool [n_in]: inputs that never varied, but for rounding."""
        variances = self.gram.diagonal()
        return variances < DEAD * variances.max()

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


def match_logits(module: nn.Linear, x: torch.Tensor, logits: torch.Tensor, problem: Problem) -> None:
    """Sets the classifier's weight and bias, from where they are, to those of the least mean divergence of V x + b from
    `logits`, a convex problem for every problem type; least squares on logits would leave a pruned model as sure as
    the dense one where it is wrong.

    x: [texts, n_in]; logits: [texts, labels], the dense model's. HEAD_RIDGE times the squared distance from the start
    is added.
    """
    x, logits = x.double(), logits.double()
    start = torch.cat([module.weight, module.bias[:, None]], 1).double()
    affine = start.clone().requires_grad_()
    spread = problem.spread(logits)
    optimizer = torch.optim.LBFGS([affine], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = problem.divergence(logits, nn.functional.linear(x, affine[:, :-1], affine[:, -1]), spread).mean()
        value = value + HEAD_RIDGE * (affine - start).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        module.weight.copy_(affine[:, :-1])
        module.bias.copy_(affine[:, -1])
