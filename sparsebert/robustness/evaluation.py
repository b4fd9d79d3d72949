"""The figures of a classifier with their intervals, and the paired comparison with the dense model on the same
examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from sparsebert import heads
from sparsebert.checkpoint import require_finite
from sparsebert.data import NLI, Examples, Task
from sparsebert.errors import InputError
from sparsebert.heads import Problem
from sparsebert.robustness import statistics
from sparsebert.robustness.statistics import Interval


@dataclass(frozen=True)
class Evaluation:
    """Figures over n examples; intervals are 95 %. Fractions, not percent.

    metric, score: the main figure of the problem type: accuracy; for several labels micro_f1; for one logit spearman,
        its rank correlation with the labels.
    accuracy: share of correct examples; with several labels, all of them must be correct; None for one logit.
    f1, f1_weighted: F1 of class 1, and the mean over classes weighted by their share of the labels; None unless the
        task's metric is F1. f1_macro: the plain mean over classes; None unless there are more than two.
    predicted_positive: share of examples predicted as class 1; None unless the task's metric is F1.
    ece: expected calibration error of the predicted label's probability (statistics.ece; ece_ci: ece_interval);
        dense_ece: the dense model's. For one label per text; else None.
    kl_to_dense: mean divergence from the dense model in nats (heads.Problem.divergence; for one label per text KL(dense
        ‖ this)).
    agreement: share of equal predictions; for one logit the rank correlation with the dense model's, without interval.
    dense_score: the dense model's score on the same examples. difference: score - dense_score, paired.
    mcnemar_p: p-value of the paired comparison (statistics.mcnemar), for one label per text; else None.
    mcnemar_p_holm: the same, adjusted for the number of such comparisons that `evaluate` makes: on the task, each OOD
        test, each domain and under each attack (statistics.holm).
    What compares with the dense model is None without one.
    engine: what computed the logits, "sparsebert" or "torch", and dtype: in what numbers, fp32 or int8, if `evaluate`
        did. max_length: max tokens kept per text. cut: share of the texts that have more tokens.
    rows: rows read from the user's own files (data.rows_read).
    ood: name of the test -> figures of `compare_ood`, max_length, and data: the hash of the examples, for the tests
        that were requested.
    attacks: name of the attack -> figures (attacks.figures), for the attacks that were requested. With a dense model
        also temperature, by which the logits were divided, and from_dense and to_dense (attacks.transferred): how
        this model does on the texts that fooled the dense one, and the reverse.
    domains: name of the domain -> those of these figures that it has, for the domains that were requested, and
        left_out: how many of its texts are also in the task (domains.unshared); apart_from: in which splits of it;
        data: the hash of the examples.
    outside: name of the texts -> figures of `drift`, max_length, cut and data, for the texts that were requested.
    about: what was evaluated (card.facts of the model and of the dense one), the hash of the examples, the seed of the
        subsets, and versions; None if `evaluate` did not run.
    attacked: name of the attack -> rows of attacks.run. In no JSON document.
    """

    task: str
    split: str
    n: int
    metric: str
    score: float
    score_ci: Interval
    accuracy: float | None = None
    accuracy_ci: Interval | None = None
    f1: float | None = None
    f1_ci: Interval | None = None
    f1_weighted: float | None = None
    f1_weighted_ci: Interval | None = None
    f1_macro: float | None = None
    f1_macro_ci: Interval | None = None
    predicted_positive: float | None = None
    ece: float | None = None
    ece_ci: Interval | None = None
    kl_to_dense: float | None = None
    kl_ci: Interval | None = None
    agreement: float | None = None
    agreement_ci: Interval | None = None
    dense_score: float | None = None
    dense_score_ci: Interval | None = None
    difference: float | None = None
    difference_ci: Interval | None = None
    mcnemar_p: float | None = None
    mcnemar_p_holm: float | None = None
    dense_ece: float | None = None
    dense_ece_ci: Interval | None = None
    engine: str | None = None
    dtype: str | None = None
    max_length: int | None = None
    cut: float | None = None
    rows: dict | None = None
    ood: dict[str, dict] | None = None
    attacks: dict[str, dict] | None = None
    domains: dict[str, dict] | None = None
    outside: dict[str, dict] | None = None
    about: dict | None = None
    attacked: dict[str, list[dict]] | None = field(default=None, repr=False, compare=False)

    def as_json(self) -> dict:
        """Every field but `attacked`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "attacked"}

    def figures(self, *but: str) -> dict:
        """The fields of `as_json` that are not None, apart from those that `but` names."""
        return {name: value for name, value in self.as_json().items() if value is not None and name not in but}


