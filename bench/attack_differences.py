"""Where two runs of one attack on one example part, and why: our engine's and TextAttack's.

A row is what came out: outcome, perturbed (the last text), queries. A traced row also has how: importance, [word index,
score] of each word left out or replaced; steps, [text, word index, [[candidate, score]]] of each word in the order in
which they were tried; similarity, candidate -> similarity to what it was compared with; threshold, of the similarity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from sparsebert.robustness.attacks import lockstep
from sparsebert.robustness.attacks.attack import ENCODER, VICTIM, Attack
from sparsebert.robustness.attacks.constraints import Constraint
from sparsebert.robustness.attacks.plan import Plan, Unit, Victim
from sparsebert.robustness.attacks.words import Text

# What the order of sums in float32 may change between two implementations of an encoder.
SCORE, SIMILARITY = 1e-5, 1e-4
UNEXPLAINED = "unexplained"
FIELDS = {"outcome": "outcome", "text": "perturbed", "queries": "queries"}


def differing(ours: dict, theirs: dict) -> list[str]:
    """Which of outcome, text and queries differ between two rows."""
    return [name for name, key in FIELDS.items() if ours[key] != theirs[key]]


def counts(ours: list[dict], theirs: list[dict]) -> dict[str, int]:
    """n: examples. attacked: those that both have attacked. same_outcome, same_text, same_queries: those on which both
    agree.
    """
    pairs = list(zip(ours, theirs, strict=True))
    attacked = sum("skipped" not in (a["outcome"], b["outcome"]) for a, b in pairs)
    same = {f"same_{name}": sum(a[key] == b[key] for a, b in pairs) for name, key in FIELDS.items()}
    return {"n": len(pairs), "attacked": attacked, **same}


def cause(attack: str, ours: dict, theirs: dict) -> str:
    """Why two traced rows differ, from where they part; UNEXPLAINED if no number there is close enough."""
    left = [dict(row["trace"]["importance"]) for row in (ours, theirs)]
    if left[0].keys() != left[1].keys():
        return UNEXPLAINED
    steps = [_steps(attack, row) for row in (ours, theirs)]
    scores: dict[str, float] = {}
    for (base, index, mine), (its_base, its_index, its) in zip_longest(*steps, fillvalue=(None, None, {})):
        # After its last step a run is at its last text.
        base, its_base = base or ours["perturbed"], its_base or theirs["perturbed"]
        if base != its_base:
            return _closer(scores, base, its_base)
        if index is None or its_index is None:
            if abs(scores.get(base, math.inf) - 0.5) <= SCORE:
                return f"the probability of the true label is within {SCORE:g} of 0.5"
            return UNEXPLAINED
        if index != its_index:
            a, b = (_importance(attack, base, left[0], steps[0])[i] for i in (index, its_index))
            if abs(a - b) <= SCORE:
                return f"words {index} and {its_index} are equally important within {SCORE:g}"
            return UNEXPLAINED
        if mine.keys() != its.keys():
            return _at_threshold(ours, theirs, mine.keys() ^ its.keys())
        scores |= mine
    a, b = ours["perturbed"], theirs["perturbed"]
    if a == b:
        again = _repeated(theirs) - _repeated(ours)
        if again and theirs["queries"] - ours["queries"] == again:
            return f"TextAttack asks about {again} candidates once more, since others are equal to them"
        return UNEXPLAINED
    similarity = ours["trace"]["similarity"]
    if a in similarity and b in similarity and abs(similarity[a] - similarity[b]) <= SIMILARITY:
        return f"both texts fool the victim, and are equally similar within {SIMILARITY:g}"
    return _closer(scores, a, b)


def _closer(scores: dict[str, float], a: str, b: str) -> str:
    if a in scores and b in scores and abs(scores[a] - scores[b]) <= SCORE:
        return f"the scores of both choices are equal within {SCORE:g}"
    return UNEXPLAINED


def _at_threshold(ours: dict, theirs: dict, texts: Iterable[str]) -> str:
    threshold = theirs["trace"]["threshold"]
    known = ours["trace"]["similarity"], theirs["trace"]["similarity"]
    if threshold is not None and all(
        text in similarity and abs(similarity[text] - threshold) <= SIMILARITY for text in texts for similarity in known
    ):
        return f"the similarity of a candidate is within {SIMILARITY:g} of its threshold"
    return UNEXPLAINED


def _repeated(row: dict) -> int:
    return sum(len(scores) - len(dict(scores)) for _, _, scores in row["trace"]["steps"])


def _steps(attack: str, row: dict) -> list[tuple[str, int, dict[str, float]]]:
    """The steps; those in which PWWS looks for the gain of each word in the order of the words."""
    made = [(base, index, dict(scores)) for base, index, scores in row["trace"]["steps"]]
    looking = len(row["trace"]["importance"]) if attack == "pwws" else 0
    return sorted(made[:looking], key=lambda step: step[1]) + made[looking:]


def _importance(attack: str, base: str, left: dict[int, float], steps: list) -> dict[int, float]:
    if attack != "pwws":
        return left
    total = sum(math.exp(score) for score in left.values())
    gains = {index: max(scores.values(), default=0.0) for _, index, scores in steps[: len(left)]}
    return {index: math.exp(score) / total * gains.get(index, 0.0) for index, score in left.items()}


@dataclass
class _Traced(Attack):
    """An attack that notes what it looks at."""

    importance: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    similarity: dict = field(default_factory=dict)
    indices: list | None = None

    def modifiable(self, text: Text) -> list[int]:
        self.indices = super().modifiable(text)
        return self.indices

    def scores(self, texts, count):
        texts = list(texts)
        found = yield from super().scores(texts, count)
        values = [float(score) for score, _ in found]
        if self.steps:
            self.steps[-1][2] = [list(pair) for pair in zip(texts, values, strict=True)]
        elif self.indices is not None:
            self.importance = [list(pair) for pair in zip(self.indices, values, strict=True)]
        return found

    def candidates(self, text, index):
        self.steps.append([text.text, index, []])
        return (yield from super().candidates(text, index))


def _noted(constraint: Constraint) -> Constraint:
    def noting(attack, candidates, text):
        kept = yield from constraint(attack, candidates, text)
        attack.similarity |= {c.text.text: c.similarity for c in candidates if c.similarity is not None}
        return kept

    return noting


def traced(victim: Victim, plan: Plan, units: Iterable[Unit]) -> Iterator[tuple[int, dict]]:
    """(number of the example, its traced row) of each unit, as `plan.attacked` yields rows."""
    recipe = replace(plan.recipe, constraints=tuple(map(_noted, plan.recipe.constraints)))
    attacks = (
        _Traced(recipe, plan.resources, number, Text(text), other, plan.first, label, plan.config.seed, plan.stopwords)
        for number, text, other, label in units
    )
    models = {VICTIM: victim.logits, ENCODER: lambda texts: plan.resources.encoder.embed(texts)}
    for end in filter(None, lockstep.run(attacks, models)):
        attack = end.attack
        trace = {"importance": attack.importance, "steps": attack.steps, "similarity": attack.similarity}
        row = {"outcome": end.outcome, "perturbed": end.last and end.last.text.text, "queries": attack.queries}
        yield attack.example, row | {"trace": trace}
