"""The pruning methods. One function each, (model, calibration, config, progress) -> None, changing the model's encoder
linears in place. A new method is a function here and a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sparsebert.config import PruneConfig
from sparsebert.encoders import Progress, encoder_linears
from sparsebert.errors import InputError
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

    [Li et al. 2023, Algorithm 1 and Eq. 5-6]. Departures: a column sweep in the place of exact row-wise OBS, its budget
    per block of 128 columns over all rows (paper: per row); the ridge is `damping` (1e-2) of the mean diagonal and
    centred at W (paper: 1e-4, centred at 0); moments over real tokens only; the bias is solved by centring
    (b = mean_y - V mean_x), so that it is neither penalised nor pruned; pooler and classifier are left as they are
    (paper: refitted).
    """
    linears = encoder_linears(model)
    _require_tokens(calibration, max(module.in_features for module in linears.values()))
    total, done = len(linears), 0
    for stage, moments in stages(model, calibration):
        h, ridge = damped(moments.gram, config.damping)
        inverse = torch.cholesky_inverse(cholesky(h, config.damping))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for name, module in stage.items():
            best_dense = (moments.cross[name] + ridge * module.weight.double()) @ inverse
            module.weight.copy_(column_sweep(best_dense, factor, config.sparsity))
            if module.bias is not None:
                module.bias.copy_(moments.mean_y[name] - module.weight.double() @ moments.mean_x)
            done += 1
            progress(done, total)


def _require_tokens(calibration: Batches, n_in: int) -> None:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calibration)
    if tokens < n_in:
        raise InputError(
            f"calibration must have at least as many tokens as the widest linear has inputs, {n_in}, got {tokens}",
            fix="raise --calibration",
        )


class Method(NamedTuple):
    """prune: the function. looks_at_data: whether it needs calibration batches."""

    prune: Callable[[Any, Batches, PruneConfig, Progress], None]
    looks_at_data: bool


METHODS = {"adaptive": Method(adaptive, looks_at_data=True), "magnitude": Method(magnitude, looks_at_data=False)}
