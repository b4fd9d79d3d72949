"""Runs model directories on a task's examples and on its OOD tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsebert import data, heads
from sparsebert.data import Task
from sparsebert.encoders import Progress, cut_share, limited, no_progress, task_for, tokenize
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import DataError, InputError
from sparsebert.robustness import ood as out_of_distribution
from sparsebert.robustness import statistics
from sparsebert.robustness.drift import drift
from sparsebert.robustness.evaluation import Evaluation, compare
from sparsebert.robustness.ood import compare_ood


def evaluate(
    model: str | Path,
    task: str,
    *,
    vs: str | Path | None = None,
    ood: str | None = None,
    n: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates the classifier in directory `model` on the reported split of `task`, paired with the one in `vs` if
    given.

    ood: names of the task's OOD tests, separated by commas, or "all"; they are evaluated in the same way. n: size of a
    seeded random subset of every set. max_length: max tokens kept per text, in place of each task's default. A model in
    int8 runs in int8, any other in float32 (Classifier.load); labels are matched by name. device: cpu, cuda, or auto
    for a GPU if one can be used.
    Raises InputError for an unknown test and DataError for a missing set, both before any model is loaded, and
    InputError if a model's labels are not the task's. Raises UnsupportedError for a GPU that cannot be used.
    """
    spec = task_for(task, model)
    tests = () if ood is None else out_of_distribution.named(spec, ood)
    sets = [(of, data.load(of, of.test, limit=n, seed=seed)) for of in (spec, *tests)]
    classifiers = [Classifier.load(directory, device) for directory in (model, vs) if directory is not None]
    for classifier in classifiers[::-1]:
        sets = [(limited(of, classifier.config, max_length), examples) for of, examples in sets]
    sets = [data.among(of, examples, classifiers[0].names) for of, examples in sets]
    orders = [_orders(of, classifiers) for of, _ in sets]
    logits: list[list[np.ndarray]] = [[] for _ in sets]  # per set, one array per classifier, in the task's order
    alone = len(sets) * len(classifiers) == 1
    for which, (classifier, suffix) in enumerate(zip(classifiers, ("", " (dense)"), strict=False)):
        for (of, examples), got, order in zip(sets, logits, orders, strict=True):
            part = _part(progress, "" if alone else of.name + suffix)
            got.append(classifier.predict(examples, max_length=of.max_length, progress=part)[:, order[which]])
    figures = {
        of.name: compare_ood(of, examples, *got) for (of, examples), got in zip(sets[1:], logits[1:], strict=True)
    }
    found = compare(*sets[0], *logits[0])
    if found.mcnemar_p is not None:
        ps = [found.mcnemar_p, *(test["mcnemar_p"] for test in figures.values())]
        first, *others = statistics.holm(ps)
        found = replace(found, mcnemar_p_holm=first)
        figures = {name: test | {"mcnemar_p_holm": p} for (name, test), p in zip(figures.items(), others, strict=True)}
    of, examples = sets[0]
    encoded = tokenize(classifiers[0].tokenizer, examples, of.max_length)
    cut = cut_share(classifiers[0].tokenizer, examples, encoded, of.max_length)
    return replace(
        found, engine=classifiers[0].engine, dtype=classifiers[0].dtype, ood=figures or None,
        max_length=of.max_length, cut=cut, rows=data.rows_read(spec),
    )  # fmt: skip


def kept(
    pruned: str | Path,
    dense: str | Path,
    task: str,
    *,
    n: int = 500,
    max_length: int | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict:
    """Compares the classifier in `pruned` with the dense one that it was pruned from, on at most `n` texts of the
    task's reported split; labels are ignored. device: as for `evaluate`. Returns the figures of `drift`.

    Raises InputError if the two have different labels, and DataError if the texts are missing.
    """
    spec = data.get_task(task, labelled=False)
    examples = data.load(spec, spec.test, limit=n)
    both = [Classifier.load(directory, device) for directory in (dense, pruned)]
    for classifier in both:
        spec = limited(spec, classifier.config, max_length)
    order = heads.columns(both[1].names, both[0].names, str(both[1].directory))
    want, got = (
        classifier.predict(examples, max_length=spec.max_length, progress=_part(progress, what))
        for classifier, what in zip(both, ("dense", "pruned"), strict=True)
    )
    return drift(both[0].problem, want, got[:, order])


def misfit(model: str | Path, task: str) -> DataError | InputError | None:
    """Why `evaluate` would refuse the labels of the task; None if it finds them, and the model's among them."""
    try:
        spec = task_for(task, model)
        classifier = Classifier.load(model, "cpu")  # only its labels are asked for
        order_for(data.among(spec, data.load(spec, spec.test), classifier.names)[0], classifier)
    except (DataError, InputError) as error:
        return error
    return None


def _orders(task: Task, classifiers: list[Classifier]) -> list[np.ndarray]:
    """`order_for` of each classifier. Labels that a file gives as numbers are the first one's ids; the other's outputs
    are found by its names.
    """
    orders = [order_for(task, classifier) for classifier in classifiers]
    if len(classifiers) == 2 and task.problem != heads.ONE_LOGIT.name and heads.are_anonymous(task.labels):
        first, other = classifiers
        if not heads.are_anonymous(first.names):
            orders[1] = heads.columns(other.names, first.names, str(other.directory))[orders[0]]
    return orders


def order_for(task: Task, classifier: Classifier) -> np.ndarray:
    """Where the task's labels are among the classifier's outputs, by name; for a three-way model on two-way entailment,
    where the labels of NLI are. InputError if the problem type or the labels differ.
    """
    if classifier.problem.name != task.problem:
        raise InputError(
            f"{classifier.directory} is a {classifier.problem.name} model, the labels of {task.name!r} are "
            f"{task.problem}",
            fix="evaluate it on a task of its problem type",
        )
    if classifier.problem is heads.ONE_LOGIT:
        return np.arange(1)
    wanted = data.NLI if task.three_way and len(classifier.names) == 3 else task.labels
    return heads.columns(classifier.names, wanted, str(classifier.directory))


def _part(progress: Progress, what: str) -> Progress:
    return lambda done, total: progress(done, total, what)
