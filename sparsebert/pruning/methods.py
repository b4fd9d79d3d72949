"""The pruning methods without labels. Each is a function (model, calibration, config, run) -> None, which changes
the model's encoder linears in place. A new method is a function here and a line in LABEL_FREE.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsebert.config import PruneConfig
from sparsebert.encoders import encoder_linears
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.ops.obs_prune import obs_prune, obs_sweep
from sparsebert.ops.topk_mask import pattern_mask, topk_mask
from sparsebert.patterns import Pattern, Unstructured, kept_in, parse, sparsity_of
from sparsebert.pruning.calibration import Calibration
from sparsebert.pruning.knowledge import knowledge
from sparsebert.pruning.run import Run
from sparsebert.pruning.solve import Quadratic, set_affine
from sparsebert.pruning.stages import Stage


def _wanted(config: PruneConfig) -> tuple[Pattern, float]:
    pattern = parse(config.pattern)
    return pattern, sparsity_of(pattern, config.sparsity)


@torch.no_grad()
def magnitude(model, calibration: Calibration | None, config: PruneConfig, run: Run) -> None:
    """Removes the smallest |w| of each linear, or with scope "global" of all of them together. Looks at no data.
    [Han et al. 2015]
    """
    pattern, sparsity = _wanted(config)
    linears = encoder_linears(model)
    weights = [module.weight for module in linears.values()]
    if config.scope == "global":
        scores = torch.cat([weight.abs().flatten() for weight in weights])
        kept = topk_mask(scores, kept_in(pattern, 1, scores.numel(), sparsity)).split([w.numel() for w in weights])
        masks = [mask.view_as(weight) for mask, weight in zip(kept, weights, strict=True)]
        for name, mask in zip(linears, masks, strict=True):
            if not mask.any():
                raise InputError(f"sparsity {sparsity:g} leaves {name} no weight at all", fix="lower --sparsity")
    else:
        masks = [pattern_mask(weight.abs(), pattern, sparsity) for weight in weights]
    for done, (weight, mask) in enumerate(zip(weights, masks, strict=True), start=1):
        weight[~mask] = 0.0
        run.progress(done, len(weights))


@torch.no_grad()
def wanda(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """Removes the smallest |w_ij| ‖x̂_j‖₂ of each row, x̂ the inputs in the half-pruned model. The kept weights do not
    change. [Sun et al. 2024, eq. 1]
    """
    pattern, sparsity = _wanted(config)
    for stage in run.stages(model, calibration.batches):
        norm = second_moment(stage).diagonal().sqrt().float()
        for module in stage.linears.values():
            module.weight[~pattern_mask(module.weight.abs() * norm, pattern, sparsity, per_row=True)] = 0.0


@torch.no_grad()
def sparsegpt(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """Sweeps once over the columns of W. H comes from the half-pruned model and is damped by 0.01 of its mean diagonal.
    [Frantar & Alistarh 2023]
    """
    pattern, sparsity = _wanted(config)
    for stage in run.stages(model, calibration.batches):
        hessian = Quadratic(second_moment(stage), config.damping or 0.01)
        for module in stage.linears.values():
            module.weight.copy_(obs_sweep(module.weight.double(), hessian.h, pattern, sparsity))


@torch.no_grad()
def obs(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """ExactOBS: each linear is pruned alone, on the dense model's inputs, with W as the target. Its rows may get
    different numbers of zeros.

    [Frantar & Alistarh 2022.] Departure: damping by 1e-4 of the mean diagonal; the released code has none.
    """
    pattern, sparsity = _wanted(config)
    for stage in run.stages(model, calibration.batches, sparse_inputs=False):
        hessian = Quadratic(second_moment(stage), config.damping or 1e-4)
        for module in stage.linears.values():
            module.weight.copy_(obs_prune(module.weight.double(), hessian.h, pattern, sparsity, per_row=False))


@torch.no_grad()
def adaptive(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """Adaptive knowledge retention: exact OBS with the Hessian of the half-pruned model's inputs (Eq. 6). It starts
    from the weights that best reproduce the dense model's outputs on these inputs (Eq. 5), and removes the same share
    of each row. Pooler and classifier are refitted by Eq. 5.

    [Li et al. 2023, Algorithm 1.] Our departures: moments are taken over real tokens only; the bias follows from
    centring (b = mean_y - V mean_x), so that it is neither penalised by the ridge nor pruned. --as-published computes
    what their released code does instead.
    """
    if config.as_published:
        return _adaptive_as_published(model, calibration, config, run)
    pattern, sparsity = _wanted(config)
    for stage in run.stages(model, calibration.batches, heads=True):
        hessian = Quadratic(stage.moments.gram, config.damping or 1e-4)
        for name, module in stage.linears.items():
            weight = hessian.minimum(stage.cross(name))
            if not stage.head:
                weight = obs_prune(weight, hessian.h, pattern, sparsity)
            set_affine(module, weight, stage, name)


def _adaptive_as_published(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """Computes what run_layerwise.py of Li et al. computes, bugs included. Padding counts as tokens. The half-pruned
    model runs under the last batch's attention mask. The bias is the weight of an input of ones, under the ridge and
    prunable. The ridge of Eq. 5 stays in H, and each inverse adds another one. One weight too few is removed from each
    row. The head does not change. A solution whose mean square distance from W is 1 or more is computed again, with ten
    times the ridge.
    """
    pattern, sparsity = _wanted(config)
    if not isinstance(pattern, Unstructured):
        raise UnsupportedError(f"--as-published prunes unstructured only, got {pattern}", fix="leave it out")
    for stage in run.stages(model, calibration.padded_batches, padding=True):
        mean = stage.moments.mean_x
        one = torch.ones(1, dtype=torch.float64, device=mean.device)
        h = torch.block_diag(second_moment(stage), one)
        h[-1, :-1] = h[:-1, -1] = mean
        for name, module in stage.linears.items():
            mean_y = stage.mean_y(name)
            target = torch.cat([stage.cross(name) + torch.outer(mean_y, mean), mean_y[:, None]], 1)
            before = torch.cat([module.weight, module.bias[:, None]], 1).double()
            damped = h
            for ratio in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
                damped = Quadratic(damped, ratio).h
                weight = Quadratic(damped, 0.0).minimum(target)
                if (weight - before).square().mean() < 1:
                    break
            gone = Fraction(max(0, int(len(h) * sparsity) - 1), len(h))
            weight = obs_prune(weight, Quadratic(damped, 1e-4).h, pattern, gone)
            module.weight.copy_(weight[:, :-1])
            module.bias.copy_(weight[:, -1])


def second_moment(stage: Stage) -> torch.Tensor:
    """Mean of x̂ x̂ᵀ, not centred: float64 [n_in, n_in]."""
    return stage.moments.gram + torch.outer(stage.moments.mean_x, stage.moments.mean_x)


class LabelFree(NamedTuple):
    """One method without labels. prune: the function. flags: its fields of PruneConfig that not all methods have.
    looks_at_data: whether it needs calibration texts. solves: whether it solves least squares, for which a GPU needs
    the compiled CUDA kernels. per_row: whether each row, or group of rows, gets the same number of zeros.
    """

    prune: Callable[[nn.Module, Any, PruneConfig, Run], None]
    flags: frozenset[str] = frozenset()
    looks_at_data: bool = True
    solves: bool = False
    per_row: bool = False


LABEL_FREE = {
    "knowledge": LabelFree(knowledge, frozenset({"calibration", "int8", "tier", "without", "damping"}), solves=True),
    "adaptive": LabelFree(
        adaptive, frozenset({"calibration", "int8", "as_published", "damping"}), solves=True, per_row=True
    ),
    "obs": LabelFree(obs, frozenset({"calibration", "int8", "damping"}), solves=True),
    "sparsegpt": LabelFree(sparsegpt, frozenset({"calibration", "int8", "damping"})),
    "wanda": LabelFree(wanda, frozenset({"calibration", "int8"}), per_row=True),
    "magnitude": LabelFree(magnitude, frozenset({"scope"}), looks_at_data=False),
}
