"""What a classifier's outputs mean: its problem type, with the divergence, loss, link and metric, and its label names.

A leaf: numpy at import, torch only inside the functions that training and pruning call. Token classification and
embeddings have no entry in PROBLEMS yet, and are refused by name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsebert.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Problem:
    """One kind of classification head. Logits are [texts, labels] everywhere.

    config_name: transformers' `problem_type`. shift_invariant: whether adding a constant to all logits of a text
    changes nothing. metric_name: what `metric` is called in results.

    divergence(reference, logits, spread): torch, [texts], nats: how far `logits` are from the dense model's
        `reference`; spread: what `spread` gave for a larger set of reference logits. Differentiable in `logits`.
    loss(logits, labels): torch, the mean loss of a batch, labels as `data.Examples` has them.
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
        """The variance of `reference` logits over texts, in which one logit's errors are measured; 1 for the others,
        whose probabilities need no unit. reference: numpy or torch, [texts, 1].
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
    """float64, each logit by itself."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """2 hits / (labelled + predicted) over all texts and labels; 1 where there is neither. bool [texts, labels]."""
    both = predicted.sum() + labels.sum()
    return float(2 * (predicted & labels).sum() / both) if both else 1.0


def rank_correlation(values: np.ndarray, targets: np.ndarray) -> float:
    """Spearman's, of float [texts] each; 0 where either does not vary."""
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

# Heads that are no text classifier, by how transformers' class of such a model ends.
_OTHER_HEADS = {
    "ForTokenClassification": "labels tokens (NER)",
    "ForQuestionAnswering": "answers questions by spans",
    "ForMultipleChoice": "chooses among texts",
    "ForNextSentencePrediction": "predicts the next sentence",
}


def problem_of(config: dict) -> Problem:
    """The problem type of a config.json. Raises UnsupportedError, naming it, for a head that is no text classifier, a
    problem type that is not known, and one that does not go with the number of labels.
    """
    for name in config.get("architectures") or ():
        for end, does in _OTHER_HEADS.items():
            if str(name).endswith(end):
                raise UnsupportedError(
                    f"the model is a {name}, which {does}; texts are classified here", fix="run it in transformers"
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
            f"config.json: problem_type {named} does not go with {labels} labels",
            fix="correct it: regression has one label, single_label_classification at least two",
        )
    return problem


def label_count(config: dict) -> int:
    """Labels of a config.json: of id2label, else num_labels, else transformers' default, 2."""
    names = config.get("id2label")
    return len(names) if names else config.get("num_labels") or 2


def label_names(config: dict) -> tuple[str, ...]:
    """The names of a config.json's labels, in the order of the logits; LABEL_i for those it does not name. InputError
    for an id2label that does not map the ids 0, 1, … to strings.
    """
    names = config.get("id2label") or {}
    count = label_count(config)
    by_id = {str(key): name for key, name in names.items()}
    found = tuple(by_id.get(str(i), f"LABEL_{i}") for i in range(count))
    if by_id.keys() - {str(i) for i in range(count)} or not all(isinstance(name, str) for name in found):
        shown = dict(list(names.items())[:5])
        raise InputError(
            f"config.json: id2label must name the labels 0 to {count - 1} by strings, got {shown}",
            fix="correct it",
        )
    for name, i in (config.get("label2id") or {}).items():
        if name in found and found.index(name) != i:
            raise InputError(
                f"config.json: label2id says that {name!r} is {i}, id2label that it is {found.index(name)}",
                fix="correct one of them: sparsebert reseal DIR --labels NAME,… writes both",
            )
    return found


# A name as `_bare` gives it -> what it also is called.
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


# Between letters and digits these only separate: not-entailment, Sci/Tech. Elsewhere a name has them for a reason:
# A-, C++, >5.
_SEPARATORS = re.compile(r"(?<=\w)[-/.&]+(?=\w)|[\s_'\"`’“”().,:;!?]+")


def fold(name: str) -> str:
    """The label name without case, separators and Unicode forms, under the one of its names that stands for all."""
    bare = _SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())
    return ALIASES.get(bare, bare) or name


def _number(name: str) -> int | None:
    """The number that a label's name is: of LABEL_1, or of 1; None for a proper name."""
    found = re.fullmatch(r"(?:label[_ ]?)?([+-]?[0-9]+)", name.strip().casefold())
    return None if found is None else int(found[1])


def are_anonymous(names: Sequence[str]) -> bool:
    """Whether the names are no more than the ids of the labels: LABEL_0, LABEL_1, …, or 0, 1, …"""
    return [_number(name) for name in names] == list(range(len(names)))


def columns(names: Sequence[str], wanted: Sequence[str], whose: str = "the model") -> np.ndarray:
    """Where each of the `wanted` labels stands among the `names` of a model's outputs, int64 [wanted]: with it
    `logits[:, columns]` are in the wanted order.

    Names are compared folded, never by position. Labels that a file gives as numbers (`wanted` anonymous) are the
    model's own ids, or its names where these are numbers. Raises InputError where the two do not name the same labels;
    whose: the model, for that message.
    """
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
                f"{whose} calls its labels {_listed(names)}, wanted are {_listed(wanted)}: which is which cannot be "
                "known",
                fix="give the labels the same names in both: sparsebert reseal DIR --labels NAME,…",
            )
        return np.array([numbers.index(i) for i in range(len(wanted))])
    if are_anonymous(names):
        raise InputError(
            f"{whose} does not name its labels ({_listed(names)}), and {_listed(wanted)} are wanted: in which order "
            "they are cannot be known",
            fix=f"name them in their order: id2label in config.json, of a sealed model sparsebert reseal DIR --labels "
            f"{_listed(wanted).replace(', ', ',')}",
        )
    folded, goal = [fold(name) for name in names], [fold(name) for name in wanted]
    if sorted(folded) != sorted(goal) or len(set(goal)) < len(goal):
        raise InputError(
            f"{whose} has the labels {_listed(names)}, wanted are {_listed(wanted)}",
            fix="choose a model trained for these labels, or correct id2label in its config.json",
        )
    return np.array([folded.index(name) for name in goal])


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(name[:40] for name in names[:most])
    return shown + (", …" if len(names) > most else "")


class Answer(NamedTuple):
    """What a model says of one text. scores: of every label, its probability, or of one logit that logit. predicted:
    those of them that it predicts: the likeliest label, of several labels per text all above one half, or the logit.
    """

    scores: dict[str, float]
    predicted: dict[str, float]


def answers(problem: Problem, names: Sequence[str], logits: np.ndarray) -> list[Answer]:
    """An answer per text. names: of the labels, in the order of the logits [texts, labels]."""
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
