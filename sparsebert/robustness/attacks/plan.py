"""A victim, an attack with everything that it reads, and the attack of one on the other in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from importlib import resources as files
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data, heads, jobs
from sparsebert.config import AttackConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import limited, no_progress
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import DataError, InputError, SparsebertWarning, UnsupportedError
from sparsebert.machine import device_for
from sparsebert.ops import _dispatch
from sparsebert.robustness.attacks import lockstep
from sparsebert.robustness.attacks.attack import ENCODER, MASKED_LM, VICTIM, Attack, Recipe
from sparsebert.robustness.attacks.resources import Resources
from sparsebert.robustness.attacks.words import Text, Traced
from sparsebert.robustness.evaluation import order_for

Unit = tuple[int, str, str | None, int]  # number of the example, attacked text, other text of a pair, label
Done = tuple[int, dict, float]  # number of the example, its row, seconds


@dataclass(frozen=True)
class Victim:
    """A classifier under attack, with the task's labels in their order.

    order: `order_for` of the task. temperature: what its logits are divided by.
    """

    classifier: Classifier
    task: Task
    order: np.ndarray
    temperature: float = 1.0

    @classmethod
    def load(
        cls, directory: str | Path, device: str, task: Task, examples: Examples, max_length: int | None = None
    ) -> tuple[Victim, Examples]:
        """The classifier in `directory` as a victim, and the examples with the labels numbered as its task has them.
        max_length: max tokens kept per text, in place of the task's.
        """
        classifier = Classifier.load(directory, device)
        task, examples = data.among(limited(task, classifier.config, max_length), examples, classifier.names)
        order = order_for(task, classifier.problem, classifier.names, str(classifier.directory))
        return cls(classifier, task, order), examples

    def __post_init__(self):
        if self.classifier.problem is not heads.SINGLE_LABEL:
            raise UnsupportedError(
                "attacks look for another label, "
                f"{self.classifier.directory} is a {self.classifier.problem.name} model",
                fix="attack a model with one label per text",
            )
        if len(self.order) != len(self.task.labels):
            raise UnsupportedError(
                f"{self.classifier.directory} has {len(self.order)} labels, the task {self.task.name!r} has "
                f"{len(self.task.labels)}: an attack on labels that count as one is not built",
                fix="attack it on a task with its own labels",
            )

    def logits(self, items: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """float32 [items, labels]."""
        first, second = list(items), None
        if self.task.pair:
            first, second = (list(column) for column in zip(*items, strict=True))
        examples = Examples(self.task.name, self.task.test, first, second, None)
        found = self.classifier.predict(examples, max_length=self.task.max_length, progress=no_progress)
        return found[:, self.order] / np.float32(self.temperature)

    @cached_property
    def facts(self) -> dict:
        """What decides its logits, for keys."""
        return {
            "model": checkpoint.read(self.classifier.directory).content_sha256,
            "engine": self.classifier.engine,
            "dtype": self.classifier.dtype,
            "device": device_for(self.classifier.device).type,
            "isa": _dispatch.float32_isa(_dispatch.isa()),
            "core": jobs.core_sha256(),
            "max_length": self.task.max_length,
            "order": self.order.tolist(),
            "temperature": self.temperature,
        }


@dataclass(frozen=True)
class Plan:
    """A recipe with everything that it reads."""

    recipe: Recipe
    resources: Resources
    config: AttackConfig
    first: bool  # whether the first text of a pair is attacked

    @cached_property
    def stopwords(self) -> frozenset[str]:
        if self.recipe.stopwords == "none":
            return frozenset()
        if self.recipe.stopwords == "nltk" and self.resources.stopwords is not None:
            return self.resources.stopwords[0]
        return textfooler_stopwords()

    @cached_property
    def used(self) -> dict[str, tuple[str, str]]:
        """Resource -> (what is used, for people; its sha256)."""
        r = self.resources
        tables: dict[str, Callable[[], tuple[str, str]]] = {
            "neighbours": lambda: (r.neighbours.name, r.neighbours.sha256),
            "synonyms": lambda: ("Open English WordNet", r.synonyms.sha256),
            "tagger": lambda: ("WordNet's parts of speech", r.synonyms.sha256) if r.tagger is None
            else ("NLTK's tagger", r.tagger[1]),
            "stopwords": lambda: ("TextFooler's stop words", jobs.digest(sorted(self.stopwords)))
            if r.stopwords is None else ("NLTK's stop words", r.stopwords[1]),
            "encoder": lambda: ("no sentence encoder", "") if r.encoder is None
            else (r.encoder.name, r.encoder.sha256),
            "masked_lm": lambda: (r.masked_lm.name, r.masked_lm.sha256),
            "stored": lambda: (r.stored.name, r.stored.sha256),
        }  # fmt: skip
        return {name: tables[name]() for name in self.recipe.needs}

    @property
    def variant(self) -> str:
        """The attack's name with what it reads: figures of different variants do not compare."""
        said = ", ".join(name for name, _ in self.used.values())
        return f"{self.recipe.name} ({said}; {jobs.digest(self.facts)[:8]})"

    @property
    def facts(self) -> dict:
        """What decides the attack besides the victim and the example, for keys."""
        return {
            "attack": self.recipe.name,
            "resources": {name: sha256 for name, (_, sha256) in self.used.items()},
            "stopwords": jobs.digest(sorted(self.stopwords)),
            "seed": self.config.seed,
            "field": "text" if self.first else "text_b",
            "max_queries": self.config.max_queries,
            "max_seconds": self.config.max_seconds,
        }

    def warn_of_stand_ins(self) -> None:
        """Says what stands in for a resource that is not here."""
        if "tagger" in self.recipe.needs and self.resources.tagger is None:
            warnings.warn(
                f"{self.recipe.name}: NLTK's tagger is not here, so the parts of speech are those that WordNet lists "
                "for a word, whatever its context: more candidates pass. Put averaged_perceptron_tagger_eng into "
                "~/nltk_data/taggers",
                SparsebertWarning,
                stacklevel=2,
            )
        if "stopwords" in self.recipe.needs and self.resources.stopwords is None:
            warnings.warn(
                f"{self.recipe.name}: NLTK's stop words are not here, TextFooler's longer list is used: fewer words "
                "are attacked. Put stopwords into ~/nltk_data/corpora",
                SparsebertWarning,
                stacklevel=2,
            )


