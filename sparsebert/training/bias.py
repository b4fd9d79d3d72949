"""Bias models: they predict a label from superficial features alone. The prediction for a training example comes from a
model that was not fitted to it.

Predictions are the logarithms of probabilities, log p_b: float32 [examples, labels].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

from sparsebert import checkpoint, data, heads
from sparsebert.config import TaskConfig, validated
from sparsebert.data import Examples, Task
from sparsebert.encoders import predict, task_for
from sparsebert.errors import InputError, SparsebertError
from sparsebert.jobs import digest, file_sha256

FOLDS = 5
WEAK_EXAMPLES = 2000
LEAST = 1e-6  # lowest probability; a bias model that is sure of a wrong label would make the loss infinite


def predictions(kind: str, spec: Task, examples: Examples, model, tokenizer, weak: Callable, seed: int) -> np.ndarray:
    """log p_b of `examples` by the bias model `kind`: "overlap", "claim", "weak", the path of a .npy file or of a
    classifier's directory, or "auto" for the task's own.

    model: the classifier to be trained, whose input embeddings are the word vectors. weak: (examples, number) -> a
    model fine-tuned on them for one epoch. Raises InputError if the task has no bias model of that kind, if the labels
    do not match, or if the model was fitted to examples it would have to judge.
    """
    if kind == "auto":
        if spec.bias is None:
            raise InputError(
                f"the loss needs a bias model, and task {spec.name!r} has no default one", fix="name one: --bias weak"
            )
        kind = spec.bias
    if kind == "weak":
        return weak_learner(spec, examples, tokenizer, weak, seed)
    if kind in FEATURES:
        if not spec.pair:
            raise InputError(f"bias model {kind!r} looks at pairs, task {spec.name!r} has single texts", fix="use weak")
        words = WordVectors(tokenizer, model.get_input_embeddings().weight.detach().cpu().numpy())
        return out_of_fold(FEATURES[kind](examples, words), examples, spec, seed)
    if kind.endswith(".npy"):
        return read_log_probs(Path(kind), spec, examples)
    return by_classifier(kind, spec, examples)


def content(kind: str, spec: Task) -> str:
    """The key of a bias model, which decides its predictions together with the examples and the encoder: its name, or
    the content hash of the file or directory `kind`.
    """
    if kind in ("auto", "weak", *FEATURES):
        return kind
    if kind.endswith(".npy"):
        if not Path(kind).is_file():
            raise InputError(f"bias file {kind} does not exist", fix="correct --bias")
        return digest([file_sha256(Path(kind)), data.load(spec, spec.train).sha256])  # its rows follow this split
    return checkpoint.source_sha256(checkpoint.resolve(kind))


def out_of_fold(features: np.ndarray, examples: Examples, spec: Task, seed: int) -> np.ndarray:
    """Balanced logistic regression of one label against the others. Each example is judged by a model of the other four
    fifths, which hold no example that is the same. The other labels share their probability equally.

    The one label is entailment if the task has it, else the last. features: float64 [examples, n]. Settings of [Clark
    et al. 2019]: liblinear, C = 100, balanced classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    one = spec.labels.index("entailment") if "entailment" in spec.labels else len(spec.labels) - 1
    wanted = examples.labels == one
    groups = data.same_groups(examples)
    different = [len(set(groups[part].tolist())) for part in (wanted, ~wanted)]
    if min(different) < FOLDS:
        raise InputError(
            f"a bias model needs {FOLDS} different examples of {spec.labels[one]} and of the rest, got {different[0]} "
            f"and {different[1]}",
            fix="raise --n",
        )
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=100, class_weight="balanced", solver="liblinear", random_state=seed)
    )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    positive = cross_val_predict(model, features, wanted, cv=folds, groups=groups, method="predict_proba")[:, 1]
    others = len(spec.labels) - 1
    spread = np.repeat((1 - positive)[:, None] / others, others + 1, axis=1)
    spread[:, one] = positive
    return _log(spread)


