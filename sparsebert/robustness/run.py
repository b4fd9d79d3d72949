"""Runs model directories on a task's examples and on its OOD tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from sparsebert import __version__, checkpoint, data, heads, machine
from sparsebert.config import AttackConfig, EvalConfig, TaskConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import Progress, cut_share, limited, no_progress, task_for, tokenize
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import DataError, InputError, SparsebertWarning
from sparsebert.robustness import attacks as attacking
from sparsebert.robustness import card, statistics
from sparsebert.robustness import domains as other_domains
from sparsebert.robustness import ood as out_of_distribution
from sparsebert.robustness.attacks.words import words_of
from sparsebert.robustness.drift import drift, unlabelled
from sparsebert.robustness.evaluation import Evaluation, compare, order_for
from sparsebert.robustness.ood import compare_ood

VERSIONS = ("torch", "transformers", "numpy", "scipy")  # of packages that figures may depend on


def evaluate(
    model: str | Path,
    task: str | TaskConfig,
    *,
    vs: str | Path | None = None,
    ood: str | None = None,
    domains: str | None = None,
    texts: Sequence[str] = (),
    attacks: str | None = None,
    attack: AttackConfig | None = None,
    match_confidence: bool = False,
    n: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates the classifier in directory `model` on the reported split of `task`, paired with the one in `vs` if
    given.

    ood: names of the task's OOD tests, separated by commas, or "all"; they are evaluated in the same way. domains:
    other sets of the same labels, likewise (domains.named): known tasks, files, folders, or "all" for the known
    ones on this machine; without the texts that are also in the training or the reported split of `task`, which is
    taken for the task that the model was trained on. texts: files of unlabelled texts (drift.unlabelled), on which
    the answers of the two models are compared. attacks: names of attacks (attacks.RECIPES), separated by commas,
    and attack: their settings, of which n, seed, max_length and device are those of the evaluation. match_confidence:
    under attack the model's logits are divided by the number that makes it as confident as `vs`. n: size of a seeded
    random subset of every set. max_length: max tokens kept per text, in place of each task's default. A model in int8
    runs in int8, any other in float32 (Classifier.load); labels are matched by name. device: cpu, cuda, or auto for a
    GPU if one can be used.
    Raises InputError for an unknown test or domain, for texts without `vs`, and for settings of attacks without
    attacks, and DataError for a missing set, before any model is loaded, and InputError if a model's labels are not the
    task's. Raises UnsupportedError for a GPU that cannot be used.
    """
    if texts and vs is None:
        raise InputError("texts are compared with the dense model's answers, and none is given", fix="add --vs DENSE")
    spec = task_for(task, model)
    tests = () if ood is None else out_of_distribution.named(spec, ood)
    others = () if domains is None else other_domains.named(spec, domains, model)
    if match_confidence and (attacks is None or vs is None):
        raise InputError("match_confidence is for attacks beside a dense model", fix="add --attacks and --vs DENSE")
    if attacks is None and (given := _given(attack)):
        raise InputError(
            f"{given} is a setting of attacks, and none is asked for", fix="add --attacks, or leave it out"
        )
    settings = (attack or AttackConfig()).model_copy(update={"n": n, "seed": seed})
    recipes = [] if attacks is None else attacking.named(attacks)
    attacking.require_used(settings, recipes)
    planned = attacking.plans(recipes, settings, spec)
    outside = [examples.sample(n, seed) for examples in unlabelled(texts, spec.pair, spec.text_column)]
    sets = [(of, data.load(of, of.test, limit=n, seed=seed)) for of in (spec, *tests)]
    known = other_domains.of_task(spec) if others else []
    sets += [(of, other_domains.unshared(of, known).sample(n, seed)) for of in others]
    classifiers = [Classifier.load(directory, device) for directory in (model, vs) if directory is not None]
    sets = [data.among(of, examples, classifiers[0].names) for of, examples in sets]
    longest = checkpoint.read(model).tokenizer.max_length if outside else None  # as for the user's own task
    sets += [(replace(sets[0][0], name=examples.task, max_length=longest), examples) for examples in outside]
    for classifier in classifiers[::-1]:
        sets = [(limited(of, classifier.config, max_length), examples) for of, examples in sets]
    logits = _logits(classifiers, sets, progress)

    runs = iter([(*each, *got) for each, got in zip(sets, logits, strict=True)])
    problem, tokenizer, apart_from = classifiers[0].problem, classifiers[0].tokenizer, [part.split for part in known]

    def whole(of: Task, examples: Examples, *got: np.ndarray) -> Evaluation:
        return replace(compare(of, examples, *got), **_lengths(tokenizer, of, examples))

    found = replace(
        whole(*next(runs)), engine=classifiers[0].engine, dtype=classifiers[0].dtype, rows=data.rows_read(spec)
    )
    on_tests = {
        of.name: {**compare_ood(of, examples, *got), "max_length": of.max_length, "data": examples.sha256}
        for of, examples, *got in islice(runs, len(tests))
    }
    on_domains = {
        of.name: {
            "rows": data.rows_read(of), "left_out": examples.left_out, "apart_from": apart_from,
            "data": examples.sha256, **whole(of, examples, *got).figures("task"),
        }
        for of, examples, *got in islice(runs, len(others))
    }  # fmt: skip
    on_texts = {
        of.name: {**drift(problem, dense, own), **_lengths(tokenizer, of, examples), "data": examples.sha256}
        for of, examples, own, dense in runs
    }
    found = replace(found, ood=on_tests or None, domains=on_domains or None, outside=on_texts or None)
    facts = [card.facts(classifier.directory) for classifier in classifiers]
    about = {
        "model": facts[0], "dense": facts[1] if vs is not None else None, "data": sets[0][1].sha256, "seed": seed,
        "versions": {name: machine.version_of(name) for name in VERSIONS} | {"sparsebert": __version__},
    }  # fmt: skip
    under, rows = _attacked(classifiers, *sets[0], logits[0], planned, match_confidence, progress)
    return _adjusted(replace(found, attacks=under or None, attacked=rows or None, about=about))


