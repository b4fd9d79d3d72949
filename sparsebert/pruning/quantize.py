"""Rounds a classifier to int8, after its zeros are found: the weights of the encoder's linears, and their inputs.

A stage is rounded under what the stages before it have become. Its inputs get a byte's step and zero per column, chosen
on a sample of tokens for the least error of the outputs. The weights are then rounded one column after another; what
each rounding changes in the outputs is taken up by the weights that follow. Zeros stay zeros.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.errors import InputError
from sparsebert.ops.sparse_matmul import Quantized
from sparsebert.pruning.calibration import Batches
from sparsebert.pruning.solve import Quadratic, set_affine
from sparsebert.pruning.stages import Stage, stages

SAMPLE = 4096  # tokens on which the steps of the inputs are chosen
DAMPING = 1e-4  # of the mean diagonal, as for the method `adaptive`
LEAST_STEP = 1e-30  # its reciprocal and the products with weights are finite
MOST = 127  # largest weight; -128 is not used, so that the grid is symmetric
# The range of a column is between its own and the widest column's, widest^(1 - share) own^share. With its own range an
# input is rounded least, and the weights of wide columns become large beside the others.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALE_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
SWEEPS = 3  # over the columns
BLOCK = 64  # columns between which the gradient of all later columns is brought up to date


@torch.no_grad()
def quantize(model, batches: Batches, progress: Progress = no_progress) -> dict[str, np.ndarray]:
    """Rounds the encoder's linears of a stock `transformers` classifier to int8 grids, in place, and fits their biases.

    batches: calibration texts. Returns the scales: "<linear>.scale" float32 [n_out], "<linear>.step" float32 [n_in] and
    "<linear>.zero" uint8 [n_in], as in `ops.sparse_matmul.Quantized`; linears of one stage share steps and zeros. The
    weights become exactly `Quantized.weight`.
    """
    grids: dict[nn.Linear, Quantized] = {}
    scales: dict[str, np.ndarray] = {}
    total = len(encoder_linears(model))
    for stage in stages(model, batches, sample=SAMPLE, rounded=lambda module, x: _rounded(grids.get(module), x)):
        step, zero = input_grid(stage)
        # Rounding an input adds noise of step^2 / 12 to its variance.
        q = Quadratic(stage.moments.gram + torch.diag(step.double().square() / 12), DAMPING)
        for name, module in stage.linears.items():
            target = stage.cross(name) + q.ridge * module.weight.double()
            grid = weight_grid(module.weight.double(), target, q.h, step, zero)
            grids[module] = grid
            set_affine(module, torch.from_numpy(grid.weight).double(), stage, name)
            scales |= {f"{name}.{part}": getattr(grid, part) for part in ("scale", "step", "zero")}
        progress(len(grids), total)
    return scales


def input_grid(stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Step (float32) and zero (uint8) of each input of a stage, [n_in] both.

    The error that is kept small is that of the outputs: of the inputs' rounding, measured on the sample, and of the
    weights' rounding, s^2 / 12 for each kept weight with row scale s. Both count as independent. An input that never
    moves gets the step of the widest one. What goes beyond the sample's range is clipped.
    """
    x = stage.sample
    if not len(x):
        raise InputError("calibration texts have no tokens", fix="give more texts")
    low, high = x.amin(0).clamp(max=0.0), x.amax(0).clamp(min=0.0)
    width = high - low
    widest = width.max()
    if not widest > 0:  # every input is zero: any grid is right
        return torch.ones_like(width), torch.full_like(width, 128, dtype=torch.uint8)
    own = torch.where(width > 0, width, widest)
    weights = [module.weight for module in stage.linears.values()]
    square = sum(weight.square().sum(0) for weight in weights)  # effect of an input's error
    variance = x.var(0, correction=0)  # means go into the biases
    best = None
    zero = torch.where(width > 0, (-low / own * 255).round(), 128.0)
    for share in SHARES:
        step = (widest ** (1 - share) * own**share / 255).clamp(min=LEAST_STEP)
        error = (_bytes_as_floats(x, step, zero) - x).var(0, correction=0) @ square
        for weight in weights:
            scale = (weight.abs() * step).amax(1) / MOST
            error = error + (scale.square() / 12) @ ((weight != 0).float() @ (variance / step.square()))
        if best is None or error < best[0]:
            best = error, step
    return best[1], zero.to(torch.uint8)


def weight_grid(
    weight: torch.Tensor, target: torch.Tensor, h: torch.Tensor, step: torch.Tensor, zero: torch.Tensor
) -> Quantized:
    """The weight on an int8 grid, near the minimum of tr(V H Vᵀ) - 2 tr(V Tᵀ) over V with the zeros of `weight`.

    weight, target [n_out, n_in] and h [n_in, n_in] float64. Row scales are the clipped maxima with the least rounding
    error under diag(H). Columns are then rounded in turn, each to the grid point that is best for what the others are
    now, a few times over. At last the scales are fitted to the rounded weights.
    """
    support, step = weight != 0, step.double()
    scaled = weight * step  # of inputs in units of a byte
    largest = scaled.abs().amax(1)
    diagonal = h.diagonal() / step.square()
    scale, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for clip in SCALE_CLIPS:
        tried = torch.where(largest > 0, largest * clip / MOST, 1.0)
        error = (_on_grid(scaled, tried[:, None]) * tried[:, None] - scaled).square() @ diagonal
        scale = torch.where(error < least, tried, scale).clamp(min=LEAST_STEP)
        least = torch.minimum(least, error)
    unit = scale[:, None] / step  # of the weight
    integers = _swept(weight.T.contiguous(), target.T, h, unit.T.contiguous(), support.T).T
    fitted = integers / step
    power = ((fitted @ h) * fitted).sum(1)
    factor = torch.where(power > 0, (fitted * target).sum(1) / torch.where(power > 0, power, 1.0), scale)
    # A row whose outputs cannot be fitted keeps its scale.
    scale = torch.where((factor > scale / 2) & (factor < scale * 2), factor, scale)
    integers = integers.to(torch.int8).contiguous()
    return Quantized(integers.numpy(), scale.float().numpy(), step.float().numpy(), zero.numpy())


def _swept(
    values: torch.Tensor, target: torch.Tensor, h: torch.Tensor, unit: torch.Tensor, support: torch.Tensor
) -> torch.Tensor:
    """The rounded weights in units, after SWEEPS over the columns. All is transposed, [n_in, n_out]."""
    diagonal = h.diagonal()
    for _ in range(SWEEPS):
        gradient = h @ values - target
        for first in range(0, len(values), BLOCK):
            block = slice(first, first + BLOCK)
            before, own = values[block].clone(), gradient[block]
            for k in range(len(before)):
                at = first + k
                rounded = _on_grid(values[at] - own[k] / diagonal[at], unit[at]) * unit[at] * support[at]
                own[k + 1 :].addr_(h[at, at + 1 : first + len(before)], rounded - values[at])
                values[at] = rounded
            # What the block has changed in the columns that follow.
            gradient[first + BLOCK :] += h[first + BLOCK :, block] @ (values[block] - before)
    return (values / unit).round()


def _on_grid(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (values / unit).round().clamp(-MOST, MOST)


def _bytes_as_floats(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((x / step + zero).round().clamp(0, 255) - zero) * step


def _rounded(grid: Quantized | None, x: torch.Tensor) -> torch.Tensor:
    """The input as the linear with this grid sees it."""
    if grid is None:
        return x
    return _bytes_as_floats(x, torch.tensor(grid.step), torch.tensor(grid.zero).float())
