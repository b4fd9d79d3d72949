"""Sparse least squares for one linear: min ‖Y - V X̂‖² + λ‖V - W‖² over V with zeros of a given pattern.

With H = G + λI and T = C + λW (G the Gram matrix of X̂, C its cross moments with Y) the minimum without zeros is W* = T
H⁻¹, and the objective is const + tr((V - W*) H (V - W*)ᵀ). So nothing is lost by solving without zeros first, and then
pruning W* under H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from sparsebert.errors import InputError
from sparsebert.heads import Problem
from sparsebert.pruning.stages import Stage

DEAD = 1e-10  # share of the largest variance, below which an input counts as constant
HEAD_RIDGE = 1e-4  # weight of the squared distance from the least squares solution, beside a KL in nats


@dataclass(frozen=True, eq=False)
class Quadratic:
    """H = gram + λI with λ = damping times the mean diagonal of gram, [n_in, n_in] float64.

    An input that never varied is a dead column: its weights have no effect under H, so they are pruned first, or do not
    change. If no input varied, because everything before is pruned away, H is damping times I: the smallest weights are
    pruned, and the function stays the same as long as the bias takes up the mean of their contribution. Raises
    InputError when H is factored and is not positive definite; it names the pivot and the damping.
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
        return self.gram + torch.diag(torch.full_like(self.gram.diagonal(), self.ridge))

    @cached_property
    def dead(self) -> torch.Tensor:
        """The inputs that never varied, except for rounding: bool [n_in]."""
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
    """Sets V and its best bias, mean_y - V mean_x, which is neither under the ridge nor pruned."""
    module.weight.copy_(weight)
    if module.bias is not None:
        module.bias.copy_(stage.mean_y(name) - weight @ stage.moments.mean_x)


def match_logits(module: nn.Linear, x: torch.Tensor, logits: torch.Tensor, problem: Problem) -> None:
    """Fits the classifier's weight and bias, from their present values, for the least mean divergence of V x + b from
    `logits`. This is a convex problem for every problem type. Least squares on logits would leave a pruned model as
    sure as the dense one even when it is wrong.

    x: [texts, n_in]; logits: [texts, labels], of the dense model. HEAD_RIDGE times the squared distance from the start
    is added to the divergence. It runs on the CPU: a small problem, in many steps that each decide the next.
    """
    x, logits = x.double().cpu(), logits.double().cpu()
    start = torch.cat([module.weight, module.bias[:, None]], 1).double().cpu()
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
