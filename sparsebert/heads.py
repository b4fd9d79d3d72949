"""The meaning of a classifier's outputs: its problem type, with the divergence, loss, link and metric, and its label
names.

A leaf module: imports numpy, and torch only inside the functions that training and pruning call. Token classification
and embeddings have no entry in PROBLEMS yet, and are refused by name.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsebert.errors import CheckpointError, InputError, UnsupportedError, shown

if TYPE_CHECKING:
    import torch

THE_MODEL = "the model"  # in messages, if its directory is not known


@dataclass(frozen=True)
class Problem:
    """One kind of classification head. Logits are [texts, labels] everywhere.

    config_name: transformers' `problem_type`. shift_invariant: whether adding a constant to all logits of a text
    changes nothing. metric_name: the name of `metric` in results.

    divergence(reference, logits, spread): torch, [texts], nats: how far `logits` are from the dense model's
        `reference`; spread: the result of `spread` for a larger set of reference logits. Differentiable in `logits`.
    loss(logits, labels): torch, the mean loss of a batch, labels as in `data.Examples`.
    link(logits): numpy float64, scores as people expect them: probabilities, or the logit itself.
    predict(logits): numpy: int64 [texts], bool [texts, labels], or float64 [texts].
    metric(logits, labels): numpy, a number; higher is better.
    """

    name: str
    config_name: str
    shift_invariant: bool
    metric_name: str
    divergence: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    link: Callable[[np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray]
    metric: Callable[[np.ndarray, np.ndarray], float]

    def spread(self, reference) -> float:
        """The variance of `reference` logits over texts, the unit of a single logit's errors; 1 for the other problem
        types, whose probabilities need no unit. reference: numpy or torch, [texts, 1].
        """
        if self.name != "one_logit":
            return 1.0
        values = np.asarray(reference, dtype=np.float64)
        return float(values.var()) or 1.0


def _softmax_kl(reference: torch.Tensor, logits: torch.Tensor, spread: float) -> torch.Tensor:
    """KL(softmax(reference) ‖ softmax(logits))."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _bernoulli_kl(reference: torch.Tensor, logits: torch.Tensor, spread: float) -> torch.Tensor:
    """Sum over labels of KL(Bernoulli(σ(reference)) ‖ Bernoulli(σ(logits)))."""
    from torch.nn.functional import logsigmoid

    yes = logsigmoid(reference).exp() * (logsigmoid(reference) - logsigmoid(logits))
    no = logsigmoid(-reference).exp() * (logsigmoid(-reference) - logsigmoid(-logits))
    return (yes + no).sum(-1)


def _scaled_square(reference: torch.Tensor, logits: torch.Tensor, spread: float) -> torch.Tensor:
    """(logits - reference)² / (2 spread): the KL of two normal distributions of variance `spread` with these means."""
    return (logits - reference).square().sum(-1) / (2 * spread)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels)


def _binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import mse_loss

    return mse_loss(logits[:, 0], labels.to(logits.dtype))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [texts, labels], rows that sum to 1."""
    moved = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return moved / moved.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """float64, of each logit separately."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """2 hits / (labelled + predicted) over all texts and labels; 1 if both are empty. bool [texts, labels]."""
    both = predicted.sum() + labels.sum()
    return float(2 * (predicted & labels).sum() / both) if both else 1.0


def rank_correlation(values: np.ndarray, targets: np.ndarray) -> float:
    """Spearman's rank correlation of two float [texts]; 0 if either does not vary."""
    if np.ptp(values) == 0 or np.ptp(targets) == 0:
        return 0.0
    from scipy import stats

    return float(stats.spearmanr(values, targets).statistic)


SINGLE_LABEL = Problem(
    "single_label", "single_label_classification", True, "accuracy",
    _softmax_kl, _cross_entropy, softmax, lambda logits: logits.argmax(axis=1), _accuracy,
)  # fmt: skip
MULTI_LABEL = Problem(
    "multi_label", "multi_label_classification", False, "micro_f1",
    _bernoulli_kl, _binary_cross_entropy, sigmoid, lambda logits: logits > 0,
    lambda logits, labels: micro_f1(logits > 0, labels > 0),
)  # fmt: skip
ONE_LOGIT = Problem(
    "one_logit", "regression", False, "spearman",
    _scaled_square, _squared_error, lambda logits: logits.astype(np.float64), lambda logits: logits[:, 0].astype(float),
    lambda logits, labels: rank_correlation(logits[:, 0], labels),
)  # fmt: skip
PROBLEMS = {problem.name: problem for problem in (SINGLE_LABEL, MULTI_LABEL, ONE_LOGIT)}
_BY_CONFIG_NAME = {problem.config_name: problem for problem in PROBLEMS.values()}