def compare(task: Task, examples: Examples, logits: np.ndarray, dense: np.ndarray | None = None) -> Evaluation:
    """The figures of `logits` [n, labels] on `examples`, paired with the dense model's if given. Both are in the order
    of the task's labels (heads.columns). Raises InputError if the number of labels does not fit the task or differs
    from the dense model's, CheckpointError if a logit is not finite.
    """
    problem = heads.PROBLEMS[task.problem]
    for each in (logits, dense):
        if each is not None:
            require_finite(each, task.name)
    predicted = predictions(task, logits)
    n = len(examples)
    figures: dict = {"metric": problem.metric_name}
    correct = None
    if problem is not heads.ONE_LOGIT:
        correct = (predicted == examples.labels).reshape(n, -1).all(axis=1)
        figures["accuracy"] = float(correct.mean())
        figures["accuracy_ci"] = statistics.wilson(int(correct.sum()), n)
    figures |= _score(problem, logits, predicted, examples.labels, "score")
    if task.metric == "f1":
        figures |= statistics.f1_figures(predicted, examples.labels)
        figures["predicted_positive"] = float((predicted == 1).mean())
    if problem is heads.SINGLE_LABEL:
        figures |= _ece(task, logits, correct, "ece")
        if len(task.labels) > 2:
            figures["f1_macro"] = statistics.macro_f1(predicted, examples.labels)
            figures["f1_macro_ci"] = statistics.bootstrap(
                lambda rows: statistics.macro_f1(predicted[rows], examples.labels[rows]), n
            )
    if dense is not None:
        if dense.shape != logits.shape:
            raise InputError(
                f"both models must have the same labels, got {logits.shape[1]} and {dense.shape[1]}",
                fix="compare models of one task",
            )
        dense_predicted = predictions(task, dense)
        figures |= _paired(problem, examples, logits, dense, predicted, dense_predicted)
        if problem is heads.SINGLE_LABEL:
            figures |= _ece(task, dense, dense_predicted == examples.labels, "dense_ece")
    return Evaluation(task.name, examples.split, n, **figures)


def _paired(problem: Problem, examples: Examples, logits, dense, predicted, dense_predicted) -> dict:
    """The figures that compare logits and predictions with the dense model's."""
    divergence = divergences(problem, dense, logits)
    figures = {
        "kl_to_dense": float(divergence.mean()),
        "kl_ci": statistics.bootstrap_mean(divergence),
        **agreement(problem, predicted, dense_predicted),
        **_score(problem, dense, dense_predicted, examples.labels, "dense_score"),
    }
    if problem is heads.SINGLE_LABEL:
        correct, dense_correct = predicted == examples.labels, dense_predicted == examples.labels
        return figures | {
            "difference": float((correct.astype(np.float64) - dense_correct).mean()),
            "difference_ci": statistics.paired_difference(correct, dense_correct),
            "mcnemar_p": statistics.mcnemar(correct, dense_correct),
        }

    def difference(rows) -> float:
        labels = examples.labels[rows]
        return problem.metric(logits[rows], labels) - problem.metric(dense[rows], labels)

    everything = np.arange(len(examples))
    return figures | {
        "difference": difference(everything),
        "difference_ci": statistics.bootstrap(difference, len(examples)),
    }


def _score(problem: Problem, logits: np.ndarray, predicted: np.ndarray, labels: np.ndarray, name: str) -> dict:
    """The problem type's metric and its 95 % interval, under `name` and `name`_ci."""
    n = len(labels)
    if problem is heads.SINGLE_LABEL:  # `predicted` may count two of a model's labels as one
        hits = int((predicted == labels).sum())
        return {name: hits / n, f"{name}_ci": statistics.wilson(hits, n)}
    score = problem.metric(logits, labels)
    return {name: score, f"{name}_ci": statistics.bootstrap(lambda rows: problem.metric(logits[rows], labels[rows]), n)}


def _ece(task: Task, logits: np.ndarray, correct: np.ndarray, name: str) -> dict:
    """The expected calibration error and its interval, under `name` and `name`_ci."""
    shares = heads.softmax(logits)
    if shares.shape[1] > len(task.labels):  # neutral and contradiction count as one class
        shares = np.stack([shares[:, 0], shares[:, 1:].sum(axis=1)], axis=1)
    confidence = shares[np.arange(len(shares)), predictions(task, logits)]
    return {name: statistics.ece(confidence, correct), f"{name}_ci": statistics.ece_interval(confidence, correct)}


def agreement(problem: Problem, predicted: np.ndarray, dense_predicted: np.ndarray) -> dict:
    """agreement: share of equal predictions; for one logit, the rank correlation of the two. agreement_ci: its 95 %
    interval; None for one logit.
    """
    if problem is heads.ONE_LOGIT:
        return {"agreement": heads.rank_correlation(predicted, dense_predicted), "agreement_ci": None}
    same = (predicted == dense_predicted).reshape(len(predicted), -1).all(axis=1)
    return {"agreement": float(same.mean()), "agreement_ci": statistics.wilson(int(same.sum()), len(same))}


def divergences(problem: Problem, dense: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """float64 [n], the divergence of each text's logits from the dense model's, in nats."""
    import torch

    reference, got = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (dense, logits))
    return problem.divergence(reference, got, problem.spread(dense)).numpy()


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """The predictions of `logits` [n, labels], as heads.Problem.predict gives them. For a three-way model on a two-way
    task, neutral and contradiction become class 1.
    """
    labels = logits.shape[1]
    if labels != (len(task.labels) or 1) and not (task.three_way and labels == 3):
        raise InputError(
            f"task {task.name!r} has {len(task.labels)} labels, the model has {labels}",
            fix="choose a model trained for it",
        )
    predicted = heads.PROBLEMS[task.problem].predict(logits)
    return np.minimum(predicted, 1) if task.three_way and labels == 3 else predicted


def order_for(task: Task, problem: Problem, names: Sequence[str], whose: str) -> np.ndarray:
    """Where the task's labels are among a model's outputs, by name; for a three-way model on two-way entailment, where
    the labels of NLI are. problem, names: the model's problem type and labels; whose: its directory, for messages.
    InputError if the problem type or the labels differ.
    """
    if problem.name != task.problem:
        raise InputError(
            f"{whose} is a {problem.name} model, the labels of {task.name!r} are {task.problem}",
            fix="evaluate it on a task of its problem type",
        )
    if problem is heads.ONE_LOGIT:
        return np.arange(1)
    return heads.columns(names, NLI if task.three_way and len(names) == 3 else task.labels, whose)
