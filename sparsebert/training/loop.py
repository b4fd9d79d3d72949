"""The training loop that all methods share: seeded and resumable.

Everything random in step k follows from (seed, k). A run that was killed and resumed therefore ends with the same
weights as one that was not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from sparsebert.config import LearnConfig
from sparsebert.encoders import bucketed, moved
from sparsebert.errors import InputError
from sparsebert.jobs import Job
from sparsebert.machine import bf16_is_fast
from sparsebert.training import adversarial, fused
from sparsebert.training.losses import LOSSES, Targets

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SLOTS = ("step", "exp_avg", "exp_avg_sq")  # the optimizer state of a parameter
STEPS_PER_SNAPSHOT = 100  # a killed run loses fewer steps than this; writing a snapshot takes about as long as a step
CHECKS = 20  # number of checks on the held-out examples in a run that keeps the best weights


class Hook:
    """Callbacks around the steps of a run. This base class does nothing. Its subclasses also work with stock
    `transformers.Trainer`, through `training.callbacks`.
    """

    weight_decay = True
    choose_from = 0.0  # share of the run after which its weights may be chosen as the best

    def before(self, step: int, total: int) -> bool:
        """Called before optimizer step `step` of `total`, and once after the last. True: resets the optimizer state."""
        return False

    def learning(self, config: LearnConfig) -> LearnConfig:
        """The settings, of `config` or changed, by which the coming step computes its loss."""
        return config

    def regularise(self) -> None:
        """Called after the backward pass of the loss: may add the gradients of a penalty."""

    def settle(self) -> None:
        """Called before the model is checked on the held-out examples."""

    def after(self) -> None:
        """Called after the optimizer has changed the weights."""

    def share_of_lr(self, step: int, total: int) -> float | None:
        """Share of the peak learning rate at a step; None: warm-up and decay over the whole run."""
        return None

    def own_lr(self, name: str) -> float | None:
        """The peak learning rate of a parameter, which then has no weight decay; None: the rate of the run."""
        return None

    def fold(self) -> object:
        """Called at the end: makes the model a stock one again, with the zeros in its weights."""

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a snapshot must hold beside the trained parameters."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over the tensors that `state` returned."""


