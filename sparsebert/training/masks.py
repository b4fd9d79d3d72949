"""Mask training: which weights of a frozen classifier to keep, learnt by gradients. [Liu et al. 2022, Alg. 2]"""

from __future__ import annotations

import torch
from torch import nn

from sparsebert.encoders import encoder_linears, head_linears
from sparsebert.errors import InputError
from sparsebert.ops.masked_matmul import masked_matmul
from sparsebert.ops.topk_mask import pattern_mask, topk_threshold
from sparsebert.patterns import VNM, Grouped, NofM, Pattern, Unstructured, kept_in, require_fits
from sparsebert.training.loop import Hook

THRESHOLD = 0.01  # φ to begin with, and
KEPT_SCORE = 0.02  # the score of what is kept then, α φ with α = 2


class MaskedLinear(nn.Linear):
    """y = x (W ⊙ 1[scores ≥ threshold])ᵀ + b; by gradients only `scores` changes."""

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
    """Masks over the linears of a classifier, in place: everything is frozen but their scores, until `fold`.

    init: "hard": scores are 0 for the smallest |w|, which `pattern` at `sparsity` leaves out, else 0.02, φ = 0.01.
    "soft": scores are |w| (of a group of rows, their mean). Every `update_every` of the run, and before held-out
    examples are asked, φ becomes the largest score of what is to go at the sparsity of that moment; in between it
    stays, and the number of zeros floats. gradual: the sparsity to begin with, s_i; s(t) = s + (s_i - s)(1 - t/T)³, T
    the share `settle` of the run. head: pooler and classifier as well, always unstructured.

    Two departures from the authors' code: T is not the end of the run, so that every mask that may be chosen has the
    wanted sparsity, and the mask that is kept has it too (theirs was cut at s_i).

    With stock `transformers.Trainer` use it through `SubnetCallback`. Raises InputError where the pattern does not fit,
    is V:N:M, or the sparsity would fall.
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
                f"gradual sparsity must not fall, got {gradual:g} to {sparsity:g}", fix="begin with a lower one"
            )
        if gradual is not None and isinstance(pattern, NofM):
            raise InputError(f"pattern {pattern} has one sparsity, got a gradual one", fix="leave --gradual out")
        self.sparsity, self.gradual, self.update_every, self.choose_from = sparsity, gradual, update_every, settle
        self.model, self.patterns, self.masked = model, {}, {}
        model.requires_grad_(False)
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
        for name, masked in self.masked.items():
            masked.threshold.copy_(_threshold(masked.scores.detach(), self.patterns[name], self.current))

    def state(self) -> dict[str, torch.Tensor]:
        thresholds = {name: masked.threshold for name, masked in self.masked.items()}
        return {"sparsity": torch.tensor(self.current, dtype=torch.float64), **thresholds}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.current = float(state["sparsity"])
        for name, masked in self.masked.items():
            masked.threshold.copy_(state[name])

    @torch.no_grad()
    def keeps(self) -> dict[str, torch.Tensor]:
        """Which weights are kept at the wanted sparsity, exactly: bool [n_out, n_in] by full name of the linear."""
        return {name: _mask(masked, self.patterns[name], self.sparsity) for name, masked in self.masked.items()}

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Writes the zeros into the weights and returns the model, its linears stock ones again."""
        for name, keep in self.keeps().items():
            masked = self.masked[name]
            linear = nn.Linear(masked.in_features, masked.out_features, masked.bias is not None, device="meta")
            linear.weight, linear.bias = masked.weight, masked.bias
            linear.weight[~keep] = 0.0
            self.model.set_submodule(name, linear)
        self.masked.clear()
        return self.model.requires_grad_(True)

    def _begin(self, weight: torch.Tensor, pattern: Pattern, init: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, threshold) at the first step."""
        rows = _rows(pattern)
        size = weight.abs().view(-1, rows, weight.shape[1]).mean(1)
        if init == "soft":
            return size, _threshold(size, pattern, self.current)
        scores = KEPT_SCORE * pattern_mask(weight.abs().cpu(), pattern, self.current)[::rows].float().to(weight.device)
        shape = (len(scores), scores.shape[1] // pattern.m) if isinstance(pattern, NofM) else ()
        return scores, torch.full(shape, THRESHOLD, device=weight.device)

    def _sparsity_at(self, share: float) -> float:
        if self.gradual is None or share >= self.choose_from:
            return self.sparsity
        return self.sparsity + (self.gradual - self.sparsity) * (1 - share / self.choose_from) ** 3


def _rows(pattern: Pattern) -> int:
    """How many rows share a score."""
    return pattern.rows if isinstance(pattern, Grouped) else 1


def _threshold(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """The least number above every score that is to go: the k-th smallest, k = floor(s n), excluded. Where nothing is
    to go, -inf. N:M: one for each m consecutive scores.
    """
    if isinstance(pattern, NofM):
        goes = topk_threshold(scores.view(len(scores), -1, pattern.m).cpu(), pattern.n + 1)
    else:
        rows = _rows(pattern)
        kept = kept_in(pattern, rows * len(scores), scores.shape[1], sparsity) // rows
        if kept == scores.numel():
            return torch.tensor(float("-inf"), device=scores.device)
        goes = topk_threshold(scores.flatten().cpu(), kept + 1)
    return torch.nextafter(goes, torch.tensor(float("inf"))).to(scores.device)


def _mask(masked: MaskedLinear, pattern: Pattern, sparsity: float) -> torch.Tensor:
    scores = masked.scores.cpu()
    # pattern_mask adds scores of a group up and wants none below 0; equal ones of a group stay equal.
    scores = (scores - scores.min()).repeat_interleave(_rows(pattern), 0)
    return pattern_mask(scores, pattern, sparsity).to(masked.weight.device)