# The end of transformers' class name -> what such a model does, for heads that are not text classifiers.
_OTHER_HEADS = {
    "ForTokenClassification": "labels tokens (NER)",
    "ForQuestionAnswering": "answers questions by spans",
    "ForMultipleChoice": "chooses among texts",
    "ForNextSentencePrediction": "predicts the next sentence",
}


def problem_of(config: dict) -> Problem:
    """The problem type of a config.json. Raises UnsupportedError, naming the fault, for a head that is not a text
    classifier, an unknown problem type, and one that does not fit the number of labels; CheckpointError for classes
    that are not a list of names.
    """
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(
            f"config.json: architectures must be a list of names of classes, got {shown(classes)}", fix="correct it"
        )
    for name in classes or ():
        for end, does in _OTHER_HEADS.items():
            if name.endswith(end):
                raise UnsupportedError(
                    f"the model is a {name}, which {does}, not a text classifier", fix="run it in transformers"
                )
    labels = label_count(config)
    named = config.get("problem_type")
    if named is None:
        return ONE_LOGIT if labels == 1 else SINGLE_LABEL
    problem = _BY_CONFIG_NAME.get(named) if isinstance(named, str) else None
    if problem is None:
        raise UnsupportedError(
            f"config.json: problem_type must be one of {', '.join(_BY_CONFIG_NAME)}, got {named!r}", fix="correct it"
        )
    if (problem is ONE_LOGIT and labels != 1) or (problem is SINGLE_LABEL and labels == 1):
        raise UnsupportedError(
            f"config.json: problem_type {named} does not fit {labels} labels",
            fix="correct it: regression has one label, single_label_classification at least two",
        )
    return problem


def label_count(config: dict) -> int:
    """The number of labels of a config.json: from id2label, else num_labels, else transformers' default, 2."""
    names = config.get("id2label")
    return len(names) if names else config.get("num_labels") or 2


def label_names(config: dict) -> tuple[str, ...]:
    """The names of a config.json's labels, in the order of the logits; LABEL_i for one without a name. Raises
    InputError for an id2label that does not map the ids 0, 1, … to different strings, and for a label2id that
    contradicts it.
    """
    names = config.get("id2label") or {}
    count = label_count(config)
    by_id = {str(key): name for key, name in names.items()}
    found = tuple(by_id.get(str(i), f"LABEL_{i}") for i in range(count))
    if by_id.keys() - {str(i) for i in range(count)} or not all(isinstance(name, str) for name in found):
        first = dict(list(names.items())[:5])
        raise InputError(
            f"config.json: id2label must name the labels 0 to {count - 1} by strings, got {first}",
            fix="correct it",
        )
    if repeated := [name for name, count in Counter(found).items() if count > 1]:
        raise InputError(
            f"config.json: id2label gives the name {repeated[0]!r} to several labels", fix="give each its own name"
        )
    for name, i in (config.get("label2id") or {}).items():
        if name in found and found.index(name) != i:
            raise InputError(
                f"config.json: label2id says that {name!r} is {i}, id2label that it is {found.index(name)}",
                fix="correct one of them: sparsebert reseal DIR --labels NAME,… writes both",
            )
    return found


# A name without case and separators -> the one name that stands for all its synonyms.
ALIASES = {
    "neg": "negative",
    "pos": "positive",
    "entail": "entailment",
    "entails": "entailment",
    "entailed": "entailment",
    "nonentailment": "notentailment",
    "notentailed": "notentailment",
    "contradict": "contradiction",
    "contradicts": "contradiction",
    "contradictory": "contradiction",
    "duplicate": "paraphrase",
    "isduplicate": "paraphrase",
    "equivalent": "paraphrase",
    "notduplicate": "different",
    "nonduplicate": "different",
    "notparaphrase": "different",
    "nonparaphrase": "different",
    "notequivalent": "different",
    "support": "supports",
    "supported": "supports",
    "refute": "refutes",
    "refuted": "refutes",
    "sciencetechnology": "scitech",
}


# Between letters and digits these only separate: not-entailment, Sci/Tech. Elsewhere they are part of the name: A-,
# C++, >5.
_SEPARATORS = re.compile(r"(?<=\w)[-/.&]+(?=\w)|[\s_'\"`’“”().,:;!?]+")


