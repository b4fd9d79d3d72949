"""One run of a method that trains with labels: the weights at its start, the training, and the weights at its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig
from sparsebert.encoders import Progress, encoder_linears, head_linears
from sparsebert.errors import InputError
from sparsebert.jobs import Job
from sparsebert.machine import at_work_on
from sparsebert.patterns import parse, sparsity_of
from sparsebert.pruning.calibration import draw
from sparsebert.pruning.quantize import quantize
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.pruning.trained.method import Start, TrainedConfig
from sparsebert.training.finetune import train
from sparsebert.training.setup import TrainingSetup, encoder_of, fresh_classifier, head_for


class Subnet:
    """One run. start: directory of the weights to start from. rewind: directory of the weights to go back to, or None.
    job: its key is made of all that decides the result.
    """

    def __init__(
        self, source: Path, spec: data.Task, target: Path, config: PruneConfig, subnet: SubnetConfig, overwrite: bool
    ):
        self.method = TRAINED[config.method]
        self.pattern, self.tokens = parse(config.pattern), config.calibration_tokens
        self.sparsity = sparsity_of(self.pattern, config.sparsity)
        self.start = _weights(subnet.start, source)
        wanted = self.method.rewinds_to if subnet.rewind is None else subnet.rewind
        self.rewind = None if wanted is None else _weights(wanted, source)
        if self.method.rewinds == "during" and self.rewind is None:
            self.rewind = self.start
        if self.rewind not in (None, self.start):
            _require_alike(self.start, self.rewind, during=self.method.rewinds == "during")
        chosen = {"seed": config.seed, "max_length": config.max_length, "device": config.device}
        chosen |= {k: v for k, v in self.method.by_pattern(self.pattern).items() if getattr(subnet, k) is None}
        if self.method.loss is not None:
            chosen |= {"loss": self.method.loss, "teacher": subnet.teacher or str(source)}
        self.settings = subnet.model_copy(update=chosen)
        rewind = None if self.rewind is None else checkpoint.source_sha256(self.rewind)
        others = {**config.model_dump(), "start": None, "rewind": rewind}  # the start is the setup's model
        others["sparsity"] = self.sparsity  # a default that is written out is the same work
        self.setup = TrainingSetup.of(spec, self.settings, self.start, default_lr=self.method.lr, settings=others)
        head_for(self.start, self.setup.spec, own_head=True)
        self.job = Job("prune", self.setup.inputs, __name__, target, overwrite=overwrite, space=self.setup.space)

    def find(self, progress: Progress):
        """(model with zeros, tokenizer, figures of the run, scales of int8 or None), on the CPU and in eval mode."""
        spec, seed, device = self.setup.spec, self.settings.seed, self.setup.device

        def rewound() -> dict[str, torch.Tensor]:
            return dict(fresh_classifier(self.rewind, spec, seed, device)[0].named_parameters())

        with at_work_on(device):
            model, tokenizer = fresh_classifier(self.start, spec, seed, device, own_head=True)
            config = own(self.method.name, self.settings)
            hook = self.method.hook(Start(model, self.pattern, self.sparsity, config, rewound))
            figures = self.setup.learn(model, tokenizer, hook, self.job, train, progress)
            after = self.method.rewinds == "after" and self.rewind is not None
            keeps = hook.keeps() if after else {}
            hook.fold()
            if after:
                model, tokenizer = fresh_classifier(self.rewind, spec, seed, device)
                _apply(model, keeps)
        model = model.cpu().eval()
        return model, tokenizer, figures, self._rounded(model, tokenizer, progress) if self.method.rounds else None

    def _rounded(self, model, tokenizer, progress: Progress) -> dict[str, np.ndarray]:
        """The scales of int8, after the model is rounded to it on the task's training texts."""
        examples, length, seed = self.setup.examples, self.setup.spec.max_length, self.settings.seed
        texts = draw(model, tokenizer, examples, self.tokens, length, seed)
        return quantize(model, texts.batches, lambda done, total: progress(done, total, "round to int8"))


def own(name: str, subnet: SubnetConfig) -> TrainedConfig:
    """The flags of one method, taken from the flags of all methods."""
    config = TRAINED[name].config
    return config(**{field: getattr(subnet, field) for field in config.model_fields})


def _weights(wanted: str | None, source: Path) -> Path:
    """The directory that --start or --rewind means."""
    if wanted is None:
        return source
    if wanted != "pretrained":
        return checkpoint.resolve(wanted)
    return encoder_of(source, fix="give its DIR")


def _require_alike(start: Path, rewind: Path, during: bool) -> None:
    """InputError unless the encoder's linears have the same names and shapes in both. during: the run itself goes back,
    so the rest of the encoder must too.
    """
    mine, other = (_shapes(directory, whole=during) for directory in (start, rewind))
    for name in mine | other:
        if mine.get(name) != other.get(name):
            raise InputError(
                f"weights to rewind to must have the shapes of {start}: {name} is {mine.get(name, 'absent')} there and "
                f"{other.get(name, 'absent')} in {rewind}",
                fix="name another --rewind or --start",
            )


def _shapes(directory: Path, *, whole: bool) -> dict[str, list[int]]:
    """The shapes of the weights of the encoder's linears, or of the whole encoder, by full name."""
    model = checkpoint.shapes(directory)
    linears = {f"{name}.weight" for name in encoder_linears(model)}
    inside = f"{model.base_model_prefix}."
    return {n: list(p.shape) for n, p in model.named_parameters() if n in linears or (whole and n.startswith(inside))}


@torch.no_grad()
def _apply(model, keeps: dict[str, torch.Tensor]) -> None:
    """Sets to zero what the masks do not keep. The classifier, which is usually a new one, stays dense."""
    linears = encoder_linears(model) | head_linears(model, classifier=False)
    for name, linear in linears.items():
        if name in keeps:
            linear.weight[~keeps[name].to(linear.weight.device)] = 0.0
