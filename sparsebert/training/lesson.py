"""What a run learns from and towards: its examples, the models its loss asks, and the run itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, data
from sparsebert.config import LearnConfig, TrainConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import Progress, autocast, collate, predict, token_limit, tokenize
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError
from sparsebert.training import bias
from sparsebert.training.loop import Hook, Run, plan, seed_of, step_count
from sparsebert.training.losses import LOSSES, Targets

# (start, task name, output, config, progress): fine-tunes a teacher by cross-entropy. `finetune.train`, which is above.
Train = Callable[[Path, str, Path, TrainConfig, Progress], object]


@dataclass(frozen=True)
class Lesson:
    """examples: learnt from. held_out: to choose on. origin: the pretrained encoder that the run descends from, from
    which bias models are made. inputs: all that decides the result, as JSON.
    """

    spec: Task
    config: LearnConfig
    examples: Examples
    held_out: Examples
    origin: Path
    teacher: Path | None
    target: Path
    inputs: dict

    @classmethod
    def of(
        cls,
        spec: Task,
        config: LearnConfig,
        source: Path,
        target: Path,
        train: Train,
        progress: Progress,
        *,
        default_lr: Callable[[int], float] | None = None,
        **inputs,
    ) -> Lesson:
        """Reads the examples and checks what the loss needs; a teacher that is not given is trained first, into
        <target>.teacher. default_lr: the learning rate for a number of steps, where the config names none. inputs: what
        else decides the result. Raises InputError for what is missing or does not match.
        """
        needs = LOSSES[config.loss]
        examples, held_out = examples_of(spec, config)
        if config.lr is None:
            config = config.model_copy(update={"lr": default_lr(step_count(len(examples), config))})
        start = origin(source)
        inputs = {
            "source": checkpoint.source_sha256(source),
            "data": examples.sha256,
            "labels": list(spec.labels),
            "max_length": spec.max_length,
            "config": config.model_dump(),
            **inputs,
        }
        if needs.bias:
            inputs["bias_from"] = checkpoint.source_sha256(start)
            if Path(config.bias).is_dir():
                inputs["bias_from"] = checkpoint.source_sha256(checkpoint.resolve(config.bias))
        teacher = None
        if needs.teacher:
            teacher = _teacher(spec, config, start, target, train, progress)
            inputs["teacher_from"] = checkpoint.source_sha256(teacher)
        return cls(spec, config, examples, held_out, start, teacher, target, inputs)

    def learn(
        self,
        model,
        tokenizer,
        hook: Hook,
        key: str,
        progress: Progress,
        after_step: Callable[[Run], None] = lambda run: None,
    ) -> tuple[Run, dict]:
        """Trains what asks for a gradient, from its last snapshot where there is one: (the run, its figures)."""
        config = self.config
        encoded = tokenize(tokenizer, self.examples, token_limit(model.config, self.spec.max_length))
        targets, figures = self._targets(model.device, progress)
        steps = plan(encoded, config)

        def score() -> float:
            with autocast(run.precision == "bf16", model.device):
                logits = predict(model, tokenizer, self.held_out, max_length=self.spec.max_length)
            return float((logits.argmax(1) == self.held_out.labels).mean())

        snapshot = self.target.with_name(f"{self.target.name}.partial.safetensors")
        run = Run(
            model, config, len(steps), snapshot, key,
            inputs=self.inputs, hook=hook, score=score if config.select == "best" else None,
        )  # fmt: skip
        figures["resumed_from"] = run.step
        for step in range(run.step, len(steps)):
            rows = steps[step]
            torch.manual_seed(seed_of(config.seed, step))
            run.advance(collate(tokenizer, encoded, rows), targets[torch.from_numpy(rows)])
            after_step(run)
            progress(step + 1, len(steps))
        run.finish()
        figures |= {"steps": len(steps), "loss": float(np.mean(run.losses[-50:])), "precision": run.precision}
        if run.scores:
            figures["held_out"], figures["chosen"] = max((score, -step) for step, score in run.scores)
            figures["chosen"] *= -1
        return run, figures

    def _targets(self, device: torch.device, progress: Progress) -> tuple[Targets, dict]:
        """What the examples are trained towards, and figures of the bias model."""
        needs, spec, config = LOSSES[self.config.loss], self.spec, self.config
        labels = torch.from_numpy(self.examples.labels)
        log_bias = log_teacher = None
        figures = {}
        if needs.bias:
            model, tokenizer = fresh_classifier(self.origin, spec, config.seed, device)

            def weak(examples: Examples, number: int):
                return self._weak(examples, number, device, progress)

            found = bias.predictions(config.bias, spec, self.examples, model, tokenizer, weak, config.seed)
            log_bias = torch.from_numpy(found)
            figures["bias"] = bias.summary(log_bias, labels)
        if needs.teacher:
            logits = Classifier.load(self.teacher).predict(
                self.examples, max_length=spec.max_length,
                progress=lambda done, total: progress(done, total, "ask the teacher"),
            )  # fmt: skip
            log_teacher = torch.from_numpy(logits).log_softmax(1)
        return Targets(labels, log_bias, log_teacher), figures

    def _weak(self, examples: Examples, number: int, device: torch.device, progress: Progress):
        """The pretrained encoder after one epoch of cross-entropy on a few examples."""
        settings = TrainConfig(epochs=1, seed=(self.config.seed + number) % 2**63, precision=self.config.precision)
        model, tokenizer = fresh_classifier(self.origin, self.spec, settings.seed, device)
        encoded = tokenize(tokenizer, examples, token_limit(model.config, self.spec.max_length))
        targets, steps = Targets(torch.from_numpy(examples.labels)), plan(encoded, settings)
        run = Run(model, settings, len(steps), self.target.with_name(f"{self.target.name}.weak"))
        for step, rows in enumerate(steps):
            torch.manual_seed(seed_of(settings.seed, step))
            run.advance(collate(tokenizer, encoded, rows), targets[torch.from_numpy(rows)], snapshots=False)
            progress(step + 1, len(steps), f"weak learner {number + 1} of 2")
        return model


def examples_of(spec: Task, config: LearnConfig) -> tuple[Examples, Examples]:
    """(those to learn from, those held out to choose on). InputError where the task and the config do not fit, before
    anything is read.
    """
    if spec.train is None:
        raise InputError(f"task {spec.name!r} has no training split", fix="choose another --task")
    if config.select == "best" and not config.hold_out:
        raise InputError(
            "the best weights are chosen on held-out training examples, got hold_out 0", fix="add --hold-out 1000"
        )
    needs = LOSSES[config.loss]
    if not needs.bias and config.bias != "auto":
        raise InputError(f"loss {config.loss} uses no bias model, got {config.bias!r}", fix="leave --bias out")
    if not needs.teacher and config.teacher is not None:
        raise InputError(f"loss {config.loss} uses no teacher, got {config.teacher!r}", fix="leave --teacher out")
    if needs.bias and config.bias == "auto" and spec.bias is None:
        raise InputError(
            f"loss {config.loss} needs a bias model, and task {spec.name!r} has none of its own",
            fix="name one: --bias weak",
        )
    examples, held_out = data.hold_out(data.load(spec, spec.train), config.hold_out)
    examples = examples.sample(config.n, config.seed)
    return data.mix_ood(spec, examples) if config.mix_ood else examples, held_out


def fresh_classifier(source: Path, spec: Task, seed: int, device: torch.device | None = None):
    """(classifier, tokenizer) of a directory for the labels of a task; a head it lacks is drawn from the seed. device:
    None for a GPU where torch finds one, else the CPU.
    """
    torch.manual_seed(seed)
    classifier, tokenizer = checkpoint.load(source, num_labels=len(spec.labels))
    classifier.config.id2label = dict(enumerate(spec.labels))
    classifier.config.label2id = {label: i for i, label in enumerate(spec.labels)}
    return classifier.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def origin(source: Path) -> Path:
    """The model that a directory descends from by `train` and `prune`, as far as their recipes tell and it is there."""
    while checkpoint.read_manifest(source) is not None:
        model = checkpoint.read_recipe(source).get("model")
        if model is None or (model != "minilm" and not Path(model).is_dir()):
            break
        source = checkpoint.resolve(model)
    return source


def _teacher(spec: Task, config: LearnConfig, start: Path, target: Path, train: Train, progress: Progress) -> Path:
    if config.teacher is None:
        kept = LearnConfig.model_fields.keys() - {"loss", "bias", "teacher"}
        same = {name: getattr(config, name) for name in kept if getattr(config, name) is not None}
        teacher = target.with_name(f"{target.name}.teacher")
        name = spec.name if spec.folder is None else str(spec.folder)
        train(
            start, name, teacher, TrainConfig(**same),
            progress=lambda done, total, what="": progress(done, total, "teacher"),
        )  # fmt: skip
        return teacher
    teacher = checkpoint.resolve(config.teacher)
    labels = checkpoint.shapes(teacher).config.num_labels
    if labels != len(spec.labels):
        raise InputError(
            f"teacher {teacher} must have the {len(spec.labels)} labels of {spec.name}, has {labels}",
            fix="choose one of this task",
        )
    return teacher
