"""Runs model directories on a task's examples and on its OOD tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data
from sparsebert.data import Examples
from sparsebert.encoders import Progress, no_progress, predict, token_limit, tokenize
from sparsebert.engine import Engine
from sparsebert.errors import UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.robustness import ood as out_of_distribution
from sparsebert.robustness.evaluation import Evaluation, compare, require_labels
from sparsebert.robustness.ood import compare_ood

BATCH = 64  # texts a call of the engine; between calls it tells of progress


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
    that many examples, of every set. Logits are float32, by the engine where it runs the model here, else by torch.
    Raises InputError where a model's labels do not fit the task or a test is none of the task's, and DataError for a
    set that is not there, before any model is loaded.
    """
    spec = data.get_task(task)
    tests = () if ood is None else out_of_distribution.named(spec, ood)
    sets = [(of, data.load(of, of.test, limit=n, seed=seed)) for of in (spec, *tests)]
    classifiers = [_load(directory) for directory in (model, vs) if directory is not None]
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


@dataclass(frozen=True)
class _Classifier:
    """A verified model directory: its number of labels, what runs it, and that as `encoders.predict` is called."""

    labels: int
    engine: str
    predict: Callable[..., np.ndarray]


def _load(directory: str | Path) -> _Classifier:
    model, tokenizer = checkpoint.load(directory)
    config = model.config
    engine = _engine(checkpoint.resolve(directory))
    if engine is None:
        return _Classifier(config.num_labels, "torch", partial(predict, model, tokenizer))

    def run(examples: Examples, *, max_length: int, progress: Progress) -> np.ndarray:
        # By the tokenizer that `predict` uses: what tokenizer.json says alone, transformers may overrule.
        encoded = tokenize(tokenizer, examples, token_limit(config, max_length))
        logits = np.empty((len(encoded), config.num_labels), dtype=np.float32)
        for start in range(0, len(encoded), BATCH):
            batch = encoded[start : start + BATCH]
            ids = [row["input_ids"] for row in batch]
            types = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in batch]
            logits[start : start + BATCH] = engine.forward(ids, types)
            progress(start + len(batch), len(encoded))
        return logits

    return _Classifier(config.num_labels, "sparsebert", run)


def _engine(directory: Path) -> Engine | None:
    """The engine in float32; None where it does not run such a model, or on its portable path, slower than torch."""
    if _dispatch.isa() == "scalar" or not (directory / "tokenizer.json").is_file():
        return None
    try:
        return Engine.load(directory, dtype="fp32", batch_invariant=True, cached=False)
    except UnsupportedError:
        return None