class WordVectors:
    """Word vectors. The vector of a word is the mean of its word pieces' rows in an embedding table, minus the table's
    mean row, scaled to length 1. table: float [vocabulary, n].
    """

    def __init__(self, tokenizer, table: np.ndarray):
        self._tokenizer, self._table = tokenizer, table - table.mean(0)
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, words: list[str]) -> np.ndarray:
        """float32 [words, n]."""
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        if new:
            for word, pieces in zip(new, self._tokenizer(new, add_special_tokens=False)["input_ids"], strict=True):
                vector = self._table[pieces].mean(0) if pieces else np.zeros(self._table.shape[1], np.float32)
                self._known[word] = vector / max(1e-12, float(np.linalg.norm(vector)))
        return np.stack([self._known[word] for word in words])


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation; the case does not change."""
    return re.findall(r"\w+(?:['’]\w+)?", text)


def overlap(examples: Examples, words: WordVectors) -> np.ndarray:
    """Features of how much of text b (hypothesis, second question) is in text a: float64 [examples, 7].

    1: whether all words of b are in a. 2: whether b is a contiguous part of a. 3: the share of b's words that are in a.
    4, 5, 7: the mean, least and second least, over b's words, of the largest cosine with a word of a. 6: log max(number
    of words in a - number of words in b, 1). Features 1 to 3 compare words in lower case. [Liu et al. 2022, App. B; 6
    and 7 from the code of Clark et al. 2019]
    """
    features = np.zeros((len(examples), 7))
    for row, (text_a, text_b) in enumerate(zip(examples.texts, examples.texts_b, strict=True)):
        a, b = words_of(text_a), words_of(text_b)
        low_a, low_b = [word.lower() for word in a], [word.lower() for word in b]
        features[row, 5] = np.log(max(len(a) - len(b), 1))
        if not a or not b:
            continue
        inside = np.isin(low_b, low_a)
        nearest = np.sort((words(b) @ words(a).T).max(1))
        contiguous = f" {' '.join(low_b)} " in f" {' '.join(low_a)} "
        features[row, :5] = inside.all(), contiguous, inside.mean(), nearest.mean(), nearest[0]
        features[row, 6] = nearest[min(1, len(nearest) - 1)]
    return features


def claim(examples: Examples, words: WordVectors) -> np.ndarray:
    """Features of text b (the claim) alone: in each dimension the largest entry of its words' vectors, [examples, n].
    [Liu et al. 2022, App. B]
    """
    n = words(["a"]).shape[1]
    return np.stack([words(found).max(0) if (found := words_of(text)) else np.zeros(n) for text in examples.texts_b])


FEATURES = {"overlap": overlap, "claim": claim}


def weak_learner(spec: Task, examples: Examples, tokenizer, weak: Callable, seed: int) -> np.ndarray:
    """Predictions of two models, each fine-tuned for one epoch on at most 2,000 examples of one half, for the other
    half. No features are chosen by hand. [Utama et al. 2020b]
    """
    rng = np.random.default_rng((seed, 2))
    groups = data.same_groups(examples)  # examples that are the same go into one half
    second = (rng.permutation(groups.max() + 1) % 2 == 1)[groups]
    halves = tuple(rng.permutation(np.flatnonzero(part)) for part in (~second, second))
    if min(map(len, halves)) < 2:
        raise InputError(f"a weak learner needs at least 4 examples, got {len(examples)}", fix="raise --n")
    found = np.empty((len(examples), len(spec.labels)), np.float32)
    for number, (own, other) in enumerate((halves, halves[::-1])):
        model = weak(examples.take(own[:WEAK_EXAMPLES]), number)
        found[other] = predict(model, tokenizer, examples.take(other), max_length=spec.max_length)
    return _log(np.exp(log_softmax(found.astype(np.float64), axis=1)))


def read_log_probs(path: Path, spec: Task, examples: Examples) -> np.ndarray:
    """log p_b from a .npy file: float [all training examples, labels] in the order of the task's training split."""
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"bias file {path} must be a .npy array of numbers: {error}", fix="correct --bias") from error
    whole = data.load(spec, spec.train)
    wanted = (len(whole), len(spec.labels))
    if stored.shape != wanted or stored.dtype.kind != "f" or not np.isfinite(np.exp(stored)).all():
        raise InputError(
            f"bias file {path} must hold log probabilities [{wanted[0]}, {wanted[1]}], one row per training example of "
            f"{spec.name}, got {stored.dtype} {list(stored.shape)}",
            fix="make it for this training split",
        )
    rows = {pair: row for row, pair in enumerate(_pairs(whole))}
    missing = [pair for pair in _pairs(examples) if pair not in rows]
    if missing:
        raise InputError(f"bias file {path} has no row for {missing[0]!r}", fix="leave --mix-ood out")
    return _log(np.exp(log_softmax(stored[[rows[pair] for pair in _pairs(examples)]].astype(np.float64), axis=1)))


