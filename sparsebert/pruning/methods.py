"""The pruning methods. One function each, (model, calibration, config, progress) -> None, changing the model's encoder
linears in place.

A new method is a function here and a line in METHODS.
"""

from __future__ import annotations

import torch

from sparsebert.config import PruneConfig
from sparsebert.encoders import Progress, encoder_linears
from sparsebert.patterns import zeros_in
from sparsebert.pruning.calibrate import stages
from sparsebert.pruning.solve import cholesky, column_sweep, damped, lowest

Batches = list[dict[str, torch.Tensor]]


@torch.no_grad()
def magnitude(model, calibration: Batches, config: PruneConfig, progress: Progress) -> None:
    """Removes the smallest |w| of each linear. Looks at no data. [Han et al. 2015]"""
    linears = encoder_linears(model)
    for done, module in enumerate(linears.values(), start=1):
        module.weight[lowest(module.weight.abs(), zeros_in(module.weight.numel(), config.sparsity))] = 0.0
        progress(done, len(linears))


@torch.no_grad()
def adaptive(model, calibration: Batches, config: PruneConfig, progress: Progress) -> None:
    """Layer-wise reconstruction whose inputs come from the already sparse predecessors and whose targets are the dense
    model's outputs.

    [Li et al. 2023, Algorithm 1 and Eq. 5-6], with a column sweep in the place of exact row-wise OBS, the ridge centred
    at W instead of 0, moments over real tokens only, and the bias solved by centring (b = mean_y - V mean_x), so that
    it is neither penalised nor pruned.
    """
    total, done = len(encoder_linears(model)), 0
    for linears, moments in stages(model, calibration):
        h, ridge = damped(moments.gram, config.damping)
        inverse = torch.cholesky_inverse(cholesky(h, config.damping))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for name, module in linears.items():
            best_dense = (moments.cross[name] + ridge * module.weight.double()) @ inverse
            module.weight.copy_(column_sweep(best_dense, factor, config.sparsity))
            if module.bias is not None:
                module.bias.copy_(moments.mean_y[name] - module.weight.double() @ moments.mean_x)
            done += 1
            progress(done, total)


METHODS = {"adaptive": adaptive, "magnitude": magnitude}
