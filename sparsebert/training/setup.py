"""The setup of a training run: its examples, the models that its loss needs, and the run itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sparsebert import checkpoint, data, heads
from sparsebert.config import LearnConfig, TaskConfig, TrainConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import (
    Progress,
    autocast,
    collate,
    cut_share,
    head_linears,
    limited,
    predict,
    set_labels,
    token_limit,
    tokenize,
)
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import DataError, InputError, SparsebertWarning, UnsupportedError
from sparsebert.jobs import Job
from sparsebert.machine import device_for, kind_of
from sparsebert.training import bias
from sparsebert.training.imp import LossesWhilePruned
from sparsebert.training.loop import (
    STEPS_PER_SNAPSHOT,
    Hook,
    TrainingLoop,
    batch_rows,
    precision_of,
    seed_of,
    step_count,
)
from sparsebert.training.losses import LOSSES, Targets, difficulty, smoothed

# (start, task, output, config): fine-tunes a teacher by cross-entropy. It is `finetune.train`, whose module
# imports this one.
Train = Callable[..., object]


@dataclass(frozen=True)
class TrainingSetup:
    """The setup of a run. examples: to train on. held_out: to choose on. origin: the pretrained encoder that the run
    descends from; bias models and teachers are made from it, if the loss needs them. fine_tuning_lr: peak learning rate
    of these. teacher: its directory; None: if the loss needs a teacher, it is trained first. inputs: all that decides
    the result, for `Job`. space: about how many bytes the run will write. device: what it runs on.
    """

    spec: Task
    config: LearnConfig
    examples: Examples
    held_out: Examples
    origin: Path
    fine_tuning_lr: float
    teacher: Path | None
    inputs: dict
    space: int
    device: torch.device

    @classmethod
    def of(
        cls,
        spec: Task,
        config: LearnConfig,
        source: Path,
        *,
        default_lr: Callable[[int], float] | None = None,
        settings: dict | None = None,
    ) -> TrainingSetup:
        """Reads the examples and checks what the loss needs. default_lr: the learning rate for a number of steps, if
        the config has none. settings: further flags that decide the result; they replace flags of the config with the
        same name. Raises InputError if something is missing or does not match, and UnsupportedError if the config names
        a device that cannot be used.
        """
        device, needs = device_for(config.device), LOSSES[config.loss]
        spec = limited(spec, checkpoint.load_config(source), config.max_length)
        examples, held_out = examples_of(spec, config)
        # The default of a method may be that of its scores, at which a whole model may diverge.
        fine_tuning_lr = TrainConfig().lr if config.lr is None else config.lr
        if config.lr is None:
            config = config.model_copy(update={"lr": default_lr(step_count(len(examples), config))})
        start = origin(source) if needs.bias or needs.teacher else source
        if needs.bias and (spec.bias if config.bias == "auto" else config.bias) == "weak":
            encoder_of(source, fix="name a classifier that saw none of the examples: --bias DIR")
        if needs.teacher and config.teacher is None:
            encoder_of(source, fix="name a teacher: --teacher DIR")
        if needs.difficulty:
            encoder_of(source, fix="fine-tune its encoder by sparsebert train, and use that model")
        # Paths are replaced by hashes of their content, here or below.
        settings = {**config.model_dump(), "precision": precision_of(config, device), **(settings or {})}
        settings["device"] = kind_of(device)
        del settings["max_length"]  # in the inputs it is the task's, also if none was given
        inputs = {
            "model": checkpoint.source_sha256(source),
            "data": examples.sha256,
            "labels": list(spec.labels),
            "problem": spec.problem,
            "max_length": spec.max_length,
            "settings": settings,
        }
        if config.select == "best":
            inputs["held_out"] = held_out.sha256
        if start != source:
            inputs["pretrained"] = checkpoint.source_sha256(start)
        if fine_tuning_lr != config.lr and (needs.difficulty or (needs.teacher and config.teacher is None)):
            inputs["fine_tuning_lr"] = fine_tuning_lr
        if needs.bias:
            settings["bias"] = bias.content(config.bias, spec)
        teacher = None
        if config.teacher is not None:
            teacher = _given_teacher(spec, config.teacher)
            settings["teacher"] = checkpoint.source_sha256(teacher)
        weights = checkpoint.saved_bytes(source)
        snapshots = step_count(len(examples), config) > STEPS_PER_SNAPSHOT
        space = weights * (7 if snapshots else 1) * (2 if needs.difficulty else 1)
        return cls(spec, config, examples, held_out, start, fine_tuning_lr, teacher, inputs, space, device)

    def learn(
        self,
        model,
        tokenizer,
        hook: Hook,
        job: Job,
        train: Train,
        progress: Progress,
        after_step: Callable[[TrainingLoop], None] = lambda run: None,
    ) -> dict:
        """Trains every parameter with requires_grad, from the last snapshot if there is one, and returns figures of the
        run. If the loss needs a teacher and none is given, `train` first makes one in <output>.teacher.
        """
        config = self.config
        encoded = tokenize(tokenizer, self.examples, self.spec.max_length)
        teacher = self.teacher
        if teacher is None and LOSSES[config.loss].teacher:
            teacher = self._train_teacher(job, train, progress)
        targets, figures = self._targets(teacher, job, progress)
        steps = batch_rows(encoded, config)

        def score() -> float:
            with autocast(run.precision == "bf16", model.device):
                logits = predict(model, tokenizer, self.held_out, max_length=self.spec.max_length)
            return heads.PROBLEMS[self.spec.problem].metric(logits, self.held_out.labels)

        run = TrainingLoop(model, config, len(steps), job, hook=hook, score=score if config.select == "best" else None)
        figures |= {
            "max_length": self.spec.max_length,
            "cut": cut_share(tokenizer, self.examples, encoded, self.spec.max_length),
            "rows": data.rows_read(self.spec),
            "left_out": self.examples.left_out,
            "resumed_from": run.step,
        }
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
        return figures

    def _targets(self, teacher: Path | None, job: Job, progress: Progress) -> tuple[Targets, dict]:
        """The targets of the examples, and figures of the bias model."""
        needs, spec, config = LOSSES[self.config.loss], self.spec, self.config
        labels = torch.from_numpy(self.examples.labels)
        log_bias = log_teacher = None
        figures = {}
        if needs.bias:
            model, tokenizer = fresh_classifier(self.origin, spec, config.seed, self.device)

            def weak(examples: Examples, number: int):
                return self._weak(examples, number, progress)

            found = bias.predictions(config.bias, spec, self.examples, model, tokenizer, weak, config.seed)
            log_bias = torch.from_numpy(found)
            figures["bias"] = bias.summary(log_bias, labels)
        if teacher is not None:
            asked = Classifier.load(teacher, config.device)
            logits = asked.predict(
                self.examples, max_length=spec.max_length,
                progress=lambda done, total: progress(done, total, "ask the teacher"),
            )[:, heads.columns(asked.names, spec.labels, str(teacher))]  # fmt: skip
            log_teacher = torch.from_numpy(logits).log_softmax(1)
            if needs.difficulty:
                log_teacher = smoothed(log_teacher, self._difficulty(job, progress))
        return Targets(labels, log_bias, log_teacher, heads.PROBLEMS[spec.problem]), figures

    def _difficulty(self, job: Job, progress: Progress) -> torch.Tensor:
        """The difficulty of the examples, by the losses of models of the pretrained encoder that are pruned in a run as
        long as this one. float32 [n].
        """
        if (kept := job.kept("difficulty")) is not None:
            return kept[0]["difficulty"]
        settings = self.config.model_copy(update={"loss": "ce", "adversarial": "none", "lr": self.fine_tuning_lr})
        model, tokenizer = fresh_classifier(self.origin, self.spec, settings.seed, self.device)
        encoded = tokenize(tokenizer, self.examples, self.spec.max_length)
        labels = torch.from_numpy(self.examples.labels)

        def measure() -> torch.Tensor:
            with autocast(run.precision == "bf16", model.device):
                logits = predict(model, tokenizer, self.examples, max_length=self.spec.max_length)
            model.train()
            return cross_entropy(torch.from_numpy(logits), labels, reduction="none")

        hook, steps = LossesWhilePruned(model, measure, warmup=settings.warmup), batch_rows(encoded, settings)
        if len(steps) < hook.levels:
            raise InputError(f"loss rmc needs at least {hook.levels} steps, got {len(steps)}", fix="raise --epochs")
        run = TrainingLoop(model, settings, len(steps), job, hook=hook, part="difficulty-run")
        for step in range(run.step, len(steps)):
            torch.manual_seed(seed_of(settings.seed, step))
            run.advance(collate(tokenizer, encoded, steps[step]), Targets(labels[torch.from_numpy(steps[step])]))
            progress(step + 1, len(steps), "find easy examples")
        run.finish()
        found = difficulty(torch.stack(list(hook.losses.values())), self.config.difficulty_floor)
        job.keep("difficulty", {"difficulty": found}, last="difficulty of the examples")
        return found

    def _weak(self, examples: Examples, number: int, progress: Progress):
        """The pretrained encoder after one epoch of cross-entropy on a few examples."""
        settings = TrainConfig(epochs=1, seed=(self.config.seed + number) % 2**63, precision=self.config.precision)
        model, tokenizer = fresh_classifier(self.origin, self.spec, settings.seed, self.device)
        encoded = tokenize(tokenizer, examples, token_limit(model.config, self.spec.max_length))
        targets, steps = Targets(torch.from_numpy(examples.labels)), batch_rows(encoded, settings)
        run = TrainingLoop(model, settings, len(steps))
        for step, rows in enumerate(steps):
            torch.manual_seed(seed_of(settings.seed, step))
            run.advance(collate(tokenizer, encoded, rows), targets[torch.from_numpy(rows)])
            progress(step + 1, len(steps), f"weak learner {number + 1} of 2")
        return model

    def _train_teacher(self, job: Job, train: Train, progress: Progress) -> Path:
        kept = LearnConfig.model_fields.keys() - {"loss", "bias", "teacher", "adversarial", "difficulty_floor", "lr"}
        same = {name: getattr(self.config, name) for name in kept if getattr(self.config, name) is not None}
        same["lr"] = self.fine_tuning_lr
        teacher = job.output.with_name(f"{job.output.name}.teacher")
        train(
            self.origin, named_again(self.spec), teacher, TrainConfig(**same), overwrite=job.overwrite,
            progress=lambda done, total, what="": progress(done, total, "teacher"),
        )  # fmt: skip
        return teacher


def examples_of(spec: Task, config: LearnConfig) -> tuple[Examples, Examples]:
    """(examples to train on, held-out examples to choose on). InputError if the task and the config do not fit, before
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
            f"loss {config.loss} needs a bias model, and task {spec.name!r} has no default one",
            fix="name one: --bias weak",
        )
    whole = data.training(spec)
    _require_classes(spec, whole)
    examples, held_out = data.hold_out(whole, config.hold_out)
    examples = examples.sample(config.n, config.seed)
    return data.mix_ood(spec, examples) if config.mix_ood else examples, held_out


