"""Adversarial training: on small perturbations of the word embeddings or hidden states that raise the loss most."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from sparsebert.config import LearnConfig
from sparsebert.encoders import autocast, encoder_layers, frozen, layers_skipped
from sparsebert.training.losses import Criterion, Targets, ce

Batch = dict[str, torch.Tensor]
SIZE = 0.03  # length of an ascent step


def freeze(model: nn.Module, config: LearnConfig) -> None:
    """Freezes the embeddings for FreeLB: training them would undo the perturbation."""
    if config.adversarial == "freelb":
        model.base_model.embeddings.requires_grad_(False)


def backward(
    model: nn.Module, batch: Batch, targets: Targets, config: LearnConfig, criterion: Criterion = ce, *, bf16: bool
) -> float:
    """Adds the gradients of one batch's loss to the parameters, and returns the loss. bf16: forward passes under
    autocast.

    "none": the plain loss. "freelb": the mean of the losses at K = `ascent_steps` perturbations of the word embeddings,
    δ_1 = 0 and δ_{k+1} = δ_k + `ascent_size` g_k / ‖g_k‖. g_k is the gradient at δ_k, and the norm is per token [Zhu et
    al. 2020, as run by Li et al. 2023: no projection, embeddings frozen], or per text (`ascent_norm`). With
    `ascent_start` δ_1 is random: each of the n d numbers of a text of n tokens is uniform within ±`ascent_start` /
    √(n d). "last-layer": δ perturbs the last layer's inputs. It is found by K such steps through that layer and the
    head alone; the loss is that of the whole model at δ [after SMAAT, Kara et al. 2024].
    """
    if config.adversarial == "none":
        loss = loss_of(model, batch, targets, criterion, bf16)
        loss.backward()
        return loss.item()
    if config.adversarial == "freelb":
        with torch.no_grad():
            words = model.get_input_embeddings()(batch["input_ids"])
        rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        total = 0.0
        for words_moved, ascend in _ascent(words, batch, config):
            moved_batch = {"inputs_embeds": words_moved, **rest}
            loss = loss_of(model, moved_batch, targets, criterion, bf16) / config.ascent_steps
            loss.backward()
            ascend(words_moved.grad)
            total += loss.item()
        return total
    layers = encoder_layers(model)
    with torch.no_grad(), autocast(bf16, targets.labels.device):
        hidden = _reaching(model, layers[-1], batch)
    delta = _worst(model, batch, targets, hidden, config, criterion, bf16)
    with _moved(layers[-1], delta):
        loss = loss_of(model, batch, targets, criterion, bf16)
    loss.backward()
    return loss.item()


def _worst(
    model: nn.Module,
    batch: Batch,
    targets: Targets,
    hidden: torch.Tensor,
    config: LearnConfig,
    criterion: Criterion,
    bf16: bool,
) -> torch.Tensor:
    """δ after `ascent_steps` steps through the last layer and the head. hidden: the last layer's inputs."""
    layers = encoder_layers(model)
    reached = [None]
    with frozen(model), layers_skipped(layers[:-1], reached):
        for moved, ascend in _ascent(hidden, batch, config):
            reached[0] = moved
            loss_of(model, batch, targets, criterion, bf16).backward()
            last = ascend(moved.grad)
    return last


def perturbed_loss(model: nn.Module, batch: Batch, targets: Targets, config: LearnConfig) -> float:
    """The mean loss of a batch at the last perturbation of the word embeddings that FreeLB would see."""
    with torch.no_grad():
        words = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    for moved, ascend in _ascent(words, batch, config):
        loss = loss_of(model, {"inputs_embeds": moved, **rest}, targets, ce, bf16=False)
        ascend(torch.autograd.grad(loss, moved)[0])
    return loss.item()


def loss_of(model: nn.Module, inputs: Batch, targets: Targets, criterion: Criterion, bf16: bool) -> torch.Tensor:
    """The loss of a batch, before the backward pass."""
    with autocast(bf16, targets.labels.device):
        logits = model(**inputs).logits
    return criterion(logits.float(), targets)


def _ascent(start: torch.Tensor, batch: Batch, config: LearnConfig):
    """Yields (start + δ as a leaf tensor, ascend) `ascent_steps` times; ascend(gradient) moves δ and returns it."""
    real = batch["attention_mask"][..., None]
    delta = torch.zeros_like(start)
    if config.ascent_start:
        bound = config.ascent_start / (real.sum(1, keepdim=True) * start.shape[-1]).sqrt()
        delta = (2 * torch.rand_like(start) - 1) * bound * real
    over = (-1,) if config.ascent_norm == "token" else (-2, -1)
    size = SIZE if config.ascent_size is None else config.ascent_size

    def ascend(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal delta
        norm = gradient.norm(dim=over, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        delta = delta + size * gradient / norm * real
        return delta

    for _ in range(config.ascent_steps):
        yield (start + delta).detach().requires_grad_(), ascend


class _Reached(Exception):
    """Raised to stop a forward pass that has reached the layer."""


def _reaching(model: nn.Module, layer: nn.Module, batch: Batch) -> torch.Tensor:
    """The hidden states with which the model calls `layer`."""
    caught = []

    def catch(_module, args):
        caught.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(catch)
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


@contextmanager
def _moved(layer: nn.Module, delta: torch.Tensor):
    """Inside this context delta is added to the layer's input."""
    handle = layer.register_forward_pre_hook(lambda _module, args: (args[0] + delta, *args[1:]))
    try:
        yield
    finally:
        handle.remove()
