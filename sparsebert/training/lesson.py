"""What a run learns from and towards: its examples, the models its loss asks, and the run itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, data, heads
from sparsebert.config import LearnConfig, TrainConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import (
    Progress,
    autocast,
    collate,
    head_linears,
    predict,
    set_labels,
    token_limit,
    tokenize,
)
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError, UnsupportedError
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
        if checkpoint.has_head(source):
            problem = heads.problem_of(checkpoint.read_config(source))
            (spec, examples), (_, held_out) = (data.as_values(spec, part, problem) for part in (examples, held_out))
        if config.lr is None:
            config = config.model_copy(update={"lr": default_lr(step_count(len(examples), config))})
        start = origin(source)
        inputs = {
            "source": checkpoint.source_sha256(source),
            "data": examples.sha256,
            "labels": list(spec.labels),
            "problem": spec.problem,
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
            return heads.PROBLEMS[self.spec.problem].metric(logits, self.held_out.labels)

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
            teacher = Classifier.load(self.teacher)
            logits = teacher.predict(
                self.examples, max_length=spec.max_length,
                progress=lambda done, total: progress(done, total, "ask the teacher"),
            )[:, heads.columns(teacher.names, spec.labels, str(self.teacher))]  # fmt: skip
            log_teacher = torch.from_numpy(logits).log_softmax(1)
        return Targets(labels, log_bias, log_teacher, heads.PROBLEMS[spec.problem]), figures

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
    if config.loss != "ce" and spec.problem != "single_label":
        raise InputError(
            f"loss {config.loss} is for one label per text, the labels of {spec.name!r} are {spec.problem}",
            fix="leave --loss out",
        )
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


def fresh_classifier(
    source: Path, spec: Task, seed: int, device: torch.device | None = None, *, own_head: bool = False
):
    """(classifier, tokenizer) of a directory for the labels of a task, its outputs in their order. A head whose labels
    are the task's by name is kept; else one is drawn from the seed, which is said where another is there. device: None
    for a GPU where torch finds one, else the CPU. own_head: refuse a head of other labels, with InputError.
    """
    torch.manual_seed(seed)
    found = _head_for(source, spec, own_head)
    names = spec.labels or ("LABEL_0",)
    classifier, tokenizer = checkpoint.load(source, num_labels=len(names))
    if found is not None:
        stored = heads.label_names(checkpoint.read_config(source))
        set_labels(classifier, stored if heads.are_anonymous(names) else names, found)
    else:
        if checkpoint.has_head(source):
            last = list(head_linears(classifier).values())[-1]
            torch.nn.init.normal_(last.weight, std=classifier.config.initializer_range)
            torch.nn.init.zeros_(last.bias)
        set_labels(classifier, names)
    classifier.config.problem_type = heads.PROBLEMS[spec.problem].config_name
    return classifier.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _head_for(source: Path, spec: Task, own_head: bool) -> np.ndarray | None:
    """Which output of the directory's head is each label of the task; None where it has no head, or another one."""
    if not checkpoint.has_head(source):
        return None
    config = checkpoint.read_config(source)
    try:
        problem, names = heads.problem_of(config), heads.label_names(config)
        if problem.name != spec.problem:
            raise InputError(
                f"{source} is a {problem.name} model, the labels of {spec.name!r} are {spec.problem}",
                fix="choose a model or a task of the other's kind",
            )
        return np.arange(1) if problem is heads.ONE_LOGIT else heads.columns(names, spec.labels, str(source))
    except (InputError, UnsupportedError) as error:
        if own_head:
            raise
        warnings.warn(f"{error.problem}: a new head is drawn", stacklevel=3)
        return None


def own_classifier(source: Path, spec: Task):
    """(classifier, tokenizer) of a fine-tuned directory, verified whole, its outputs in the order of the task's labels.
    InputError where it has other labels.
    """
    columns = _head_for(source, spec, own_head=True)
    model, tokenizer = checkpoint.load(source)
    if columns is not None and not heads.are_anonymous(spec.labels):
        set_labels(model, spec.labels, columns)
    return model, tokenizer


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
    heads.columns(heads.label_names(checkpoint.read_config(teacher)), spec.labels, f"teacher {teacher}")
    return teacher