def by_classifier(directory: str, spec: Task, examples: Examples) -> np.ndarray:
    """log p_b by a fine-tuned classifier. InputError if it, or one of its ancestors, was trained on the examples."""
    source = checkpoint.resolve(directory)
    recipe = checkpoint.read_recipe(source)
    if recipe.get("command") != "train":
        raise InputError(
            f"bias model {directory} must come from `sparsebert train`, which records its training data; its recipe "
            f"says {recipe.get('command')!r}",
            fix="train it, or use --bias weak",
        )
    for ancestor, made in checkpoint.ancestors(source):
        if "task" not in made or "hold_out" not in made:
            continue  # made without labels
        seen = set(data.sameness(training_examples(ancestor, made)))
        both = sum(key in seen for key in data.sameness(examples))
        if both:
            raise InputError(
                f"bias model {directory} was trained on {both} of the {len(examples)} examples it would have to judge",
                fix="use --bias weak, which judges by models of the other half",
            )
    names = heads.label_names(checkpoint.read_config(source))
    columns = heads.columns(names, spec.labels, f"bias model {directory}")
    model, tokenizer = checkpoint.load(source)
    logits = predict(model, tokenizer, examples, max_length=spec.max_length)[:, columns]
    return _log(np.exp(log_softmax(logits.astype(np.float64), axis=1)))


def training_examples(directory: Path, recipe: dict) -> Examples:
    """The examples that the model of this recipe was trained on. InputError if they cannot be read any more."""
    try:
        asked = {name: recipe[name] for name in TaskConfig.model_fields if name in recipe}
        spec = task_for(validated(TaskConfig, asked, fix="correct the recipe"), directory)
        rest, _ = data.hold_out(data.training(spec), recipe["hold_out"])
        examples = rest.sample(recipe.get("n"), recipe.get("seed", 0))
        if recipe.get("mix_ood"):
            examples = data.mix_ood(spec, examples)
    except SparsebertError as error:
        raise InputError(
            f"the training examples of {directory} cannot be read any more: {error.problem}", fix="use --bias weak"
        ) from error
    if recipe.get("data_sha256", examples.sha256) != examples.sha256:
        raise InputError(f"the training examples of {directory}, {recipe['task']}, have changed", fix="use --bias weak")
    return examples


def _pairs(examples: Examples) -> list[tuple[str, str | None]]:
    return list(zip(examples.texts, examples.texts_b or [None] * len(examples), strict=True))


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, LEAST)).astype(np.float32)


def summary(log_probs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of a bias model on the examples it predicted: its accuracy, and its mean probability of the label."""
    return {
        "accuracy": float((log_probs.argmax(1) == labels).float().mean()),
        "mean_probability_of_label": float(log_probs.gather(1, labels[:, None]).exp().mean()),
    }
