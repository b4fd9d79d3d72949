"""Iterative magnitude pruning, with and without rewinding. [Liu et al. 2022, Alg. 1; Frankle & Carbin 2019]"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from sparsebert.encoders import encoder_linears, head_linears
from sparsebert.ops.topk_mask import pattern_mask
from sparsebert.patterns import NofM, Pattern, Unstructured, require_fits
from sparsebert.training.loop import Hook, rise_and_fall

LEVEL = 0.1  # max share of the weights that is pruned at once
MOST_PRUNED = 0.85  # of the models whose losses are compared
NOTED = (2, 4, 6, 8, 9)  # of its nine levels, those at which losses are noted


class MagnitudePruning(Hook):
    """Removes the smallest |w| of each linear in equal portions of at most a tenth of its weights: the first before
    training begins, the others evenly over the run. Removed weights stay zero.

    rewind_to: parameters by name; at every pruning all weights return to them. The run then ends with a pruning, with
    no training after it, and each stretch between prunings has a new learning-rate schedule and a new optimizer state.
    Without rewind_to, one schedule spans the run, which ends with training. (The authors' code restarts the whole run's
    schedule at each pruning, so that no level is ever annealed.) head: also prune the pooler, unstructured; the
    classifier stays dense. N:M: all zeros are made at once, because the pattern has one sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        sparsity: float,
        *,
        rewind_to: dict[str, torch.Tensor] | None = None,
        head: bool = True,
        warmup: float = 0.1,
    ):
        self.model, self.sparsity, self.rewind_to, self.warmup = model, sparsity, rewind_to, warmup
        self.levels = 1 if isinstance(pattern, NofM) else max(1, math.ceil(sparsity / LEVEL - 1e-9))
        self.level = 0
        linears = {name: (module, pattern) for name, module in encoder_linears(model).items()}
        if head:
            heads = head_linears(model, classifier=False)
            linears |= {name: (module, Unstructured()) for name, module in heads.items()}
        for name, (module, kind) in linears.items():
            require_fits(kind, *module.weight.shape, sparsity, name)
        self.linears = linears
        self.keep = {name: torch.ones_like(module.weight, dtype=torch.bool) for name, (module, _) in linears.items()}

    @property
    def choose_from(self) -> float:
        """1 until the last portion is pruned: no weights with fewer zeros may be chosen as the best."""
        return 0.0 if self.level == self.levels else 1.0

    def before(self, step: int, total: int) -> bool:
        due = sum(step >= start for start in self._starts(total))
        if due <= self.level:
            return False
        self.level = due
        self._prune(self.sparsity * self.level / self.levels)
        return self.rewind_to is not None

    @torch.no_grad()
    def after(self) -> None:
        for name, (module, _) in self.linears.items():
            module.weight.mul_(self.keep[name])

    def share_of_lr(self, step: int, total: int) -> float | None:
        if self.rewind_to is None:
            return None
        starts = [0, *self._starts(total)]
        begin, end = max(start for start in starts if start <= step), min(start for start in starts if start > step)
        return rise_and_fall(step - begin, end - begin, self.warmup)

    def state(self) -> dict[str, torch.Tensor]:
        return {"level": torch.tensor(self.level), **self.keep}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.level = int(state["level"])
        self.keep = {name: state[name].to(keep.device) for name, keep in self.keep.items()}

    def _starts(self, total: int) -> list[int]:
        """For each level, the step before which the weights are pruned to it."""
        if self.rewind_to is not None:
            return [total] if self.levels == 1 else [round(i * total / (self.levels - 1)) for i in range(self.levels)]
        return [round(level * total / self.levels) for level in range(self.levels)]

    @torch.no_grad()
    def _prune(self, sparsity: float) -> None:
        for name, (module, kind) in self.linears.items():
            # Weights already pruned are 0, so they are pruned first the next time, and the portions nest.
            self.keep[name] = pattern_mask(module.weight.abs(), kind, sparsity)
        if self.rewind_to is not None:
            for name, parameter in self.model.named_parameters():
                if name in self.rewind_to:
                    parameter.copy_(self.rewind_to[name])
        self.after()


class LossesWhilePruned(MagnitudePruning):
    """Magnitude pruning to 85 % zeros that notes the losses of all examples at five sparsities, 19 to 85 %: `losses`,
    float32 [n] by level, from `measure`, at the end of the training at each. [Du et al. 2023, §5.1: five, of 20 to 85
    %]
    """

    def __init__(self, model: nn.Module, measure: Callable[[], torch.Tensor], *, warmup: float):
        super().__init__(model, Unstructured(), MOST_PRUNED, head=False, warmup=warmup)
        self.measure, self.losses = measure, {}

    def before(self, step: int, total: int) -> bool:
        next_at = [*self._starts(total)[self.level :], total][0]
        if step >= next_at and self.level in NOTED and self.level not in self.losses:
            self.losses[self.level] = self.measure()
        return super().before(step, total)

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **{f"losses.{level}": losses for level, losses in self.losses.items()}}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        super().restore(state)
        self.losses = {level: state[f"losses.{level}"] for level in NOTED if f"losses.{level}" in state}


class FixedZeros(Hook):
    """Keeps the zeros that the encoder's linears have when the hook is made."""

    def __init__(self, model: nn.Module):
        self.keep = {module: module.weight != 0 for module in encoder_linears(model).values()}

    @torch.no_grad()
    def after(self) -> None:
        for module, keep in self.keep.items():
            module.weight.mul_(keep)
