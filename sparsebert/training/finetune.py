"""One resumable, seeded fine-tuning loop for a sequence classifier.

Everything random in step k follows from (seed, k), so that a run that was killed and resumed ends in the same weights
as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from sparsebert import checkpoint, data, encoders, ledger
from sparsebert.config import TrainConfig
from sparsebert.encoders import Progress, bucketed, collate, no_progress, token_limit, tokenize
from sparsebert.errors import InputError, OutputError, first_line
from sparsebert.machine import bf16_is_fast
from sparsebert.training import adversarial

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SLOTS = ("exp_avg", "exp_avg_sq")  # what an optimizer keeps of a parameter beside its step count
STEPS_PER_SNAPSHOT = 100  # a kill loses fewer steps than this; writing one costs about a step's time


@dataclass(frozen=True)
class TrainResult:
    """steps: optimizer steps in all; resumed_from: how many of them an earlier run had done (all, where the directory
    was already finished);
    loss: mean over the last 50 steps; seconds: of the run that finished it.
    """

    directory: Path
    weights_sha256: str
    steps: int
    resumed_from: int
    loss: float
    precision: str
    seconds: float

    def as_json(self) -> dict:
        return {**asdict(self), "directory": str(self.directory)}


def train(
    model: str | Path,
    task: str,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> TrainResult:
    """Fine-tunes `model` (a directory or `minilm`) on the training split of `task` by cross-entropy, adversarially
    where the config says so, and saves it in `output`.

    The same call again returns at once where `output` is finished, else resumes from the last snapshot,
    `<output>.partial.safetensors`; it starts anew when model, data, config or this code changed. Raises InputError for
    a task without a training split and for a run that diverges; DataError, CheckpointError and OutputError from
    reading and writing.
    """
    start = time.perf_counter()
    config = config or TrainConfig()
    spec = data.get_task(task)
    if spec.train is None:
        raise InputError(f"task {task!r} has no training split", fix="choose another --task")
    source = checkpoint.resolve(model)
    target = checkpoint.check_output(output, source=source)
    examples, _ = data.hold_out(data.load(spec, spec.train), config.hold_out)
    examples = examples.sample(config.n, config.seed)
    inputs = {
        "source": checkpoint.source_sha256(source),
        "data": examples.sha256,
        "labels": spec.labels,
        "max_length": spec.max_length,
        "config": config.model_dump(),
    }
    key = ledger.unit_key("train", inputs, sys.modules[__name__], adversarial, encoders)
    if (figures := checkpoint.finished(target, key)) is not None:
        return TrainResult(directory=target, resumed_from=figures["steps"], **figures)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier, tokenizer = checkpoint.load(source, num_labels=len(spec.labels))
        classifier.config.id2label = dict(enumerate(spec.labels))
        classifier.config.label2id = {label: i for i, label in enumerate(spec.labels)}
        encoded = tokenize(tokenizer, examples, token_limit(classifier.config, spec.max_length))
        labels = torch.from_numpy(examples.labels)
        plan = _plan(encoded, config)
        run = Run(classifier, config, len(plan), target.with_name(f"{target.name}.partial.safetensors"), key)
        resumed_from = run.step
        for step in range(run.step, len(plan)):
            rows = plan[step]
            torch.manual_seed(_mix(config.seed, step))
            run.advance(collate(tokenizer, encoded, rows), labels[rows])
            progress(step + 1, len(plan))

    recipe = {"command": "train", "model": str(model), "task": task, **config.model_dump()}
    figures = {
        "steps": len(plan),
        "loss": float(np.mean(run.losses[-50:])),
        "precision": run.precision,
        "seconds": time.perf_counter() - start,
    }
    sha256 = checkpoint.save(
        classifier, tokenizer, target, recipe=recipe, key=key, figures=figures, summary={"max_length": spec.max_length}
    )
    run.discard()
    return TrainResult(directory=target, weights_sha256=sha256, resumed_from=resumed_from, **figures)


def train_recipe(
    model: str | Path, task: str, output: str | Path, recipe: str | Path, *, progress: Progress = no_progress
) -> dict[str, TrainResult]:
    """Fine-tunes every model of a recipe into `output`/<name>, in order; resumes as `train` does.

    recipe: a YAML file with `models` (name -> fields of TrainConfig) and `common` fields, or the name of a packaged
    one. Raises InputError for one that does not hold that.
    """
    configs = read_recipe(recipe)
    results = {}
    for name, config in configs.items():

        def update(done: int, total: int, what: str = "", name=name) -> None:
            progress(done, total, name)

        results[name] = train(model, task, Path(output) / name, config, progress=update)
    return results


def read_recipe(recipe: str | Path) -> dict[str, TrainConfig]:
    """The configurations of a recipe file, or of the packaged one of that name."""
    packaged = resources.files("sparsebert") / "assets" / "recipes" / f"{recipe}.yaml"
    path = Path(str(packaged)) if packaged.is_file() else Path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"recipe {recipe} must be a YAML file: {first_line(error)}", fix="correct --recipe") from error
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise InputError(f"recipe {path} must map `models` to names and settings", fix="see recipe quick-soup")
    configs = {}
    for name, fields in content["models"].items():
        if not isinstance(fields, dict) or not re.fullmatch(r"[\w.-]+", str(name)):
            raise InputError(f"recipe {path}: model {name!r} must be a plain name with settings", fix="correct it")
        try:
            configs[str(name)] = TrainConfig(**{**(content.get("common") or {}), **fields})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"recipe {path}: {name}: {where}: {first['msg']}", fix="correct the recipe") from error
    return configs


def _plan(encoded: list[dict], config: TrainConfig) -> list[np.ndarray]:
    """The rows of every step, in order."""
    steps_per_epoch = -(-len(encoded) // config.batch_size)
    total = max(1, round(config.epochs * steps_per_epoch))
    plan: list[np.ndarray] = []
    epoch = 0
    while len(plan) < total:
        plan += bucketed(encoded, config.batch_size, np.random.default_rng((config.seed, epoch)))
        epoch += 1
    return plan[:total]


def _mix(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])


class Run:
    """Model, optimizer and step count, with the snapshots they can be rebuilt from."""

    def __init__(self, model: nn.Module, config: TrainConfig, total_steps: int, snapshot: Path, key: str):
        self.model, self.config, self.total_steps, self.key = model, config, total_steps, key
        self.snapshot = snapshot
        self.precision = config.precision if config.precision != "auto" else "bf16" if bf16_is_fast() else "fp32"
        self.step, self.losses = 0, []
        self.parameters = dict(model.named_parameters())
        adversarial.freeze(model, config)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2]
        rest = [p for p in trained if p.ndim < 2]
        # fused: one pass over the parameters; unfused, the optimizer is a third of a MiniLM step on two cores.
        self.optimizer = OPTIMIZERS[config.optimizer](
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            fused=True,
        )
        self._restore()
        model.train()

    def advance(self, batch: dict[str, torch.Tensor], labels: torch.Tensor, *, snapshots: bool = True) -> None:
        """One optimizer step, and a snapshot when one is due."""
        loss = adversarial.backward(self.model, batch, labels, self.config, bf16=self.precision == "bf16")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=True)
        if not (math.isfinite(loss) and norm.isfinite()):
            raise InputError(f"training diverged at step {self.step + 1}: loss {loss}", fix="lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.step += 1
        if snapshots and self.step % STEPS_PER_SNAPSHOT == 0 and self.step < self.total_steps:
            self._save()

    def discard(self) -> None:
        """Removes the snapshot: the finished model has taken its place."""
        self.snapshot.unlink(missing_ok=True)

    def _schedule(self) -> float:
        """Share of the peak learning rate in the coming step: linear up, then linear down to 0."""
        warmup = max(1, round(self.config.warmup * self.total_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return max(0.0, (self.total_steps - self.step) / max(1, self.total_steps - warmup))

    def _save(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{slot}/{name}": value for slot, value in self.optimizer.state[p].items() if slot in SLOTS}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        fresh = self.snapshot.with_name(f".{self.snapshot.name}.tmp-{os.getpid()}")
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, fresh, metadata={"key": self.key, "step": str(self.step)})
            descriptor = os.open(fresh, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(fresh, self.snapshot)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"snapshot {self.snapshot} cannot be written: {error}", fix="free space") from error
        finally:
            fresh.unlink(missing_ok=True)

    def _restore(self) -> None:
        from safetensors import SafetensorError, safe_open

        if not self.snapshot.exists():
            return
        try:
            with safe_open(self.snapshot, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("key") != self.key:
                    return  # of another run: the next snapshot takes its place
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except SafetensorError:
            return  # cut short by a power loss: start anew
        self.step = int(metadata["step"])
        self.losses = tensors["losses"].tolist()
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"weight/{name}"])
                slots = {slot: tensors[f"{slot}/{name}"] for slot in SLOTS if f"{slot}/{name}" in tensors}
                if slots:
                    self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **slots}
