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
from sparsebert.training.setup import TrainingSetup, fresh_classifier, head_for, origin


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
    start = origin(source)
    if start == source and checkpoint.read_manifest(source) is not None:
        raise InputError(
            f"the encoder that {source} was fine-tuned from is not known or no longer there", fix="give its DIR"
        )
    return start


@torch.no_grad()
def _apply(model, keeps: dict[str, torch.Tensor]) -> None:
    """Sets to zero what the masks do not keep. The classifier, which is usually a new one, stays dense."""
    linears = encoder_linears(model) | head_linears(model, classifier=False)
    for name, linear in linears.items():
        if name in keeps:
            linear.weight[~keeps[name].to(linear.weight.device)] = 0.0