def _require_classes(spec: Task, examples: Examples) -> None:
    """DataError for a class without training examples, and for a task of one class."""
    if spec.problem != "single_label":
        return
    empty = sorted(set(range(len(spec.labels))) - set(examples.labels.tolist()))
    if empty or len(spec.labels) < 2:
        what = f"none has {spec.labels[empty[0]]!r}" if empty else f"all have {spec.labels[0]!r}"
        raise DataError(
            f"task {spec.name!r}: the training examples must have at least two labels, and each of them, {what}",
            fix="add examples, or number the classes 0, 1, … without gaps",
        )


def fresh_classifier(source: Path, spec: Task, seed: int, device: torch.device, *, own_head: bool = False):
    """(classifier, tokenizer) of a directory for the labels of a task, its outputs in their order, on a device. The
    directory's head is kept if its labels are the task's by name. Else a new head is drawn from the seed, with a
    warning if the directory has a head. own_head: refuse a head of other labels, with InputError.
    """
    torch.manual_seed(seed)
    found = head_for(source, spec, own_head)
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
    return classifier.to(device), tokenizer


def head_for(source: Path, spec: Task, own_head: bool) -> np.ndarray | None:
    """Output of the directory's head for each label of the task; None if there is no head, or one of other labels."""
    if not checkpoint.has_head(source):
        return None
    config = checkpoint.read_config(source)
    try:
        problem, names = heads.problem_of(config), heads.label_names(config)
        if problem.name != spec.problem:
            raise InputError(
                f"{source} is a {problem.name} model, the labels of {spec.name!r} are {spec.problem}",
                fix="choose a model and a task of the same kind",
            )
        return np.arange(1) if problem is heads.ONE_LOGIT else heads.columns(names, spec.labels, str(source))
    except (InputError, UnsupportedError) as error:
        if own_head:
            raise
        warnings.warn(f"{error.problem}: a new head is drawn", SparsebertWarning, stacklevel=3)
        return None


