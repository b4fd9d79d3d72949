"""Out-of-distribution tests: sets on which the shortcuts that a task's training data teach lead to wrong answers.

HANS (McCoy et al. 2019) for NLI, where a hypothesis made of the premise's words need not follow from it; PAWS (Zhang et
al. 2019) for paraphrases, where two sentences of the same words may differ in meaning; FEVER-Symmetric (Schuster et al.
2019) for fact checking, where the claim alone does not give the label away.
"""

from __future__ import annotations

import numpy as np

from sparsebert import data
from sparsebert.data import Examples, Task
from sparsebert.errors import InputError
from sparsebert.robustness import statistics
from sparsebert.robustness.evaluation import compare, predictions

ALL = "all"


def named(task: Task, names: str) -> tuple[Task, ...]:
    """The OOD tests of a task that `names` lists, separated by commas, each once; all of them for "all". Raises
    InputError for a task without OOD tests, and for a name that is not one of them.
    """
    if not task.ood:
        having = ", ".join(name for name, other in data.TASKS.items() if other.ood)
        raise InputError(
            f"ood must be left out for task {task.name!r}, which has no OOD tests, got {names!r}",
            fix=f"choose one of the tasks {having}",
        )
    wanted = list(task.ood) if names.strip() == ALL else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in task.ood:
            raise InputError(
                f"ood must be {', '.join(task.ood)} or {ALL} for task {task.name!r}, got {name!r}",
                fix="choose from these, separated by commas",
            )
    return tuple(data.TASKS[name] for name in dict.fromkeys(wanted))


def compare_ood(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray | None = None) -> dict:
    """The figures of `logits` [n, labels] on an OOD test, paired with the dense model's if given: fractions, JSON. They
    are those of `compare` that are not None, apart from task, metric and score. For two-way entailment (HANS) also:

    entailment, non_entailment: share of each class that is found, with Wilson intervals; None if the class has no
        example. `by_<groups>`: the same per group.
    summed: for a three-way model: accuracy and both shares if non-entailment is predicted whenever p(neutral) +
        p(contradiction) > p(entailment). All other figures use the largest logit, as published.
    auroc: the probability that an example of entailment has higher log odds of entailment than one of non-entailment.
        0.5 is chance, whichever answer the model prefers. None if a class has no example or a logit is not finite.

    Raises what `compare` does. Source: [McCoy et al. 2019; Liu et al. 2022, whose code takes the largest logit].
    """
    # The metric is the accuracy in all OOD tests.
    figures = compare(task, examples, logits, dense).figures("task", "metric", "score", "score_ci")
    if task.labels != data.ENTAILMENT:
        return figures
    labels = examples.labels
    correct = predictions(task, logits) == labels
    figures |= _found(correct, labels)
    if examples.groups is not None:
        groups = np.array(examples.groups)
        figures[f"by_{task.groups}"] = {
            str(group): {"n": int((groups == group).sum()), **_found(correct[groups == group], labels[groups == group])}
            for group in np.unique(groups)
        }
    from sklearn.metrics import roc_auc_score  # takes 0.2 s; only HANS needs it

    entailment, *others = logits.astype(np.float64).T
    odds = entailment - np.logaddexp.reduce(others)
    ranked = len(np.unique(labels)) == 2 and np.isfinite(odds).all()
    figures["auroc"] = float(roc_auc_score(labels == 0, odds)) if ranked else None
    if logits.shape[1] == 3:
        correct = (odds < 0) == (labels == 1)
        shares = {name: value for name, value in _found(correct, labels).items() if not name.endswith("_ci")}
        figures["summed"] = {"accuracy": float(correct.mean()), **shares}
    return figures


def _found(correct: np.ndarray, labels: np.ndarray) -> dict:
    """The share of each class that is correct, with its interval; None for a class without examples."""
    figures: dict = {}
    for label, name in enumerate(("entailment", "non_entailment")):
        n, hits = int((labels == label).sum()), int(correct[labels == label].sum())
        figures[name] = hits / n if n else None
        figures[f"{name}_ci"] = statistics.wilson(hits, n) if n else None
    return figures
