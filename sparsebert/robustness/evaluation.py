"""Accuracy with an interval, and the paired comparison with the dense model on the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data
from sparsebert.data import Examples, Task
from sparsebert.encoders import Progress, no_progress, predict
from sparsebert.errors import InputError
from sparsebert.robustness import statistics
from sparsebert.robustness.statistics import Interval


@dataclass(frozen=True)
class Evaluation:
    """Figures over n examples; intervals are 95 %. Fractions, not percent. The fields after f1 compare with a dense
    model, else None.

    kl_to_dense: mean KL(dense ‖ this) in nats. agreement: share of equal predictions. difference: accuracy minus the
    dense model's, paired.
    f1: of class 1, for tasks whose metric it is.
    """

    task: str
    split: str
    n: int
    accuracy: float
    accuracy_ci: Interval
    f1: float | None = None
    kl_to_dense: float | None = None
    kl_ci: Interval | None = None
    agreement: float | None = None
    difference: float | None = None
    difference_ci: Interval | None = None
    mcnemar_p: float | None = None


def evaluate(
    model: str | Path,
    task: str,
    *,
    vs: str | Path | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates the classifier in directory `model` on the reported split of `task`, paired with the one in `vs` where
    given.

    n: a seeded random subset of that many examples. Raises InputError where a model's labels do not fit the task.
    """
    spec = data.get_task(task)
    examples = data.load(spec, spec.test, limit=n, seed=seed)
    directories = [model] if vs is None else [model, vs]
    classifiers = [checkpoint.load(directory) for directory in directories]
    for classifier, _ in classifiers:
        _require_labels(spec, classifier.config.num_labels)
    total = len(directories) * len(examples)
    logits = []
    for classifier, tokenizer in classifiers:
        before = len(logits) * len(examples)
        logits.append(
            predict(
                classifier,
                tokenizer,
                examples,
                max_length=spec.max_length,
                progress=lambda done, _, before=before: progress(before + done, total),
            )
        )
    return compare(spec, examples, logits[0], logits[1] if vs is not None else None)


def compare(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray | None = None) -> Evaluation:
    """The figures of `logits` [n, labels] on `examples`, paired with those of the dense model where given."""
    predicted = _predictions(task, logits)
    correct = predicted == examples.labels
    figures: dict = {}
    if task.metric == "f1":
        figures["f1"] = _f1(predicted, examples.labels)
    if dense is not None:
        if dense.shape != logits.shape:
            raise InputError(
                f"both models must have the same labels, got {logits.shape[1]} and {dense.shape[1]}",
                fix="compare models of one task",
            )
        dense_predicted = _predictions(task, dense)
        dense_correct = dense_predicted == examples.labels
        kl = statistics.kl_divergence(dense, logits)
        change = correct.astype(np.float64) - dense_correct
        figures |= {
            "kl_to_dense": float(kl.mean()),
            "kl_ci": statistics.bootstrap_mean(kl),
            "agreement": float((predicted == dense_predicted).mean()),
            "difference": float(change.mean()),
            "difference_ci": statistics.paired_difference(correct, dense_correct),
            "mcnemar_p": statistics.mcnemar(correct, dense_correct),
        }
    n = len(examples)
    return Evaluation(
        task.name, examples.split, n, float(correct.mean()), statistics.wilson(int(correct.sum()), n), **figures
    )


def _require_labels(task: Task, labels: int) -> None:
    if labels != len(task.labels) and not (task.three_way and labels == 3):
        raise InputError(
            f"task {task.name!r} has {len(task.labels)} labels, the model has {labels}",
            fix="choose a model trained for it",
        )


def _predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    _require_labels(task, logits.shape[1])
    predicted = logits.argmax(axis=1)
    # Of a three-way model entailment stays, neutral and contradiction become class 1.
    return predicted if logits.shape[1] == len(task.labels) else np.minimum(predicted, 1)


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    hits = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * hits / max(1.0, float((predicted == 1).sum() + (labels == 1).sum()))