def own_classifier(source: Path, spec: Task):
    """(classifier, tokenizer) of a fine-tuned directory, fully verified, its outputs in the order of the task's labels.
    InputError if it has other labels.
    """
    columns = head_for(source, spec, own_head=True)
    model, tokenizer = checkpoint.load(source)
    if columns is not None and not heads.are_anonymous(spec.labels):
        set_labels(model, spec.labels, columns)
    return model, tokenizer


def read_by(spec: Task, source: Path, *models: str | None) -> list[Path]:
    """The paths that a run on a task reads and must not overwrite: directories of models, the task's own folder."""
    named = [Path(model) for model in models if model is not None and Path(model).is_dir()]
    return [source, *([] if spec.folder is None else [spec.folder]), *named]


def named_again(spec: Task) -> TaskConfig:
    """What asks for the same task from any working directory."""
    name = spec.name if spec.folder is None else str(spec.folder)
    return TaskConfig(task=name, text_column=spec.text_column, label_column=spec.label_column)


def task_recipe(spec: Task) -> dict:
    """The fields of a recipe by which the task is found again; columns only if they were named."""
    return named_again(spec).model_dump(mode="json", exclude_defaults=True)


def origin(source: Path) -> Path:
    """The model that a directory descends from. CheckpointError if it no longer exists."""
    return [directory for directory, _ in checkpoint.ancestors(source)][-1]


def encoder_of(source: Path, fix: str) -> Path:
    """The pretrained encoder that a directory descends from, an `origin` without a head. InputError if there is none:
    an origin that is a classifier was fine-tuned by others, and its weights know the labels.
    """
    start = origin(source)
    if checkpoint.has_head(start):
        raise InputError(f"the encoder that {source} was fine-tuned from is not known or no longer there", fix=fix)
    return start


def _given_teacher(spec: Task, model: str) -> Path:
    teacher = checkpoint.resolve(model)
    heads.columns(heads.label_names(checkpoint.read_config(teacher)), spec.labels, f"teacher {teacher}")
    return teacher