def _given(attack: AttackConfig | None) -> str | None:
    """The first of the settings of attacks that is not what it is by default; None if there is none."""
    own = AttackConfig.model_fields.keys() - EvalConfig.model_fields.keys()
    default = AttackConfig()
    return next((name for name in sorted(own) if getattr(attack or default, name) != getattr(default, name)), None)


def _attacked(
    classifiers: list[Classifier],
    task: Task,
    examples: Examples,
    logits: list[np.ndarray],
    plans: list[attacking.Plan],
    match_confidence: bool,
    progress: Progress,
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """The figures of each attack on the first classifier, paired with the second one's if there are two, with `worst`
    and the attack's settings; and its rows.
    """
    orders = _orders(task, classifiers) if plans else []
    victims = [attacking.Victim(each, task, order) for each, order in zip(classifiers, orders, strict=False)]
    if match_confidence:
        victims[0] = replace(victims[0], temperature=attacking.temperature(*logits))
    found, kept = {}, {}
    for plan in plans:
        name = plan.recipe.name
        rows = [
            attacking.run(victim, plan, examples, _part(progress, name + suffix))
            for victim, suffix in zip(victims, ("", " (dense)"), strict=False)
        ]
        found[name] = attacking.figures(plan.variant, *rows)
        found[name] |= {"settings": plan.facts, "worst": worst(*rows)}
        kept[name] = rows[0]
        if len(victims) == 2:
            own, dense = rows
            found[name] |= {
                "temperature": victims[0].temperature,
                "from_dense": attacking.transferred(dense, examples, victims[0], plan.first, own),
                "to_dense": attacking.transferred(own, examples, victims[1], plan.first, dense),
            }
    return found, kept


def worst(rows: Sequence[dict], dense: Sequence[dict] | None = None, most: int = 3) -> list[dict]:
    """Up to `most` examples each (rows of attacks.run, with why) that fooled the model and not the dense one, by the
    fewest changed words, and with the largest score; no example twice.
    """
    fooled = [i for i, row in enumerate(rows) if row["outcome"] == "succeeded"]

    def words(i: int) -> int:
        return round(rows[i]["words_changed"] * len(words_of(rows[i]["original"])))

    def sure(i: int) -> float:
        return -rows[i]["score"]

    held = [] if dense is None else [i for i in fooled if dense[i]["outcome"] == "failed"]
    found: dict[int, str] = {}
    for why, those, first in (
        ("the dense model resists", held, words), ("fewest words", fooled, words),
        ("surest of the wrong label", fooled, sure),
    ):  # fmt: skip
        left = sorted((i for i in those if i not in found), key=lambda i: (first(i), sure(i), i))
        found |= dict.fromkeys(left[:most], why)
    names = ("id", "unit", "label", "original", "perturbed", "queries", "words_changed", "score")
    return [{"why": why, **{name: rows[i][name] for name in names}} for i, why in found.items()]


def _logits(classifiers: list[Classifier], sets: list[tuple[Task, Examples]], progress: Progress) -> list[list]:
    """For each set the logits of each classifier, float32 [n, labels], in the order of the task's labels."""
    orders = [_orders(of, classifiers) for of, _ in sets]
    logits: list[list[np.ndarray]] = [[] for _ in sets]
    alone = len(sets) * len(classifiers) == 1
    for which, (classifier, suffix) in enumerate(zip(classifiers, ("", " (dense)"), strict=False)):
        for (of, examples), got, order in zip(sets, logits, orders, strict=True):
            part = _part(progress, "" if alone else of.name + suffix)
            got.append(classifier.predict(examples, max_length=of.max_length, progress=part)[:, order[which]])
    return logits


def _lengths(tokenizer, of: Task, examples: Examples) -> dict:
    """How many tokens are kept per text, and of what share of the texts that is not all."""
    encoded = tokenize(tokenizer, examples, of.max_length)
    return {"max_length": of.max_length, "cut": cut_share(tokenizer, examples, encoded, of.max_length)}


def _adjusted(found: Evaluation) -> Evaluation:
    """The evaluation with mcnemar_p_holm wherever it has mcnemar_p."""
    if found.mcnemar_p is None:
        return found
    sets = (found.ood, found.domains, found.attacks)
    parts = [part for parts in sets for part in (parts or {}).values() if "mcnemar_p" in part]
    first, *adjusted = statistics.holm([found.mcnemar_p, *(part["mcnemar_p"] for part in parts)])
    for part, p in zip(parts, adjusted, strict=True):
        part["mcnemar_p_holm"] = p
    return replace(found, mcnemar_p_holm=first)


def kept(
    pruned: str | Path,
    dense: str | Path,
    task: str | TaskConfig,
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
    spec = task_for(task, pruned, labelled=False)
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


def misfit(model: str | Path, task: str | TaskConfig) -> DataError | InputError | None:
    """Why `evaluate` would refuse the labels of the task; None if it finds them, and the model's among them."""
    try:
        spec = task_for(task, model)
        classifier = Classifier.load(model, "cpu")  # only its labels are asked for
        _order(data.among(spec, data.load(spec, spec.test), classifier.names)[0], classifier)
    except (DataError, InputError) as error:
        return error
    return None


def _orders(task: Task, classifiers: list[Classifier]) -> list[np.ndarray]:
    """`_order` of each classifier. Labels that a file gives as numbers are the first one's ids; the other's outputs
    are found by its names.
    """
    orders = [_order(task, classifier) for classifier in classifiers]
    if len(classifiers) == 2 and task.problem != heads.ONE_LOGIT.name and heads.are_anonymous(task.labels):
        first, other = classifiers
        if not heads.are_anonymous(first.names):
            orders[1] = heads.columns(other.names, first.names, str(other.directory))[orders[0]]
        elif not heads.are_anonymous(other.names):
            warnings.warn(
                f"{first.directory} has its labels by number, {other.directory} by name: they are taken to be in the "
                "same order",
                SparsebertWarning,
                stacklevel=3,
            )
    return orders


def _order(task: Task, classifier: Classifier) -> np.ndarray:
    return order_for(task, classifier.problem, classifier.names, str(classifier.directory))


def _part(progress: Progress, what: str) -> Progress:
    return lambda done, total: progress(done, total, what)