def step_count(examples: int, config: LearnConfig) -> int:
    """Number of optimizer steps of a run on this many examples."""
    return config.steps or max(1, round(config.epochs * -(-examples // config.batch_size)))


def batch_rows(encoded: list[dict], config: LearnConfig) -> list[np.ndarray]:
    """The rows of the examples of every step, in the order of the steps."""
    total = step_count(len(encoded), config)
    steps: list[np.ndarray] = []
    epoch = 0
    while len(steps) < total:
        steps += bucketed(encoded, config.batch_size, np.random.default_rng((config.seed, epoch)))
        epoch += 1
    return steps[:total]


def seed_of(seed: int, step: int) -> int:
    """The seed of all random choices in one step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])


def rise_and_fall(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear up, then linear down to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total - step) / max(1, total - rising))


def precision_of(config: LearnConfig, device: torch.device) -> str:
    """The precision of a run: "fp32" or "bf16", which `auto` chooses by the device."""
    return config.precision if config.precision != "auto" else "bf16" if bf16_is_fast(device) else "fp32"


class TrainingLoop:
    """Model, optimizer and step count, with the snapshots that they can be rebuilt from.

    Trains every parameter with requires_grad. job: keeps the snapshots; None for a run too short to need any. score:
    returns the model's score on the held-out examples, higher is better; None if the best weights are not to be kept.
    part: name of the snapshots, if a job has several runs.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnConfig,
        total_steps: int,
        job: Job | None = None,
        *,
        hook: Hook | None = None,
        score: Callable[[], float] | None = None,
        part: str = "snapshot",
    ):
        self.model, self.config, self.total_steps = model, config, total_steps
        self.job, self.hook, self.score, self.part = job, hook or Hook(), score, part
        self.device = next(model.parameters()).device
        self.precision = precision_of(config, self.device)
        self.step, self.losses, self.saved_at = 0, [], 0
        self.best: dict[str, torch.Tensor] = {}
        self.scores: list[tuple[int, float]] = []  # (step, score) of each check on the held-out examples
        adversarial.freeze(model, config)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning rate and weight decay
        for name, p in self.parameters.items():
            own = self.hook.own_lr(name)
            decays = p.ndim >= 2 and own is None and self.hook.weight_decay
            rates = (config.lr if own is None else own, config.weight_decay if decays else 0.0)
            groups.setdefault(rates, []).append(p)
        # fused: one pass over the parameters; unfused, the optimizer takes a third of a MiniLM step on two cores.
        self.optimizer = OPTIMIZERS[getattr(config, "optimizer", "adamw")](
            [{"params": ps, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()],
            fused=True,
        )
        self._restore()
        if self.device.type == "cpu":
            fused.fuse(model)
        model.train()

    def advance(self, batch: dict[str, torch.Tensor], targets: Targets) -> None:
        """One optimizer step, and a snapshot when one is due."""
        if self.hook.before(self.step, self.total_steps):
            self.optimizer.state.clear()
        loss = self._backward(moved(batch, self.device), targets.to(self.device))
        self.hook.regularise()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=True)
        if not (math.isfinite(loss) and norm.isfinite()):
            kept = f"; the state of step {self.saved_at} is kept in {self.job.partial}" if self.saved_at else ""
            raise InputError(f"training diverged at step {self.step + 1}: loss {loss}{kept}", fix="lower --lr")
        share = self.hook.share_of_lr(self.step, self.total_steps)
        if share is None:
            share = rise_and_fall(self.step, self.total_steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.hook.after()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.step += 1
        if self.score is not None and self._check_is_due():
            self._keep_best()
        if self.job is not None and self.step % STEPS_PER_SNAPSHOT == 0 and self.step < self.total_steps:
            self._save()

    def finish(self) -> None:
        """Ends the run: the model gets the weights that are to be kept."""
        self.hook.before(self.total_steps, self.total_steps)
        if self.best:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.best[name])

    def _backward(self, batch: dict[str, torch.Tensor], targets: Targets) -> float:
        config = self.hook.learning(self.config)
        criterion = LOSSES[config.loss].criterion
        return adversarial.backward(self.model, batch, targets, config, criterion, bf16=self.precision == "bf16")

    def _check_is_due(self) -> bool:
        every = max(1, self.total_steps // CHECKS)
        at_end = self.step == self.total_steps
        return at_end or (self.step % every == 0 and self.step >= self.hook.choose_from * self.total_steps)

    def _keep_best(self) -> None:
        self.hook.settle()
        score = self.score()
        self.model.train()
        if not self.scores or score > max(found for _, found in self.scores):
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.scores.append((self.step, score))

    def _save(self) -> None:
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            kept = self.optimizer.state.get(p, {}).items()
            tensors |= {f"{slot}/{name}": value for slot, value in kept if slot in SLOTS}
        tensors |= {f"hook/{name}": value for name, value in self.hook.state().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["scores"] = torch.tensor(self.scores, dtype=torch.float64).view(-1, 2)
        self.job.keep(self.part, tensors, {"step": self.step}, last=f"step {self.step} of {self.total_steps}")
        self.saved_at = self.step

    def _restore(self) -> None:
        if self.job is None or (kept := self.job.kept(self.part)) is None:
            return
        tensors, facts = kept
        self.step = self.saved_at = facts["step"]
        self.losses = tensors["losses"].tolist()
        self.scores = [(int(step), score) for step, score in tensors["scores"].tolist()]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.best = {name: tensor.to(self.device) for name, tensor in parts.get("best", {}).items()}
        self.hook.restore(parts.get("hook", {}))
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(parts["weight"][name])
                if slots := {slot: parts[slot][name].to(self.device) for slot in SLOTS if name in parts.get(slot, {})}:
                    self.optimizer.state[p] = slots
