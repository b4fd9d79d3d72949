"""The allotment: how much of the budget each linear gets, by the damage that its zeros do to the model's output."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.ops.admm_prune import admm_path
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.patterns import Pattern, zeros_in
from sparsebert.pruning.calibration import Batches
from sparsebert.pruning.cluster import row_groups
from sparsebert.pruning.scores import gradient_pass
from sparsebert.pruning.solve import Quadratic
from sparsebert.pruning.stages import stages

# Sparsities tried for every linear. The highest is a cap: beyond it a linear's error no longer predicts the model's.
LEVELS = (0.15, 0.4, 0.6, 0.75, 0.83, 0.89, 0.93, 0.96, 0.985)

Changes = dict[str, torch.Tensor]  # V - W of every linear at each level, bfloat16 [levels, n_out, n_in]


@torch.no_grad()
def one_by_one(
    model, batches: Batches, pattern: Pattern, damping: float, clustered: float | None, progress: Progress
) -> Changes:
    """The change V - W of every linear at every level, each pruned alone, on the dense model's inputs.

    clustered: the sparsity at which rows are clustered into groups, for a grouped pattern; None: groups of consecutive
    rows.
    """
    changes: Changes = {}
    total = len(encoder_linears(model))
    for stage in stages(model, batches, sparse_inputs=False):
        q = Quadratic(stage.moments.gram, damping)
        for name, module in stage.linears.items():
            weight = module.weight.double()
            if clustered is None:
                order = torch.arange(len(weight), device=weight.device)
            else:
                order = row_groups(weight, q.h, pattern, clustered)
            weight = weight[order]
            target = weight @ q.h
            changes[name] = torch.empty(len(LEVELS), *weight.shape, dtype=torch.bfloat16, device=weight.device)
            # A sweep is quicker, but keeps equally many weights in every block of columns, so it predicts the damage of
            # the final pruning less well.
            for change, mask in zip(changes[name], admm_path(weight, q.h, pattern, LEVELS), strict=True):
                change[order] = (masked_lstsq(target, q.h, mask) - weight).bfloat16()
            progress(len(changes), total)
    return changes


def damage(
    model, batches: Batches, changes: Changes, seed: int, progress: Progress = no_progress
) -> dict[str, np.ndarray]:
    """The damage that each linear does to the output at each level, float64 [levels] per linear. To second order it is
    half the mean over texts of (sum over tokens of g·(V - W)x)². That is the divergence KL(dense ‖ pruned) that the
    linear would cause alone if all labels were equally likely.

    The mean of (V - W)x over a batch's tokens is subtracted, because the bias takes it up after pruning.
    """
    sums = {name: torch.zeros(len(LEVELS), dtype=torch.float64, device=model.device) for name in changes}

    def see(name, x, gradient):
        for level, change in enumerate(changes[name]):
            moved = torch.nn.functional.linear(x, change.float())
            moved -= moved.mean((0, 1))
            sums[name][level] += (moved * gradient).sum((1, 2)).double().square().sum()

    gradient_pass(model, batches, see, seed, progress)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    return {name: (total / (2 * texts)).cpu().numpy() for name, total in sums.items()}


def allocate(damage: dict[str, np.ndarray], sizes: dict[str, int], sparsity: float) -> dict[str, Fraction]:
    """Sparsity of each linear, so that exactly floor(sparsity * all weights) are removed, at the least total damage.

    Between levels the logarithm of the damage is interpolated linearly in the logarithm of the density. Each linear
    gets the sparsity at which one more kept weight would save the same damage in all linears. This common price is
    found by bisection. If `sparsity` is below the lowest level, all linears get the same sparsity.
    """
    total = zeros_in(sum(sizes.values()), sparsity)
    grid = np.linspace(LEVELS[0], LEVELS[-1], 400)
    curves = {}
    for name, values in damage.items():
        # Less damage at a higher level is noise.
        rising = np.maximum.accumulate(np.maximum(values, 1e-12))
        known = np.log(1 - np.array(LEVELS))[::-1]
        curves[name] = np.exp(np.interp(np.log(1 - grid), known, np.log(rising)[::-1]))

    def zeros_at(price: float) -> dict[str, float]:
        chosen = {}
        for name, curve in curves.items():
            chosen[name] = sizes[name] * grid[np.argmin(curve - price * sizes[name] * grid)]
        return chosen

    low, high = -40.0, 10.0  # bounds of the logarithm of the price
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(zeros_at(math.exp(middle)).values()) < total else (low, middle)
    zeros = {name: math.floor(count) for name, count in zeros_at(math.exp(high)).items()}
    return _exactly(zeros, sizes, total)


def _exactly(zeros: dict[str, int], sizes: dict[str, int], total: int) -> dict[str, Fraction]:
    """Sparsities with exactly `total` zeros: the kept weights of all linears are scaled by one factor."""
    kept = {name: sizes[name] - count for name, count in zeros.items()}
    wanted = sum(sizes.values()) - total
    scale = Fraction(wanted, sum(kept.values()))
    kept = {name: min(sizes[name], math.floor(count * scale)) for name, count in kept.items()}
    for name in sorted(kept, key=sizes.get, reverse=True):  # the remainder of rounding goes to the largest
        more = min(wanted - sum(kept.values()), sizes[name] - kept[name])
        kept[name] += more
    return {name: 1 - Fraction(count, sizes[name]) for name, count in kept.items()}
