"""Tickets: subnetworks that are searched for in one part of a run and trained in the rest. Robust tickets of weights,
found by masks that learn under attack. [Zheng et al. 2022] Those of heads and units are in `structures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sparsebert.config import LearnConfig
from sparsebert.encoders import encoder_linears, head_linears
from sparsebert.ops.topk_mask import pattern_mask, topk_mask
from sparsebert.patterns import Unstructured, zeros_in
from sparsebert.training.loop import Hook, rise_and_fall
from sparsebert.training.masks import stock

Weights = Callable[[], dict[str, torch.Tensor]]

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # γ, ζ and β of the hard concrete distribution
ATTACKED = {"adversarial": "freelb", "ascent_norm": "text", "ascent_start": 0.05}  # settings of a search under attack
KEPT_AT_START = 0.9  # value of each gate at the start, without noise


class Ticket(Hook):
    """Base of hooks that search for a ticket, draw it, and train it, in one run. A subclass has `draw` and `close`.

    search: share of the steps that the search takes, if it is not over earlier (`is_over`). While it lasts only the
    parameters in `learnt` are trained (None: all). Then the ticket is drawn: all weights become those of `rewound`, if
    it is given (parameters by name), the masks are applied, and the rest of the run trains the weights that are kept,
    with a new optimizer state. Each part has a learning-rate schedule of its own. keep: the masks, bool [n_out, n_in]
    by full name of the linear, True = kept; empty until the draw.
    """

    def __init__(self, model: nn.Module, *, search: float, rewound: Weights | None, warmup: float = 0.1):
        self.model, self.search, self.rewound, self.warmup = model, search, rewound, warmup
        self.learnt: set[str] | None = None
        self.drawn_at: int | None = None
        self.keep: dict[str, torch.Tensor] = {}
        self._resting: list[nn.Parameter] | None = None  # what the search does not train; None before the first step

    def draw(self) -> dict[str, torch.Tensor]:
        """The masks, from what the search has found."""
        raise NotImplementedError

    def close(self) -> None:
        """Takes out of the model what the search has put into it."""
        raise NotImplementedError

    def is_over(self, step: int, end: int) -> bool:
        """Whether the search is over before step `step`. end: the step at which it must be."""
        return step >= end

    @property
    def choose_from(self) -> float:
        """1 until the ticket is drawn: no weights of the search may be chosen as the best."""
        return 1.0 if self.drawn_at is None else 0.0

    def before(self, step: int, total: int) -> bool:
        if self.drawn_at is not None:
            return False
        if not self.is_over(step, self._end(total)):
            if self._resting is None:
                named = self.model.named_parameters()
                others = [p for name, p in named if self.learnt is not None and name not in self.learnt]
                self._resting = [p for p in others if p.requires_grad]
                for p in self._resting:
                    p.requires_grad_(False)
            return False
        self.drawn_at, self.keep = step, self.draw()
        self._wake()
        if self.rewound is not None:
            weights = self.rewound()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in weights:
                        parameter.copy_(weights[name])
        self.after()
        return True

    @torch.no_grad()
    def after(self) -> None:
        for name, keep in self.keep.items():
            self.model.get_submodule(name).weight.mul_(keep)

    def share_of_lr(self, step: int, total: int) -> float | None:
        begin, end = (0, self._end(total)) if self.drawn_at is None else (self.drawn_at, total)
        return rise_and_fall(step - begin, end - begin, self.warmup)

    def state(self) -> dict[str, torch.Tensor]:
        if self.drawn_at is None:
            return {}
        return {"drawn_at": torch.tensor(self.drawn_at), **{f"keep.{name}": keep for name, keep in self.keep.items()}}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        if "drawn_at" not in state:
            return
        self.drawn_at = int(state["drawn_at"])
        weights = dict(self.model.named_parameters())
        kept = {name.removeprefix("keep."): mask for name, mask in state.items() if name.startswith("keep.")}
        self.keep = {name: mask.to(weights[f"{name}.weight"].device) for name, mask in kept.items()}
        self._wake()

    def fold(self) -> nn.Module:
        self.after()
        return self.model

    def _wake(self) -> None:
        self.close()
        for p in self._resting or []:
            p.requires_grad_(True)
        self._resting = []

    def _end(self, total: int) -> int:
        return max(1, min(total - 1, round(self.search * total)))


class HardConcreteLinear(nn.Linear):
    """y = x (W ⊙ m)ᵀ + b, m = min(1, max(0, s (ζ - γ) + γ)), s = σ((log u - log(1 - u) + log α) / β), u uniform in (0,
    1) and drawn at every pass; when not training s = σ(log α). `scores` are log α, one per weight. [Louizos et al.
    2018; Zheng et al. 2022, eq. 1-3, 5]
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        start = (KEPT_AT_START - LOW) / (HIGH - LOW)
        self.scores = nn.Parameter(torch.full_like(linear.weight, math.log(start / (1 - start))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.scores
        if self.training:
            gate = (torch.rand_like(gate).clamp(1e-4, 1 - 1e-4).logit() + gate) / TEMPERATURE
        gate = (gate.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        return F.linear(x, self.weight * gate, self.bias)


class RobustTicket(Ticket):
    """Learns one gate per weight over frozen fine-tuned weights, under attack, and trains the ticket from `rewound`.
    [RobusT, Zheng et al. 2022, eq. 8: min over m of L_adv(m) + λ R(m)]

    The loss of the search is that at perturbed word embeddings (`learning`): per text, from a random start, as FreeLB.
    R is the mean over linears of the mean probability that a gate is not 0, σ(log α - β log(-γ / ζ)) (eq. 4); penalty:
    λ. scores_lr: learning rate of log α. The ticket is drawn at once: the weights with the smallest log α go, exactly
    floor(sparsity n) of the encoder's n. head: also mask the pooler, by itself; the classifier is not masked.

    Paper and released code differ, and this follows the code: it minimises the mean of the losses along the ascent, the
    paper the loss at its end. The code lets λ rise over the first 40 % of the search, and ranks the pooler's weights
    among the encoder's; here λ is fixed, as in the paper, so that the encoder's sparsity is exact. Unlike in the code,
    the penalty's gradient is clipped together with the loss's. The paper chooses among epochs and sparsities on the
    examples it reports; nothing is chosen here.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        rewound: Weights,
        search: float = 0.5,
        scores_lr: float = 0.1,
        penalty: float = 0.5,
        head: bool = True,
        warmup: float = 0.1,
    ):
        super().__init__(model, search=search, rewound=rewound, warmup=warmup)
        self.sparsity, self.scores_lr, self.penalty, self.gated = sparsity, scores_lr, penalty, {}
        self.inside = list(encoder_linears(model))
        linears = encoder_linears(model) | (head_linears(model, classifier=False) if head else {})
        for name, module in linears.items():
            self.gated[name] = HardConcreteLinear(module)
            model.set_submodule(name, self.gated[name])
        self.learnt = {f"{name}.scores" for name in self.gated}

    def own_lr(self, name: str) -> float | None:
        return self.scores_lr if name.endswith(".scores") else None

    def learning(self, config: LearnConfig) -> LearnConfig:
        return config if self.keep else config.model_copy(update=ATTACKED)

    @torch.no_grad()
    def regularise(self) -> None:
        for gated in self.gated.values():
            sigma = (gated.scores - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()
            share = self.penalty / (len(self.gated) * sigma.numel())
            gated.scores.grad.addcmul_(sigma, 1 - sigma, value=share)

    @torch.no_grad()
    def draw(self) -> dict[str, torch.Tensor]:
        scores = {name: gated.scores.detach() for name, gated in self.gated.items()}
        together = torch.cat([scores[name].flatten() for name in self.inside])
        kept = topk_mask(together, len(together) - zeros_in(len(together), self.sparsity))
        parts = kept.split([scores[name].numel() for name in self.inside])
        keep = {name: part.view_as(scores[name]) for name, part in zip(self.inside, parts, strict=True)}
        for name in scores.keys() - keep.keys():  # the pooler
            keep[name] = pattern_mask(scores[name] - scores[name].min(), Unstructured(), self.sparsity)
        return keep

    def close(self) -> None:
        for name, gated in self.gated.items():
            self.model.set_submodule(name, stock(gated))
        self.gated = {}
