"""Weights: of the calibration tokens in the moments of a linear, and of the errors of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from sparsebert.encoders import Progress, autocast, encoder_layers, encoder_linears, frozen, moved, no_progress
from sparsebert.heads import problem_of
from sparsebert.pruning.calibration import Batches
from sparsebert.pruning.stages import TokenWeights

FLOOR = 0.1  # share of the identity in a metric: keeps the full rank, and the function on texts unlike these


def cls_weights(model, batches: Batches) -> TokenWeights:
    """Token weights for the linears of the last layer, except key and value: only the first token's output counts. If
    there are fewer than 4 first tokens per input of the widest of these linears, the other tokens count 0.05 each.
    """
    layer = encoder_layers(model)[-1]
    inside = {id(module) for module in layer.modules()}
    read_by_all = ("key", "value", "k_lin", "v_lin")
    linears = encoder_linears(model)
    names = [name for name, m in linears.items() if id(m) in inside and name.rsplit(".", 1)[1] not in read_by_all]
    width = max(linears[name].in_features for name in names)
    few = sum(len(batch["input_ids"]) for batch in batches) < 4 * width
    weights = []
    for batch in batches:
        weight = torch.full(batch["input_ids"].shape, 0.05 if few else 0.0)
        weight[:, 0] = 1.0
        weights.append(weight)
    return dict.fromkeys(names, weights)


def output_metrics(model, batches: Batches, seed: int, progress: Progress = no_progress) -> dict[str, torch.Tensor]:
    """The metric of each linear's outputs: how much the errors of two outputs together change the logits. It is FLOOR I
    + (1 - FLOOR) E g gᵀ / mean E g², float32 [n_out, n_out]. g: the gradients of `gradient_pass`; E: the mean over
    tokens; mean: over outputs. If the logits do not depend on the linear at all, the metric is I. [Martens & Grosse
    2015: the factor of a layer's Gauss-Newton matrix beside the inputs' second moments.]
    """
    metrics: dict[str, torch.Tensor] = {}

    def see(name, _x, gradient):
        flat = gradient.flatten(0, 1)
        if name in metrics:
            metrics[name].addmm_(flat.T, flat)
        else:
            metrics[name] = flat.T @ flat

    gradient_pass(model, batches, see, seed, progress)
    for metric in metrics.values():
        mean = metric.diagonal().mean()
        if mean > 0:
            metric *= (1 - FLOOR) / mean
        metric.diagonal().add_(FLOOR if mean > 0 else 1.0)
    return metrics


def gradient_pass(
    model,
    batches: Batches,
    see: Callable[[str, torch.Tensor, torch.Tensor], None],
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """One forward and backward pass. Calls see(name, x, g) for every encoder linear and every batch: its input x and
    the gradient g at its output, float32 [sequences, length, width], on the model's device. The products are bf16 if
    those are fast there.

    g = Jᵀ v, with J the Jacobian of the logits by the linear's output, and v = r / √labels. r are random signs; their
    mean is subtracted if a constant added to all logits changes nothing. So E g gᵀ measures the change of the logits,
    or of their differences, and all texts count equally. (The Fisher information would have v = (diag √p - p √pᵀ) r
    with the probabilities p, and would hardly look at texts that the model is sure of.)
    """
    generator = torch.Generator().manual_seed(seed)
    shift_invariant = problem_of(model.config.to_dict()).shift_invariant
    with _gradients_at(model, see):
        for done, batch in enumerate(batches, start=1):
            batch = moved(batch, model.device)
            with torch.enable_grad(), autocast(device=model.device):
                embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
                logits = model(inputs_embeds=embedded, **rest).logits.float()
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
            if shift_invariant:
                signs -= signs.mean(-1, keepdim=True)
            torch.autograd.backward(logits, (signs / logits.shape[-1] ** 0.5).to(logits.device))
            progress(done, len(batches))


@contextmanager
def _gradients_at(model, see):
    """Inside this context a backward pass calls see(name, input, gradient of the output), and no parameter has
    requires_grad.
    """

    def hook(name):
        def forward(_module, args, out):
            x = args[0].detach().float()
            out.register_hook(lambda gradient: see(name, x, gradient.float()))

        return forward

    handles = [module.register_forward_hook(hook(name)) for name, module in encoder_linears(model).items()]
    try:
        with frozen(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
