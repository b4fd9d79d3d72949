"""What an out-of-distribution test says beside its accuracy."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from sparsebert import data
from sparsebert.data import Examples, Task
from sparsebert.errors import InputError
from sparsebert.robustness import statistics


def tests_of(task: Task, wanted: str) -> list[str]:
    """The out-of-distribution tests that `wanted` names, with commas; "all": those of the task. InputError for one that
    is not the task's.
    """
    names = list(task.ood) if wanted == "all" else [name.strip() for name in wanted.split(",") if name.strip()]
    if not names or set(names) - set(task.ood):
        known = f"one of {', '.join(task.ood)}, or all" if task.ood else f"left out: {task.name} has none"
        raise InputError(f"ood must be {known}, got {wanted!r}", fix="correct --ood")
    return names


def figures(name: str, examples: Examples, logits: np.ndarray) -> dict:
    """The figures of `logits` [n, labels] on the test `name`; fractions, intervals 95 %.

    Always n, accuracy and accuracy_ci. HANS: recall of both classes (entailment, non_entailment), by heuristic too; a
    three-way prediction is entailment or not by its arg-max [Liu et al. 2022], and under "summed" by whether neutral
    and contradiction together are the likelier. Paraphrase: F1 of class 1 (f1, the paper's code) and weighted by class
    (f1_weighted, its text), and the share predicted positive: a model that never says so has 72 % of PAWS-QQP right.
    """
    spec = data.get_task(name)
    predicted = two_way(logits, len(spec.labels))
    found = {"n": len(examples), **_accuracy(predicted, examples.labels)}
    if spec.labels == data.ENTAILMENT:
        found |= _by_class(predicted, examples.labels)
        if examples.groups is not None:
            groups = np.array(examples.groups)
            found["by_heuristic"] = {
                str(group): {"n": int((groups == group).sum())}
                | _by_class(predicted[groups == group], examples.labels[groups == group])
                for group in dict.fromkeys(examples.groups)
            }
        if logits.shape[1] == 3:
            summed = (softmax(logits.astype(np.float64), axis=1)[:, 0] <= 0.5).astype(np.int64)
            found["summed"] = _accuracy(summed, examples.labels) | _by_class(summed, examples.labels)
    if spec.metric == "f1":
        found |= f1(predicted, examples.labels)
        found["predicted_positive"] = float((predicted == 1).mean())
    return found


def two_way(logits: np.ndarray, labels: int) -> np.ndarray:
    """Arg-max predictions, int64 [n]; of a three-way model asked about two, the last two classes become class 1."""
    predicted = logits.argmax(axis=1)
    return predicted if logits.shape[1] == labels else np.minimum(predicted, 1)


def f1(predicted: np.ndarray, labels: np.ndarray) -> dict:
    """F1 in both senses, with bootstrap intervals."""
    positive, weighted = statistics.f1_scores(predicted, labels)
    positive_ci, weighted_ci = statistics.f1_intervals(predicted, labels)
    return {"f1": positive, "f1_ci": positive_ci, "f1_weighted": weighted, "f1_weighted_ci": weighted_ci}


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict:
    right = int((predicted == labels).sum())
    return {"accuracy": right / len(labels), "accuracy_ci": statistics.wilson(right, len(labels))}


def _by_class(predicted: np.ndarray, labels: np.ndarray) -> dict:
    found = {}
    for label, name in enumerate(("entailment", "non_entailment")):
        of_class = predicted[labels == label]
        if len(of_class):  # a subset may have none
            right = int((of_class == label).sum())
            found |= {name: right / len(of_class), f"{name}_ci": statistics.wilson(right, len(of_class))}
    return found
