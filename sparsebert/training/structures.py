"""Tickets of whole attention heads and feed-forward units: drawn by their sensitivity [Michel et al. 2019; Liang et al.
2021], or early in an adversarial training [Xi et al. 2022]. A removed head or unit is rows and columns of zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from sparsebert import architectures
from sparsebert.config import LearnConfig
from sparsebert.encoders import encoder_layers, encoder_linears
from sparsebert.errors import InputError
from sparsebert.ops.topk_mask import topk_mask
from sparsebert.patterns import zeros_in
from sparsebert.training.tickets import ATTACKED, Ticket

CHECKS = 20  # points of a search at which early masks are compared
NEWER = 5  # how many newer masks must be near to an early one
EARLY_SIZE = 0.01  # length of an ascent step of the early search
HEAD_PENALTY, UNIT_PENALTY = 1e-5, 2e-4  # weights of the sums of |gate| in the loss of the early search


class Layer(NamedTuple):
    """Full names of a layer's linears. inputs: query, key and value."""

    inputs: tuple[str, ...]
    out: str
    up: str
    down: str


class Removed(NamedTuple):
    """Numbers of heads and of feed-forward units (or whole feed-forward layers) that are removed, and the zeros that
    this makes in the encoder's linears.
    """

    heads: int
    units: int
    zeros: int


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of an encoder, first to last."""
    names = architectures.of(model.config.model_type)
    prefixes = [names.layer(i) for i in range(len(encoder_layers(model)))]
    return [
        Layer(tuple(p + name for name in names.attention), p + names.attention_out, p + names.up, p + names.down)
        for p in prefixes
    ]


def removed(model: nn.Module, sparsity: float, *, heads: float | None = None, whole: bool = False) -> Removed:
    """How many heads and units go at a sparsity. heads: share of the heads; None: the sparsity.

    floor(share n) of n heads go, but one in each layer stays, and as many units as then make at most floor(sparsity n)
    of the encoder's n weights zero. whole: whole feed-forward layers, floor(sparsity n) of n. Raises InputError if the
    heads alone would make more zeros, or heads and all units too few.
    """
    layers = layers_of(model)
    out, down = (model.get_submodule(name) for name in (layers[0].out, layers[0].down))
    n_heads, hidden, inner = model.config.num_attention_heads, out.out_features, down.in_features
    per_head = 4 * hidden * out.in_features // n_heads
    share = sparsity if heads is None else heads
    gone = min(zeros_in(n_heads * len(layers), share), (n_heads - 1) * len(layers))
    if whole:
        units = zeros_in(len(layers), sparsity)
        return Removed(gone, units, gone * per_head + units * 2 * hidden * inner)
    weights = sum(module.weight.numel() for module in encoder_linears(model).values())
    budget = zeros_in(weights, sparsity) - gone * per_head
    if budget < 0:
        raise InputError(
            f"{gone} heads are more than sparsity {sparsity:g} of the encoder's weights", fix="lower --heads"
        )
    units, most = budget // (2 * hidden), inner * len(layers)
    if units > most:
        reached = (gone * per_head + most * 2 * hidden) / weights
        raise InputError(
            f"{gone} heads and all feed-forward units make sparsity {reached:.4g}, got {sparsity:g}",
            fix="lower --sparsity" if heads is None else "lower --sparsity, or raise --heads",
        )
    return Removed(gone, units, gone * per_head + units * 2 * hidden)


def strongest(scores: torch.Tensor, gone: int, *, spare: int = 0) -> torch.Tensor:
    """The mask without the `gone` lowest scores of all layers together: bool [layers, n]. spare: the highest scores of
    each layer that stay in any case. scores: float32 [layers, n].
    """
    if spare:
        scores = scores.clone()
        scores.scatter_(1, scores.topk(spare, dim=1).indices, math.inf)
    return topk_mask(scores.flatten().contiguous(), scores.numel() - gone).view(scores.shape)


def masks_of(model: nn.Module, heads: torch.Tensor, units: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masks, bool [n_out, n_in] by full name, that remove heads and feed-forward units. heads: bool [layers,
    heads]; units: bool [layers, units], or [layers, 1] for whole feed-forward layers; True = kept.

    A removed head has no rows in query, key and value and no columns in the attention's output; a unit no row in the
    first feed-forward linear and no column in the second. Biases stay: that of a removed head or unit reaches nothing,
    and that of a removed feed-forward layer's output is added as before.
    """
    keep = {}
    for layer, of_heads, of_units in zip(layers_of(model), heads, units, strict=True):
        shapes = {
            name: model.get_submodule(name).weight.shape for name in (*layer.inputs, layer.out, layer.up, layer.down)
        }
        inside = of_heads.repeat_interleave(shapes[layer.out][1] // len(of_heads))
        between = of_units.repeat_interleave(shapes[layer.down][1] // len(of_units))
        keep |= {name: inside[:, None].expand(shapes[name]).clone() for name in layer.inputs}
        keep[layer.out] = inside.expand(shapes[layer.out]).clone()
        keep[layer.up] = between[:, None].expand(shapes[layer.up]).clone()
        keep[layer.down] = between.expand(shapes[layer.down]).clone()
    return keep


class GatedTicket(Ticket):
    """Base of structured tickets. While it searches, the inputs of each attention's output and of each second
    feed-forward linear are multiplied by gates, parameters that begin at 1: one per head, and one per unit (whole: one
    per feed-forward layer). removed: how many of them go.
    """

    def __init__(self, model: nn.Module, removed: Removed, *, whole: bool = False, **more):
        super().__init__(model, **more)
        self.removed, layers = removed, layers_of(model)
        self.outs, self.downs = (
            [model.get_submodule(getattr(each, name)) for each in layers] for name in ("out", "down")
        )
        self._handles = []
        for modules, gates in ((self.outs, model.config.num_attention_heads), (self.downs, 1 if whole else None)):
            for module in modules:
                count = module.in_features if gates is None else gates
                module.gate = nn.Parameter(torch.ones(count, device=module.weight.device))
                self._handles.append(
                    module.register_forward_pre_hook(lambda module, args: (self.gated(module, args[0]),))
                )

    def gated(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """x [texts, tokens, n_in] times the gates of the linear."""
        return x * module.gate.repeat_interleave(module.in_features // len(module.gate))

    def drawn(self, heads: torch.Tensor, units: torch.Tensor) -> dict[str, torch.Tensor]:
        """The masks by scores, float32 [layers, gates]."""
        keep = strongest(heads, self.removed.heads, spare=1), strongest(units, self.removed.units)
        return masks_of(self.model, *keep)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in (*self.outs, *self.downs) if self._handles else ():
            del module.gate
        self._handles = []


class SensitiveTicket(GatedTicket):
    """The ticket of the heads and units to whose gates ξ the loss is most sensitive: those with the largest mean over
    examples of |∂L(x)/∂ξ| at ξ = 1 stay. [Michel et al. 2019; Liang et al. 2021]

    The search trains nothing, with dropout off, and adds up the sensitivities of its batches, by the plain loss. Those
    of a layer are divided by their 2-norm. whole: whole feed-forward layers [Liang et al. 2021]; else units.

    Two departures from the released code of Liang et al.: there the absolute value is taken per token, not per example
    as in the papers; and there a removed feed-forward layer loses its output's bias.
    """

    def __init__(self, model: nn.Module, removed: Removed, *, search: float = 0.1, **more):
        super().__init__(model, removed, search=search, **more)
        gates = {id(module.gate) for module in (*self.outs, *self.downs)}
        self.learnt = {name for name, p in model.named_parameters() if id(p) in gates}
        self.sums = {module: torch.zeros_like(module.gate) for module in (*self.outs, *self.downs)}

    def before(self, step: int, total: int) -> bool:
        drawn = super().before(step, total)
        self.model.train(self.drawn_at is not None)
        return drawn

    def own_lr(self, name: str) -> float | None:
        return 0.0 if name in self.learnt else None

    def learning(self, config: LearnConfig) -> LearnConfig:
        return config if self.keep else config.model_copy(update={"loss": "ce", "adversarial": "none"})

    def gated(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = super().gated(module, x)
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add(module, y.detach(), gradient))
        return y

    def draw(self) -> dict[str, torch.Tensor]:
        def normalised(modules: list[nn.Linear]) -> torch.Tensor:
            scores = torch.stack([self.sums[module] for module in modules])
            over = scores if scores.shape[1] > 1 else scores.T  # of single gates, over the layers
            return scores / over.norm(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

        return self.drawn(normalised(self.outs), normalised(self.downs))

    def state(self) -> dict[str, torch.Tensor]:
        if self.drawn_at is not None:
            return super().state()
        return {f"sum.{i}": total for i, total in enumerate(self.sums.values())}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        super().restore(state)
        for i, total in enumerate(self.sums.values()):
            if f"sum.{i}" in state:
                total.copy_(state[f"sum.{i}"])

    @torch.no_grad()
    def _add(self, module: nn.Linear, y: torch.Tensor, gradient: torch.Tensor) -> None:
        gates = len(self.sums[module])
        by_text = (gradient * y).float().view(len(y), -1, gates, y.shape[-1] // gates).sum((1, 3))
        # The loss is the mean over the batch: times its size it is the sum of the examples' losses.
        self.sums[module] += len(y) * by_text.abs().sum(0)


class EarlyTicket(GatedTicket):
    """The ticket that an adversarial training of weights and gates shows early. [EarlyRobust, Xi et al. 2022]

    The search trains the loss at perturbed word embeddings (per text, from a random start, as FreeLB) plus 1e-5 Σ|gate|
    over heads and 2e-4 Σ|gate| over units. At each of 20 points of the search the masks of the smallest gates are
    drawn, over all layers together, one head per layer spared. When a mask differs from each of the five that follow in
    less than `distance` of its entries, heads and units apart, the search is over, and the newest is the ticket.

    The released code searches for a fixed time and looks for this moment afterwards, in the stored gates; the paper
    stops there, as this does. In the code the word embeddings are trained in the search, here not.
    """

    def __init__(self, model: nn.Module, removed: Removed, *, search: float = 0.2, distance: float = 0.1, **more):
        super().__init__(model, removed, search=search, **more)
        self.distance = distance
        self.masks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def learning(self, config: LearnConfig) -> LearnConfig:
        if self.keep:
            return config
        size = EARLY_SIZE if config.ascent_size is None else config.ascent_size
        return config.model_copy(update={**ATTACKED, "ascent_size": size})

    @torch.no_grad()
    def regularise(self) -> None:
        if not self.keep:
            for modules, penalty in ((self.outs, HEAD_PENALTY), (self.downs, UNIT_PENALTY)):
                for module in modules:
                    module.gate.grad.add_(module.gate.sign(), alpha=penalty)

    def is_over(self, step: int, end: int) -> bool:
        if step and step % max(1, round(end / CHECKS)) == 0:
            heads, units = self._gates()
            found = strongest(heads, self.removed.heads, spare=1), strongest(units, self.removed.units)
            self.masks = [*self.masks, found][-NEWER - 1 :]
        return step >= end or self.has_settled()

    def has_settled(self) -> bool:
        """Whether the oldest of the last masks is near to each of the five newer ones."""
        if len(self.masks) <= NEWER:
            return False
        oldest, *newer = self.masks
        return all(
            (kind != other).float().mean() < self.distance
            for each in newer
            for kind, other in zip(oldest, each, strict=True)
        )

    def draw(self) -> dict[str, torch.Tensor]:
        return self.drawn(*self._gates())

    def state(self) -> dict[str, torch.Tensor]:
        if self.drawn_at is not None or not self.masks:
            return super().state()
        heads, units = zip(*self.masks, strict=True)
        return {"heads": torch.stack(heads), "units": torch.stack(units)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        super().restore(state)
        if "heads" in state:
            parts = (state[name].to(self.outs[0].weight.device) for name in ("heads", "units"))
            self.masks = list(zip(*parts, strict=True))

    def _gates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.stack([m.gate.detach() for m in modules]) for modules in (self.outs, self.downs))
