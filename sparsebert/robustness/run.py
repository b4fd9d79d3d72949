"""Runs model directories on a task's examples and on its OOD tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsebert import data
from sparsebert.encoders import Progress, no_progress
from sparsebert.engine.classifier import Classifier
from sparsebert.robustness import ood as out_of_distribution
from sparsebert.robustness.evaluation import Evaluation, compare, require_labels
from sparsebert.robustness.ood import compare_ood


def evaluate(
    model: str | Path,
    task: str,
    *,
    vs: str | Path | None = None,
    ood: str | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates the classifier in directory `model` on the reported split of `task`, paired with the one in `vs` where
    given.

    ood: names of the task's OOD tests, with commas, or "all": they are evaluated likewise. n: a seeded random subset of
    that many examples, of every set. Logits are float32, of whatever Classifier.load takes.
    Raises InputError where a model's labels do not fit the task or a test is none of the task's, and DataError for a
    set that is not there, before any model is loaded.
    """
    spec = data.get_task(task)
    tests = () if ood is None else out_of_distribution.named(spec, ood)
    sets = [(of, data.load(of, of.test, limit=n, seed=seed)) for of in (spec, *tests)]
    classifiers = [Classifier.load(directory) for directory in (model, vs) if directory is not None]
    for classifier in classifiers:
        require_labels(spec, classifier.labels)
    logits: list[list[np.ndarray]] = [[] for _ in sets]  # of each set, one of every classifier
    alone = len(sets) * len(classifiers) == 1
    for classifier, suffix in zip(classifiers, ("", " (dense)"), strict=False):
        for (of, examples), got in zip(sets, logits, strict=True):
            part = _part(progress, "" if alone else of.name + suffix)
            got.append(classifier.predict(examples, max_length=of.max_length, progress=part))
    figures = {
        of.name: compare_ood(of, examples, *got) for (of, examples), got in zip(sets[1:], logits[1:], strict=True)
    }
    return replace(compare(*sets[0], *logits[0]), engine=classifiers[0].engine, ood=figures or None)


def _part(progress: Progress, what: str) -> Progress:
    return lambda done, total: progress(done, total, what)
