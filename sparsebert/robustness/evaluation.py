"""Accuracy with an interval, and the paired comparison with the dense model on the same examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data
from sparsebert.data import Examples, Task
from sparsebert.encoders import Progress, no_progress, predict
from sparsebert.engine import Engine
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.robustness import statistics
from sparsebert.robustness.ood import f1, figures, tests_of, two_way
from sparsebert.robustness.statistics import Interval

TEXTS_A_CALL = 256


@dataclass(frozen=True)
class Evaluation:
    """Figures over n examples; intervals are 95 %. Fractions, not percent. The fields after f1 compare with a dense
    model, else None.

    kl_to_dense: mean KL(dense ‖ this) in nats. agreement: share of equal predictions. difference: accuracy minus the
    dense model's, paired.
    f1, f1_weighted: of class 1 and of both by their share of the labels, for tasks whose metric it is. ood: figures of
    each out-of-distribution test that was asked for, see `robustness.ood`.
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
    kl_to_dense: float | None = None
    kl_ci: Interval | None = None
    agreement: float | None = None
    difference: float | None = None
    difference_ci: Interval | None = None
    mcnemar_p: float | None = None
    ood: dict[str, dict] | None = None


def evaluate(
    model: str | Path,
    task: str,
    *,
    vs: str | Path | None = None,
    ood: str = "",
    n: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates the classifier in directory `model` on the reported split of `task`, paired with the one in `vs` where
    given, and on out-of-distribution tests of the task: their names with commas, or "all".

    n: a seeded random subset of that many examples, of each test too. Logits are float32, by the engine where it runs
    the model, else by torch. Raises InputError where a model's labels do not fit the task.
    """
    spec = data.get_task(task)
    tests = tests_of(spec, ood) if ood else []
    sets = [data.load(part, part.test, limit=n, seed=seed) for part in (spec, *map(data.get_task, tests))]
    models = [_Model(directory, spec) for directory in ([model] if vs is None else [model, vs])]
    total, done = len(models) * sum(map(len, sets)), 0
    found: list[list[np.ndarray]] = []
    for classifier in models:
        found.append([])
        for examples in sets:
            before = done
            found[-1].append(classifier.logits(examples, lambda part, _, before=before: progress(before + part, total)))
            done += len(examples)
    dense = found[1] if vs is not None else [None] * len(sets)
    evaluation = compare(spec, sets[0], found[0][0], dense[0])
    if not tests:
        return evaluation
    results = {
        name: figures(name, examples, logits)
        | ({} if other is None else _paired(data.get_task(name), examples, logits, other))
        for name, examples, logits, other in zip(tests, sets[1:], found[0][1:], dense[1:], strict=True)
    }
    return replace(evaluation, ood=results)


class _Model:
    """A classifier in a directory, run by the engine where that can, else by torch."""

    def __init__(self, directory: str | Path, spec: Task):
        self._max_length = spec.max_length
        self._engine = self._torch = None
        try:
            self._engine = Engine.load(directory, dtype="fp32", batch_invariant=True, cached=False)
            labels = len(self._engine.labels)
        except UnsupportedError:
            self._torch = checkpoint.load(directory)
            labels = self._torch[0].config.num_labels
        _require_labels(spec, labels)

    def logits(self, examples: Examples, progress: Progress) -> np.ndarray:
        """float32 [examples, labels]."""
        if self._engine is None:
            return predict(*self._torch, examples, max_length=self._max_length, progress=progress)
        pairs = examples.texts_b is not None
        texts = list(zip(examples.texts, examples.texts_b, strict=True)) if pairs else examples.texts
        longest = min(self._max_length, self._engine.encoder.max_length)
        parts = []
        for start in range(0, len(texts), TEXTS_A_CALL):
            part = texts[start : start + TEXTS_A_CALL]
            parts.append(self._engine.logits(part, max_length=longest, truncate=True))
            progress(start + len(part), len(texts))
        return np.concatenate(parts)


def compare(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray | None = None) -> Evaluation:
    """The figures of `logits` [n, labels] on `examples`, paired with those of the dense model where given."""
    _require_labels(task, logits.shape[1])
    predicted = two_way(logits, len(task.labels))
    right, n = int((predicted == examples.labels).sum()), len(examples)
    found = f1(predicted, examples.labels) if task.metric == "f1" else {}
    if dense is not None:
        found |= _paired(task, examples, logits, dense)
    return Evaluation(task.name, examples.split, n, right / n, statistics.wilson(right, n), **found)


def _paired(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray) -> dict:
    """How they differ from the dense model's, on the same examples."""
    if dense.shape != logits.shape:
        raise InputError(
            f"both models must have the same labels, got {logits.shape[1]} and {dense.shape[1]}",
            fix="compare models of one task",
        )
    predicted, dense_predicted = (two_way(of, len(task.labels)) for of in (logits, dense))
    correct, dense_correct = predicted == examples.labels, dense_predicted == examples.labels
    kl = statistics.kl_divergence(dense, logits)
    change = correct.astype(np.float64) - dense_correct
    return {
        "kl_to_dense": float(kl.mean()),
        "kl_ci": statistics.bootstrap_mean(kl),
        "agreement": float((predicted == dense_predicted).mean()),
        "difference": float(change.mean()),
        "difference_ci": statistics.paired_difference(correct, dense_correct),
        "mcnemar_p": statistics.mcnemar(correct, dense_correct),
    }


def _require_labels(task: Task, labels: int) -> None:
    if labels != len(task.labels) and not (task.three_way and labels == 3):
        raise InputError(
            f"task {task.name!r} has {len(task.labels)} labels, the model has {labels}",
            fix="choose a model trained for it",
        )
