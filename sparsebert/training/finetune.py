"""Fine-tuning a sequence classifier."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparsebert import checkpoint, data
from sparsebert.config import TaskConfig, TrainConfig
from sparsebert.encoders import Progress, encoder_linears, no_progress, task_for
from sparsebert.errors import InputError, SparsebertWarning
from sparsebert.jobs import Job
from sparsebert.machine import at_work_on
from sparsebert.training.imp import FixedZeros
from sparsebert.training.loop import Hook, TrainingLoop
from sparsebert.training.setup import TrainingSetup, fresh_classifier, read_by, task_recipe

PRUNED_FROM = 0.01  # share of zeros from which a model counts as pruned by whatever tool; dense ones have next to none


@dataclass(frozen=True)
class TrainResult:
    """Figures of a training run. steps: optimizer steps in total; resumed_from: how many of them an earlier call had
    done (all, if the directory was already finished). loss: mean over the last 50 steps. seconds: of the call that
    finished it. chosen: the step whose weights were kept, and held_out their score, if the best weights were kept.
    bias: the accuracy of the bias model on the training examples, and its mean probability of their labels, if the loss
    needs one. max_length: max tokens per text; cut: the share of the training texts that have more. rows: rows read
    from the user's own files (data.rows_read). left_out: number of training examples that are also in a reported split
    (data.training).
    """

    directory: Path
    weights_sha256: str
    steps: int
    resumed_from: int
    loss: float
    precision: str
    seconds: float
    chosen: int | None = None
    held_out: float | None = None
    bias: dict | None = None
    max_length: int | None = None
    cut: float | None = None
    rows: dict | None = None
    left_out: int = 0

    def as_json(self) -> dict:
        return {**asdict(self), "directory": str(self.directory)}


def train(
    model: str | Path,
    task: str | TaskConfig,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> TrainResult:
    """Fine-tunes `model` (a directory or `minilm`) on the training split of `task`, adversarially if the config says
    so, and saves it in `output`. The zeros of a pruned model stay zeros, whatever tool pruned it.

    A repeated call returns at once if `output` is finished. Otherwise it continues from the last snapshot in
    `<output>.partial`. Files in either place that come from other settings, data or code are refused, unless
    `overwrite`. Raises InputError for a task without a training split, for a loss without the models it needs, and for
    a run that diverges (its last snapshot is kept); UnsupportedError for a GPU that cannot be used or has too little
    memory; OutputError for refused files and when writing fails; DataError and
    CheckpointError when reading fails.
    """
    start = time.perf_counter()
    config = config or TrainConfig()
    source = checkpoint.resolve(model)
    spec = task_for(task, source)
    read = read_by(spec, source, config.bias, config.teacher)
    target = checkpoint.check_output(output, sources=read, overwrite=overwrite)
    aside = {
        share: checkpoint.check_output(target.with_name(f"{target.name}-at-{share:g}"), overwrite=overwrite)
        for share in shares(config.keep)
    }
    setup = TrainingSetup.of(spec, config, source)
    job = Job("train", setup.inputs, __name__, target, overwrite=overwrite, space=setup.space)
    if (figures := checkpoint.finished(job)) is not None:
        read = {"rows": data.rows_read(spec), "left_out": setup.examples.left_out}  # as read by this call
        return TrainResult(directory=target, resumed_from=figures["steps"], **figures | read)
    for directory in aside.values():
        checkpoint.finished(job, directory)  # raises if it must not be replaced

    with job, at_work_on(setup.device):
        classifier, tokenizer = fresh_classifier(source, setup.spec, config.seed, setup.device)
        recipe = {
            "command": "train", **checkpoint.made_from(model, setup.inputs["model"]), **task_recipe(spec),
            "data_sha256": setup.inputs["data"], **config.model_dump(),
        }  # fmt: skip
        # The config of a model that was pruned here says so, and it still is after training.
        summary = {**(getattr(classifier.config, "sparsebert", None) or {}), "max_length": setup.spec.max_length}
        zeros = _share_of_zeros(classifier)
        pruned = "sparsity" in summary or zeros >= PRUNED_FROM
        if pruned and "sparsity" not in summary:
            said = f"{source} has {zeros:.1%} zeros in the encoder's linears: they stay zeros"
            warnings.warn(said, SparsebertWarning, stacklevel=2)

        def save(directory: Path, figures: dict) -> str:
            # From the CPU, so that the golden logits are the CPU's.
            try:
                return checkpoint.save(
                    classifier.cpu(), tokenizer, directory, recipe=recipe, job=job, figures=figures, summary=summary
                )
            finally:
                classifier.to(setup.device)

        def save_aside(run: TrainingLoop) -> None:
            for share, directory in aside.items():
                if run.step == max(1, round(share * run.total_steps)):
                    save(directory, {"steps": run.step})

        hook = FixedZeros(classifier) if pruned else Hook()
        figures = setup.learn(classifier, tokenizer, hook, job, train, progress, save_aside)
        resumed_from = figures.pop("resumed_from")
        figures["seconds"] = time.perf_counter() - start
        sha256 = save(target, figures)
        job.finish()
    return TrainResult(directory=target, weights_sha256=sha256, resumed_from=resumed_from, **figures)


def _share_of_zeros(model) -> float:
    """Of the weights of the encoder's linears."""
    weights = [module.weight for module in encoder_linears(model).values()]
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


def shares(text: str) -> list[float]:
    """The shares that `--keep` names, each above 0 and below 1."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if not all(0 < share < 1 for share in found):
        raise InputError(f"keep must be comma-separated shares above 0 and below 1, got {text!r}", fix="write 0.25,0.5")
    return found
