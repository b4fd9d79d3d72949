"""Losses: the plain one, debiased ones, which learn less from what a bias model already predicts, and distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from sparsebert.heads import SINGLE_LABEL, Problem

TAUGHT = 0.9  # weight of the teacher's distribution beside the label


@dataclass(frozen=True)
class Targets:
    """The targets of examples. labels: as in `data.Examples`. bias: log p_b of the bias model, float32 [n, labels].
    teacher: log p_t of the teacher, float32 [n, labels]. Either is None if the loss does not need it. problem: the
    problem type.
    """

    labels: torch.Tensor
    bias: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    problem: Problem = SINGLE_LABEL

    def __getitem__(self, rows) -> Targets:
        """The targets of some rows."""
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device) -> Targets:
        """The targets on another device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        parts = {name: getattr(self, name) for name in ("labels", "bias", "teacher")}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


# (logits float32 [n, labels], targets) -> the batch's loss, a scalar.
Criterion = Callable[[torch.Tensor, Targets], torch.Tensor]


def ce(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The plain loss of the problem type: for one label per text, the mean of -log p_m[y]."""
    return targets.problem.loss(logits, targets.labels)


def poe(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Product of experts: mean of -log softmax(log p_m + log p_b)[y]. The bias model is not trained; inference uses
    p_m alone. [Clark et al. 2019; Liu et al. 2022, Eq. 6]
    """
    return cross_entropy(log_softmax(logits, dim=1) + targets.bias, targets.labels)


def reweight(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Mean of -(1 - β) log p_m[y], β = p_b[y]. [Liu et al. 2022, Eq. 7]"""
    weights, losses = _weighted(logits, targets)
    return (weights * losses).mean()


def reweight_normalized(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """`reweight` divided by the batch's mean weight, as in the authors' code."""
    weights, losses = _weighted(logits, targets)
    return (weights * losses).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def confreg(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Confidence regularisation: mean of -S · log p_m, S_j = p_t,j^(1-β) / Σ_k p_t,k^(1-β), β = p_b[y]. S is
    the teacher's distribution; the surer the bias model is of the label, the flatter S is. [Utama et al. 2020; Liu et
    al. 2022, Eq. 8]
    """
    scaled = (1 - _bias_of_label(targets))[:, None] * targets.teacher
    return -(scaled.softmax(dim=1) * log_softmax(logits, dim=1)).sum(1).mean()


def distill(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """(1 - λ) cross-entropy + λ KL(teacher ‖ model), λ = 0.9, means over the batch. [Du et al. 2023, eq. 3]"""
    apart = kl_div(log_softmax(logits, dim=1), targets.teacher, reduction="batchmean", log_target=True)
    return (1 - TAUGHT) * cross_entropy(logits, targets.labels) + TAUGHT * apart


def smoothed(teacher: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
    """log of p_t^d / Σ p_t^d: the teacher's distribution, flatter for easy examples. teacher: log p_t, float32 [n,
    labels]; difficulty: d, float32 [n]. [Du et al. 2023, eq. 2]
    """
    return (difficulty[:, None] * teacher).log_softmax(1)


def difficulty(losses: torch.Tensor, least: float) -> torch.Tensor:
    """d = α + (1 - α) (v - min v) / (max v - min v), v the variance of an example's losses in models of several
    sparsities; all 1 if the variances are equal. losses: float32 [models, n]; least: α, in [0, 1]. [Du et al. 2023,
    eq. 1]
    """
    variance = losses.var(0, correction=0)
    low, high = variance.aminmax()
    if not high > low:
        return torch.ones_like(variance)
    return least + (1 - least) * (variance - low) / (high - low)


def _weighted(logits: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 - _bias_of_label(targets), cross_entropy(logits, targets.labels, reduction="none")


def _bias_of_label(targets: Targets) -> torch.Tensor:
    return targets.bias.gather(1, targets.labels[:, None])[:, 0].exp()


class Loss(NamedTuple):
    """A criterion, and which models' predictions it needs. difficulty: that the teacher's are `smoothed` by the
    `difficulty` of the examples.
    """

    criterion: Criterion
    bias: bool = False
    teacher: bool = False
    difficulty: bool = False


LOSSES = {
    "ce": Loss(ce),
    "poe": Loss(poe, bias=True),
    "reweight": Loss(reweight_normalized, bias=True),
    "reweight-mean": Loss(reweight, bias=True),
    "confreg": Loss(confreg, bias=True, teacher=True),
    "distill": Loss(distill, teacher=True),
    "rmc": Loss(distill, teacher=True, difficulty=True),
}