def textfooler_stopwords() -> frozenset[str]:
    packed = files.files("sparsebert") / "assets" / "attack" / "textfooler_stopwords.txt"
    return frozenset(packed.read_text(encoding="utf-8").split())


def attacked(victim: Victim, plan: Plan, units: Iterable[Unit]) -> Iterator[Done | None]:
    """(number of the example, its row, seconds) of each unit, in the order in which they end, and None before every
    round of calls of the models.

    A row has outcome (skipped: the victim is wrong already; succeeded; failed; error), perturbed (the last text; None
    after an error), queries, words_changed (share of the words), score (1 - probability of the true label at the end),
    capped (queries or seconds, if a limit ended the search), error.
    """
    attacks = (_begun(plan, unit) for unit in units)
    for end in lockstep.run(attacks, _models(victim, plan), seconds=plan.config.max_seconds):
        yield None if end is None else (end.attack.example, _row(end), end.attack.seconds)


def traced(victim: Victim, plan: Plan, unit: Unit) -> tuple[dict, list[dict]]:
    """The row of one unit, as of `attacked`, and the changes that led from its text to the last one: from, to, and
    before and after, the scores of the texts before and after the change, None for a text that was not asked about.
    """
    attacks = [_begun(plan, unit, Traced)]
    (end,) = filter(None, lockstep.run(attacks, _models(victim, plan), seconds=plan.config.max_seconds))

    def score_of(text: Text) -> float | None:
        known = end.attack.known.get(text.text)
        return None if known is None else float(known[0])

    steps = []
    text = None if end.last is None else end.last.text
    while text is not None and text.before is not None:
        old, new = text.change
        steps.append({"from": old, "to": new, "before": score_of(text.before), "after": score_of(text)})
        text = text.before
    return _row(end), steps[::-1]


def _begun(plan: Plan, unit: Unit, kind: type[Text] = Text) -> Attack:
    number, text, other, label = unit
    return Attack(
        plan.recipe, plan.resources, number, kind(text), other, plan.first, label, plan.config.seed, plan.stopwords,
        plan.config.max_queries,
    )  # fmt: skip


def _models(victim: Victim, plan: Plan) -> dict[str, lockstep.Model]:
    return {
        VICTIM: victim.logits,
        ENCODER: lambda texts: plan.resources.encoder.embed(texts),
        MASKED_LM: lambda blanks: plan.resources.masked_lm.propose(blanks),
    }


def _row(end: lockstep.Finished) -> dict:
    attack, last = end.attack, end.last
    return {
        "outcome": end.outcome,
        "perturbed": None if last is None else last.text.text,
        "queries": attack.queries,
        "words_changed": 0.0 if last is None else changed_share(attack.original, last.text),
        "score": None if last is None else float(last.score),
        "capped": attack.capped,
        "error": end.error,
    }


def changed_share(original: Text, text: Text) -> float:
    """Share of the original's words that are others in `text`, or are not there."""
    matching = sum(
        block.size for block in SequenceMatcher(None, original.words, text.words, False).get_matching_blocks()
    )
    return (len(original.words) - matching) / max(1, len(original.words))


def field_of(task: Task, asked: str | None) -> bool:
    """Whether the first text of a pair is attacked. InputError for a field that the task does not have."""
    if asked == "text_b" and not task.pair:
        raise InputError(f"task {task.name!r} has single texts, no text_b", fix="leave --field out")
    return not task.pair or asked == "text"


# Field of AttackConfig -> the resource that it names.
_NAMED = {"neighbours": "neighbours", "sentence_encoder": "encoder", "masked_lm": "masked_lm", "stored": "stored"}


def require_used(config: AttackConfig, recipes: Sequence[Recipe]) -> None:
    """Raises InputError for a resource that is named and that no attack reads."""
    for field, resource in _NAMED.items():
        given = getattr(config, field) not in (AttackConfig.model_fields[field].default, "none")
        if given and not any(resource in recipe.needs for recipe in recipes):
            flag = f"--{field.replace('_', '-')}"
            raise InputError(
                f"{flag} is for attacks that read it, got {', '.join(recipe.name for recipe in recipes)}",
                fix=f"leave {flag} out",
            )


def plans(recipes: Iterable[Recipe], config: AttackConfig, task: Task) -> list[Plan]:
    """A plan for each recipe. All of them share their resources, which are read now, so that what is missing is said
    before any work.
    """
    shared = Resources(config.neighbours, config.sentence_encoder, config.masked_lm, config.stored)
    made = [Plan(recipe, shared, config, field_of(task, config.field)) for recipe in recipes]
    for plan in made:
        if "stored" in plan.used and shared.stored.pairs != task.pair:
            has, wants = ("pairs", "single texts") if shared.stored.pairs else ("single texts", "pairs")
            raise DataError(f"{config.stored} is of {has}, the task {task.name!r} has {wants}", fix="name another file")
    return made
