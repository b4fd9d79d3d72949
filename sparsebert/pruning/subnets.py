"""Subnetworks found by training with labels: mask training, iterative magnitude pruning, soft movement."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig, SubnetConfig
from sparsebert.encoders import Progress, encoder_linears, head_linears
from sparsebert.errors import InputError
from sparsebert.jobs import Job
from sparsebert.patterns import Grouped, parse, sparsity_of
from sparsebert.training.finetune import train
from sparsebert.training.imp import MagnitudePruning
from sparsebert.training.lesson import Lesson, fresh_classifier, origin
from sparsebert.training.masks import MaskTraining, SoftMovement

TRAINED = ("mask", "imp", "imp-rw", "soft-movement")
# The flags that some of them have alone.
OF_SOME = {
    "init": ("mask",),
    "gradual": ("mask", "soft-movement"),
    "rewind": ("mask", "imp-rw"),
    "scores_lr": ("soft-movement",),
    "penalty": ("soft-movement",),
}
# The paper's mask training on MNLI: 5 epochs of 392,702 examples in batches of 32 at this learning rate. Scores walk at
# random as far as lr √steps, there .012, about the distance 0.01 that they begin from the threshold; runs of other
# lengths keep that. In proportion to the steps instead, 600 steps on MNLI ended at chance.
STEPS, LR = 61_360, 5e-5


class Subnet:
    """One run: what it starts from and goes back to, and all that decides its result (`job`)."""

    def __init__(
        self, source: Path, task: str, target: Path, config: PruneConfig, subnet: SubnetConfig, overwrite: bool
    ):
        self.config = config
        self.pattern = parse(config.pattern)
        self.sparsity = sparsity_of(self.pattern, config.sparsity)
        self.spec = data.get_task(task)
        self.start = _weights(subnet.start, source)
        self.rewind = None if subnet.rewind is None else _weights(subnet.rewind, source)
        if config.method == "imp-rw" and self.rewind is None:
            self.rewind = self.start
        chosen = {"seed": config.seed, "max_length": config.max_length}
        if config.method == "mask" and subnet.gradual is None and isinstance(self.pattern, Grouped):
            # Fixed, a mask of 32x1 over frozen weights ended 14 points lower on MNLI (bench/results/srnets.md).
            chosen["gradual"] = 0.0
        self.settings = subnet.model_copy(update=chosen)
        rewind = None if self.rewind is None else checkpoint.source_sha256(self.rewind)
        others = {**config.model_dump(), "start": None, "rewind": rewind}  # the start is the model of the lesson
        self.lesson = Lesson.of(self.spec, self.settings, self.start, default_lr=self._default_lr, settings=others)
        self.job = Job("prune", self.lesson.inputs, __name__, target, overwrite=overwrite, space=self.lesson.space)

    def find(self, progress: Progress):
        """(model with zeros, tokenizer, figures of the run), on the CPU and in eval mode."""
        config, settings = self.config, self.settings
        with torch.random.fork_rng(devices=[]):
            model, tokenizer = fresh_classifier(self.start, self.lesson.spec, settings.seed, own_head=True)
            head = settings.head == "masked"
            schedule = {name: getattr(settings, name) for name in ("gradual", "update_every", "settle")}
            if config.method == "mask":
                fixed = settings.gradual is None or settings.gradual == self.sparsity
                init = settings.init or ("hard" if fixed else "soft")
                hook = MaskTraining(model, self.pattern, self.sparsity, init=init, head=head, **schedule)
            elif config.method == "soft-movement":
                chosen = {
                    name: value for name in ("scores_lr", "penalty") if (value := getattr(settings, name)) is not None
                }
                hook = SoftMovement(model, self.pattern, self.sparsity, head=head, **schedule, **chosen)
            else:
                rewind_to = None
                if config.method == "imp-rw":
                    rewound, _ = fresh_classifier(self.rewind, self.lesson.spec, settings.seed)
                    rewind_to = dict(rewound.named_parameters())
                hook = MagnitudePruning(
                    model, self.pattern, self.sparsity, rewind_to=rewind_to, head=head, warmup=settings.warmup
                )
            figures = self.lesson.learn(model, tokenizer, hook, self.job, train, progress)
            if isinstance(hook, MaskTraining):
                keeps = hook.keeps()
                hook.fold()
                if self.rewind is not None:
                    model, tokenizer = fresh_classifier(self.rewind, self.lesson.spec, settings.seed)
                    _apply(model, keeps)
        return model.cpu().eval(), tokenizer, figures

    def _default_lr(self, steps: int) -> float:
        return LR * (STEPS / steps) ** 0.5 if self.config.method == "mask" else LR


def check(config: PruneConfig, subnet: SubnetConfig) -> None:
    """InputError for settings that no run can have, before anything is read."""
    for flag in ("tier", "without", "as_published", "damping", "calibration"):
        if getattr(config, flag) not in (None, "", False, ()):
            raise InputError(f"--{flag.replace('_', '-')} does not belong to {config.method}", fix="leave it out")
    for flag, methods in OF_SOME.items():
        if getattr(subnet, flag) is not None and config.method not in methods:
            raise InputError(
                f"--{flag.replace('_', '-')} belongs to {' and '.join(methods)}, got {config.method}",
                fix="leave it out",
            )
    if config.method == "imp-rw" and subnet.select == "best":
        raise InputError("imp-rw ends with weights that were not trained: nothing to select", fix="leave --select out")
    sparsity = sparsity_of(parse(config.pattern), config.sparsity)
    if subnet.gradual is not None and subnet.gradual > sparsity:
        raise InputError(
            f"a mask's sparsity must not fall, got --gradual {subnet.gradual:g} to --sparsity {sparsity:g}",
            fix="begin with a lower one",
        )


def _weights(wanted: str | None, source: Path) -> Path:
    """The directory that --start or --rewind means."""
    if wanted is None:
        return source
    if wanted != "pretrained":
        return checkpoint.resolve(wanted)
    start = origin(source)
    if start == source and checkpoint.read_manifest(source) is not None:
        raise InputError(
            f"the encoder that {source} was fine-tuned from is not known or not there any more", fix="name its DIR"
        )
    return start


@torch.no_grad()
def _apply(model, keeps: dict[str, torch.Tensor]) -> None:
    """Zeros where a mask says so; the classifier proper, which is a new one, stays whole."""
    linears = encoder_linears(model) | head_linears(model, classifier=False)
    for name, linear in linears.items():
        if name in keeps:
            linear.weight[~keeps[name].to(linear.weight.device)] = 0.0
