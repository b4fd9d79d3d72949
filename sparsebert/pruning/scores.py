"""Which tokens count: the weight of each calibration token in the moments of each linear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from sparsebert.encoders import Progress, encoder_layers, encoder_linears, no_progress
from sparsebert.pruning.calibrate import TokenWeights
from sparsebert.pruning.calibration import Batches

FLOOR = 0.1  # of the mean weight: keeps the moments' rank, and the function on texts unlike these


def cls_weights(model, batches: Batches) -> TokenWeights:
    """Weights under which, in the last layer, only the first token's output counts: of all its linears but key and
    value. Where there are fewer than 4 first tokens an input, the others count 0.05 each.
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


def fisher_weights(model, batches: Batches, seed: int, progress: Progress = no_progress) -> TokenWeights:
    """FLOOR + (1 - FLOOR) ‖g‖² / mean ‖g‖² of every token and linear, g the gradient at the linear's output whose outer
    product has the Fisher information as its mean.
    """
    weights: TokenWeights = {name: [] for name in encoder_linears(model)}

    def norm(name, _x, gradient):
        weights[name].append(gradient.square().sum(-1))

    fisher_pass(model, batches, norm, seed, progress)
    for name, parts in weights.items():
        # The backward pass meets the linears of a batch once each, and the batches in order.
        mean = torch.cat([part.flatten() for part in parts]).mean()
        weights[name] = [FLOOR + (1 - FLOOR) * part / mean for part in parts]
    return weights


def fisher_pass(
    model,
    batches: Batches,
    see: Callable[[str, torch.Tensor, torch.Tensor], None],
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """One forward and backward pass; calls see(name, x, g) for every encoder linear of every batch, x and g [sequences,
    length, width].

    g = Jᵀ v with J the logits' Jacobian at the linear's output and v = (diag √p - p √pᵀ) r, r random signs and p the
    model's probabilities: E v vᵀ = diag p - p pᵀ, the Fisher information of the logits, so that E g gᵀ is that of the
    output. It varies less than the gradient at a sampled label.
    """
    generator = torch.Generator().manual_seed(seed)
    with _gradients_at(model, see):
        for done, batch in enumerate(batches, start=1):
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
                logits = model(inputs_embeds=embedded, **rest).logits
            p = logits.detach().softmax(-1)
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1.0
            v = p.sqrt() * signs
            torch.autograd.backward(logits, v - p * v.sum(-1, keepdim=True))
            progress(done, len(batches))


@contextmanager
def _gradients_at(model, see):
    """While it lasts, a backward pass calls see(name, input, gradient of the output), and no parameter asks for a
    gradient.
    """

    def hook(name):
        def forward(_module, args, out):
            x = args[0].detach()
            out.register_hook(lambda gradient: see(name, x, gradient))

        return forward

    asked = [p for p in model.parameters() if p.requires_grad]
    handles = [module.register_forward_hook(hook(name)) for name, module in encoder_linears(model).items()]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()
