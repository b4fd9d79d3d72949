"""Accuracy with an interval, and the paired comparison with the dense model on the same examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsebert.data import Examples, Task
from sparsebert.errors import InputError
from sparsebert.robustness import statistics
from sparsebert.robustness.statistics import Interval


@dataclass(frozen=True)
class Evaluation:
    """Figures over n examples; intervals are 95 %. Fractions, not percent.

    f1, f1_weighted: of class 1, and the mean over classes weighted by their share of the labels; predicted_positive:
    the share of examples predicted to be of class 1. For tasks whose metric is F1, else None.
    kl_to_dense: mean KL(dense ‖ this) in nats. agreement: share of equal predictions. difference: accuracy minus the
    dense model's, paired. These and what follows from them are None without a dense model.
    engine: what computed the logits, "sparsebert" or "torch", where `evaluate` did.
    ood: the figures of `compare_ood` by the name of the test, where any was asked for.
    """

    task: str
    split: str
    n: int
    accuracy: float
    accuracy_ci: Interval
    f1: float | None = None
    f1_ci: Interval | None = None
    f1_weighted: float | None = None
    f1_weighted_ci: Interval | None = None
    predicted_positive: float | None = None
    kl_to_dense: float | None = None
    kl_ci: Interval | None = None
    agreement: float | None = None
    difference: float | None = None
    difference_ci: Interval | None = None
    mcnemar_p: float | None = None
    engine: str | None = None
    ood: dict[str, dict] | None = None


def compare(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray | None = None) -> Evaluation:
    """The figures of `logits` [n, labels] on `examples`, paired with those of the dense model where given. Raises
    InputError where labels do not fit the task, or are not the dense model's.
    """
    predicted = predictions(task, logits)
    correct = predicted == examples.labels
    figures: dict = {}
    if task.metric == "f1":
        figures |= statistics.f1_figures(predicted, examples.labels)
        figures["predicted_positive"] = float((predicted == 1).mean())
    if dense is not None:
        if dense.shape != logits.shape:
            raise InputError(
                f"both models must have the same labels, got {logits.shape[1]} and {dense.shape[1]}",
                fix="compare models of one task",
            )
        dense_predicted = predictions(task, dense)
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


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """int64 [n], the class of the largest of `logits` [n, labels]; of a three-way model on a two-way task neutral and
    contradiction are class 1.
    """
    require_labels(task, logits.shape[1])
    predicted = logits.argmax(axis=1)
    return predicted if logits.shape[1] == len(task.labels) else np.minimum(predicted, 1)


def require_labels(task: Task, labels: int) -> None:
    """InputError unless a model of so many labels can be evaluated on the task."""
    if labels != len(task.labels) and not (task.three_way and labels == 3):
        raise InputError(
            f"task {task.name!r} has {len(task.labels)} labels, the model has {labels}",
            fix="choose a model trained for it",
        )
