"""Masks learnt by gradients: over frozen weights (mask training, Liu et al. 2022, Alg. 2), or trained together with
the weights (soft movement, Sanh et al. 2020).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsebert.encoders import encoder_linears, head_linears
from sparsebert.errors import InputError
from sparsebert.ops.masked_matmul import masked_matmul
from sparsebert.ops.topk_mask import pattern_mask, topk_threshold
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, Unstructured, kept_in, require_fits
from sparsebert.training.loop import Hook

THRESHOLD = 0.01  # φ at the start
KEPT_SCORE = 0.02  # score of the weights kept at the start: α φ with α = 2
MOST_SPARSE = 0.995  # max sparsity of one linear, if linears get different sparsities


class MaskedLinear(nn.Linear):
    """y = x (W ⊙ 1[scores ≥ threshold])ᵀ + b; `scores` are trained by straight-through gradients."""

    def __init__(self, linear: nn.Linear, scores: torch.Tensor, threshold: torch.Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = nn.Parameter(scores)
        self.register_buffer("threshold", threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return masked_matmul(x, self.weight, self.scores, self.threshold, self.bias)


class MaskTraining(Hook):
    """Trains masks over the linears of a classifier, in place. Until `fold`, all but the masks' scores is frozen.

    init: "hard": scores are 0 for the smallest |w|, which `pattern` prunes at the first sparsity, else 0.02; φ = 0.01.
    "soft": scores are |w| (the mean over a group of rows). The mask keeps scores of at least φ, the threshold. After
    every share `update_every` of the run, and before each check on held-out examples, φ is set just above the largest
    score that the sparsity of that moment prunes. In between φ stays the same, and the number of zeros may change.
    gradual: the first sparsity, s_i; None: `sparsity`. s(t) = s + (s_i - s)(1 - t/T)³, T the share `settle` of the run.
    head: also mask pooler and classifier, always unstructured.

    Two departures from the authors' code: T is before the end of the run, so that every mask that may be chosen has the
    wanted sparsity; and the mask that is kept has the wanted sparsity too (theirs was cut at s_i).

    With stock `transformers.Trainer` use it through `SubnetCallback`. Raises InputError if the pattern does not fit or
    is V:N:M, if the sparsity would fall, and for N:M with `gradual`.
    """

    weight_decay = False

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        sparsity: float,
        *,
        init: str = "hard",
        gradual: float | None = None,
        update_every: float = 0.016,
        settle: float = 0.7,
        head: bool = True,
    ):
        if isinstance(pattern, VNM):
            raise InputError(f"masks are trained for unstructured, N:M and ROWSx1, got {pattern}", fix="choose one")
        if gradual is not None and gradual > sparsity:
            raise InputError(
                f"gradual sparsity must not fall, got {gradual:g} to {sparsity:g}", fix="lower the gradual sparsity"
            )
        if gradual is not None and isinstance(pattern, NofM):
            raise InputError(f"pattern {pattern} has one sparsity, got a gradual one", fix="leave --gradual out")
        self.sparsity, self.gradual, self.update_every, self.choose_from = sparsity, gradual, update_every, settle
        self.model, self.patterns, self.masked = model, {}, {}
        self._choose_trained(model)
        linears = {name: (module, pattern) for name, module in encoder_linears(model).items()}
        if head:
            linears |= {name: (module, Unstructured()) for name, module in head_linears(model).items()}
        self.current = sparsity if gradual is None else gradual
        for name, (module, kind) in linears.items():
            require_fits(kind, *module.weight.shape, sparsity, name)
            self.patterns[name] = kind
            masked = MaskedLinear(module, *self._begin(module.weight.detach(), kind, init))
            self.masked[name] = masked
            model.set_submodule(name, masked)

    def before(self, step: int, total: int) -> bool:
        every = max(1, round(self.update_every * total))
        if step % every == 0 and 0 < step <= total:
            self.current = self._sparsity_at(step / total)
            self.settle()
        return False

    def settle(self) -> None:
        shares = self._sparsities(self.current)
        for name, masked in self.masked.items():
            masked.threshold.copy_(_threshold(masked.scores.detach(), self.patterns[name], shares[name]))

    def state(self) -> dict[str, torch.Tensor]:
        thresholds = {name: masked.threshold for name, masked in self.masked.items()}
        return {"sparsity": torch.tensor(self.current, dtype=torch.float64), **thresholds}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.current = float(state["sparsity"])
        for name, masked in self.masked.items():
            masked.threshold.copy_(state[name])

    @torch.no_grad()
    def keeps(self) -> dict[str, torch.Tensor]:
        """Masks of exactly the wanted sparsity, True = kept: bool [n_out, n_in] by full name of the linear."""
        shares = self._sparsities(self.sparsity)
        return {name: _mask(masked, self.patterns[name], shares[name]) for name, masked in self.masked.items()}

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Writes the zeros into the weights and returns the model, with stock linears again."""
        for name, keep in self.keeps().items():
            linear = stock(self.masked[name])
            linear.weight[~keep] = 0.0
            self.model.set_submodule(name, linear)
        self.masked.clear()
        return self.model.requires_grad_(True)

    def _choose_trained(self, model: nn.Module) -> None:
        """Sets which parameters are trained, before there are scores."""
        model.requires_grad_(False)

    def _sparsities(self, sparsity: float) -> dict[str, float]:
        """The sparsity of every linear, if the model's is `sparsity`."""
        return dict.fromkeys(self.masked, sparsity)

    def _begin(self, weight: torch.Tensor, pattern: Pattern, init: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, threshold) at the first step."""
        rows = _rows(pattern)
        size = weight.abs().view(-1, rows, weight.shape[1]).mean(1)
        if init == "soft":
            return size, _threshold(size, pattern, self.current)
        scores = KEPT_SCORE * pattern_mask(weight.abs(), pattern, self.current)[::rows].float()
        shape = (len(scores), scores.shape[1] // pattern.m) if isinstance(pattern, NofM) else ()
        return scores, torch.full(shape, THRESHOLD, device=weight.device)

    def _sparsity_at(self, share: float) -> float:
        if self.gradual is None or share >= self.choose_from:
            return self.sparsity
        return self.sparsity + (self.gradual - self.sparsity) * (1 - share / self.choose_from) ** 3


class SoftMovement(MaskTraining):
    """Trains masks and weights together: weights that move away from zero are kept. [Sanh et al. 2020]

    Differences from MaskTraining: the weights are trained too, except the embeddings. Scores begin at 0, with all
    weights kept, and accumulate -∂L/∂W ⊙ W. The encoder's linears share one threshold, so that some become sparser than
    others, none above 99.5 % (N:M, pooler and classifier: one threshold each). The loss gets a penalty: λ times the
    mean over linears of their mean σ(score). λ rises to `penalty` as the sparsity rises. scores_lr: the peak learning
    rate of the scores; the weights have the run's.

    A departure from the paper: there the threshold is σ(score) = 0.1, and λ decides the sparsity, which is counted
    afterwards; here the threshold is set for the wanted sparsity. In stock `transformers.Trainer` the scores have the
    Trainer's one learning rate, and the penalty is added to gradients that are already clipped.
    """

    weight_decay = True

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        sparsity: float,
        *,
        penalty: float = 400.0,
        scores_lr: float = 1e-2,
        gradual: float | None = None,
        update_every: float = 0.016,
        settle: float = 0.7,
        head: bool = True,
    ):
        if gradual is None and not isinstance(pattern, NofM):
            gradual = 0.0
        super().__init__(model, pattern, sparsity, gradual=gradual, update_every=update_every, settle=settle, head=head)
        self.penalty, self.scores_lr = penalty, scores_lr
        self.shared = {} if isinstance(pattern, NofM) else encoder_linears(model)

    def own_lr(self, name: str) -> float | None:
        return self.scores_lr if name.endswith(".scores") else None

    @torch.no_grad()
    def regularise(self) -> None:
        rises = self.gradual is not None and self.gradual < self.sparsity
        risen = (self.current - self.gradual) / (self.sparsity - self.gradual) if rises else 1.0
        for masked in self.masked.values():
            sigma = masked.scores.sigmoid()
            share = self.penalty * risen / (len(self.masked) * sigma.numel())
            masked.scores.grad.addcmul_(sigma, 1 - sigma, value=share)

    def _choose_trained(self, model: nn.Module) -> None:
        model.base_model.embeddings.requires_grad_(False)

    def _begin(self, weight: torch.Tensor, pattern: Pattern, init: str) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(len(weight) // _rows(pattern), weight.shape[1], device=weight.device)
        shape = (len(scores), scores.shape[1] // pattern.m) if isinstance(pattern, NofM) else ()
        return scores, torch.full(shape, float("-inf"), device=weight.device)

    def _sparsities(self, sparsity: float) -> dict[str, float]:
        shares = super()._sparsities(sparsity)
        if not self.shared:
            return shares
        scores = {name: masked.scores.detach() for name, masked in self.shared.items()}
        together = torch.cat([own.flatten() for own in scores.values()])
        threshold = _threshold(together[None], Unstructured(), sparsity)
        for name, own in scores.items():
            n, multiple = own.numel(), getattr(self.patterns[name], "kept_multiple", 1)
            gone = min(int((own < threshold).sum()), n - max(multiple, math.ceil((1 - MOST_SPARSE) * n)))
            shares[name] = (gone + 0.5) / n  # n times it rounds down to `gone`, however the quotient is rounded
        return shares


def stock(linear: nn.Linear) -> nn.Linear:
    """The stock linear with the parameters of one of a subclass."""
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made


def _rows(pattern: Pattern) -> int:
    """Number of rows that share a score."""
    return pattern.rows if isinstance(pattern, Grouped) else 1


def _threshold(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """The threshold that prunes the k = floor(s n) smallest scores: the next float32 above the k-th smallest. If
    nothing is to be pruned, -inf. N:M: one for each m consecutive scores.
    """
    if isinstance(pattern, NofM):
        goes = topk_threshold(scores.view(len(scores), -1, pattern.m), pattern.n + 1)
    else:
        rows = _rows(pattern)
        kept = kept_in(pattern, rows * len(scores), scores.shape[1], sparsity) // rows
        if kept == scores.numel():
            return torch.tensor(float("-inf"), device=scores.device)
        goes = topk_threshold(scores.flatten(), kept + 1)
    return torch.nextafter(goes, torch.full_like(goes, torch.inf))


def _mask(masked: MaskedLinear, pattern: Pattern, sparsity: float) -> torch.Tensor:
    scores = masked.scores
    # pattern_mask adds up the scores of a group and takes none below 0. All rows of a group get the same score.
    scores = (scores - scores.min()).repeat_interleave(_rows(pattern), 0)
    return pattern_mask(scores, pattern, sparsity)