def fold(name: str) -> str:
    """The label name without case, separators and Unicode forms; synonyms become one name, by ALIASES."""
    bare = _SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())
    return ALIASES.get(bare, bare) or name


def _number(name: str) -> int | None:
    """The number in a label's name: 1 for LABEL_1 and for 1; None for a proper name."""
    found = re.fullmatch(r"(?:label[_ ]?)?([+-]?[0-9]+)", name.strip().casefold())
    return None if found is None else int(found[1])


def are_anonymous(names: Sequence[str]) -> bool:
    """Whether the names are only the ids of the labels: LABEL_0, LABEL_1, …, or 0, 1, …"""
    return [_number(name) for name in names] == list(range(len(names)))


def columns(names: Sequence[str], wanted: Sequence[str], whose: str = THE_MODEL) -> np.ndarray:
    """The index of each of the `wanted` labels in the `names` of a model's outputs, int64 [wanted]: `logits[:,
    columns]` are in the wanted order.

    Names are compared folded, never by position. Labels that a file gives as numbers (`wanted` anonymous) are the
    model's own ids, or its names if these are numbers. Raises InputError if the two do not name the same labels. whose:
    the model, for that message.
    """
    if None not in (ids := list(map(_number, wanted))) and 0 not in ids and set(wanted) - set(names):
        raise InputError(
            f"{whose} has the labels {_listed(names)}, wanted are {_listed(wanted)}, and no 0: they may count from 1",
            fix="write the labels by name, or, if they are the model's ids, as LABEL_1",
        )
    if len(names) != len(wanted):
        raise InputError(
            f"{whose} has {len(names)} labels ({_listed(names)}), {len(wanted)} are wanted ({_listed(wanted)})",
            fix="choose a model trained for these labels",
        )
    numbers = [_number(name) for name in names]
    if are_anonymous(wanted):
        if None in numbers:
            return np.arange(len(wanted))
        if sorted(numbers) != list(range(len(wanted))):
            raise InputError(
                f"{whose} has the labels {_listed(names)}, wanted are {_listed(wanted)}: it is not clear which is "
                "which",
                fix="give the labels the same names in both: sparsebert reseal DIR --labels NAME,…",
            )
        return np.array([numbers.index(i) for i in range(len(wanted))])
    if are_anonymous(names):
        raise InputError(
            f"{whose} does not name its labels ({_listed(names)}), and {_listed(wanted)} are wanted: their order "
            "is not known",
            fix=_naming(whose, wanted),
        )
    folded, goal = [fold(name) for name in names], [fold(name) for name in wanted]
    if sorted(folded) != sorted(goal) or len(set(goal)) < len(goal):
        raise InputError(
            f"{whose} has the labels {_listed(names)}, wanted are {_listed(wanted)}",
            fix=f"choose a model trained for these labels, or, if these are its labels, {_naming(whose, wanted)}",
        )
    return np.array([folded.index(name) for name in goal])


def _naming(whose: str, wanted: Sequence[str]) -> str:
    """The command that gives a model as many labels."""
    place = whose if whose != THE_MODEL else "DIR"
    # Placeholders: in which order the names belong is what nobody here knows.
    return (
        f"name them in the order of its outputs: sparsebert reseal {shlex.quote(place)} --labels "
        f"{','.join(['NAME'] * min(len(wanted), 6))}{',…' if len(wanted) > 6 else ''} "
        f"(without a manifest, first sparsebert seal {shlex.quote(place)})"
    )


def _listed(names: Sequence[str], most: int = 6) -> str:
    first = ", ".join(name[:40] for name in names[:most])
    return first + (", …" if len(names) > most else "")


class Answer(NamedTuple):
    """A model's answer for one text. scores: label -> probability, or the logit itself if there is one logit.
    predicted: the scores of the labels that it predicts: the likeliest label; with several labels per text all above
    one half; or the logit.
    """

    scores: dict[str, float]
    predicted: dict[str, float]


def answers(problem: Problem, names: Sequence[str], logits: np.ndarray) -> list[Answer]:
    """One answer per text. names: of the labels, in the order of the logits [texts, labels]."""
    predicted = problem.predict(logits)
    found = []
    for row, said in zip(problem.link(logits).tolist(), predicted, strict=True):
        scores = dict(zip(names, row, strict=True))
        if problem is SINGLE_LABEL:
            chosen = [names[said]]
        elif problem is MULTI_LABEL:
            chosen = [name for name, yes in zip(names, said, strict=True) if yes]
        else:
            chosen = list(names)
        found.append(Answer(scores, {name: scores[name] for name in chosen}))
    return found
