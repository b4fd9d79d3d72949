"""Constraints: which candidates still mean the same. Each takes the attack, candidates and the text that they were made
from, and returns those that it allows, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest

import numpy as np

from sparsebert.robustness.attacks.attack import Attack, Candidate, Steps
from sparsebert.robustness.attacks.words import Text

Constraint = Callable[[Attack, list[Candidate], Text], Steps[list[Candidate]]]
_NAMES = {"noun": "NOUN", "verb": "VERB", "adj": "ADJ", "adv": "ADV"}


def _plainly(allows: Callable[[Attack, Text], bool]) -> Constraint:
    """A constraint that asks no model."""

    def constraint(attack: Attack, candidates: list[Candidate], text: Text) -> Steps[list[Candidate]]:
        return [candidate for candidate in candidates if allows(attack, candidate.text)]
        yield  # never reached: it makes this a generator

    return constraint


def _same_part(attack: Attack, text: Text) -> bool:
    """Whether each new word has the part of speech of the word that it stands for, in the four words before it and the
    three after it in the original; nouns and verbs may stand for each other.
    """
    words = attack.original.words
    for i in text.latest:
        if i >= len(words):
            return False
        before, after = words[max(i - 4, 0) : i], words[i + 1 : i + 4]
        parts = [_parts(attack, before, word, after) for word in (words[i], text.words[i])]
        if not any(a == b or {a, b} <= {"NOUN", "VERB"} for a in parts[0] for b in parts[1]):
            return False
    return True


def _parts(attack: Attack, before: list[str], word: str, after: list[str]) -> set[str]:
    """The part of speech of a word by the tagger; without one, those that WordNet knows, or else every one."""
    if attack.resources.tagger is None:
        return {_NAMES[part] for part in attack.resources.synonyms.parts(word)} or set(_NAMES.values())
    context = [*before, word, *after]
    at = context.index(word)  # as TextAttack: of several equal words the first
    return {attack.resources.tagger[0].tag(tuple(context[: at + 3]), at)}


same_part_of_speech: Constraint = _plainly(_same_part)


def similar(
    threshold: float, *, window: int | None = None, to_original: bool = True, angular: bool = True
) -> Constraint:
    """The sentence encoder's similarity is at least `threshold`: 1 - angle / π, or the cosine if not `angular`.

    window: compare about so many words around the change; a text with fewer words is allowed unseen. None: compare the
    whole texts. to_original: compare with the original, else with the text before the change.
    """

    def constraint(attack: Attack, candidates: list[Candidate], text: Text) -> Steps[list[Candidate]]:
        if attack.resources.encoder is None:
            return candidates
        reference = attack.original if to_original else text
        long = [c for c in candidates if window is None or len(c.text.words) >= window]
        for candidate in candidates:
            candidate.similarity = 1.0
        pairs = [
            (reference.window(_place(c, reference), window), c.text.window(c.text.latest[0], window)) for c in long
        ]
        if pairs:
            rows = yield from attack.embed([side for pair in pairs for side in pair])
            cosines = np.einsum("nh,nh->n", rows[::2], rows[1::2])
            for candidate, cosine in zip(long, cosines.clip(-1, 1), strict=True):
                candidate.similarity = 1 - math.acos(cosine) / math.pi if angular else float(cosine)
        return [candidate for candidate in candidates if candidate.similarity >= threshold]

    return constraint


def _place(candidate: Candidate, reference: Text) -> int:
    return min(candidate.text.latest[0], len(reference.words) - 1)


def edits_at_most(most: int) -> Constraint:
    """The Levenshtein distance from the original is at most `most` characters."""
    return _plainly(lambda attack, text: within(attack.original.text, text.text, most))


def within(a: str, b: str, most: int) -> bool:
    """Whether the Levenshtein distance of two texts is at most `most`. A column of the table of distances is two
    numbers with a bit per character of `a`: where the distance rises, and where it falls [Myers 1999; Hyyrö 2003].
    """
    start = _agree(a, b)
    a, b = a[start:], b[start:]
    end = _agree(a[::-1], b[::-1])
    a, b = a[: len(a) - end], b[: len(b) - end]
    if abs(len(a) - len(b)) > most:
        return False
    if max(len(a), len(b)) <= most:
        return True
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rises, falls, distance = every, 0, len(a)
    for left, letter in zip(range(len(b) - 1, -1, -1), b, strict=True):
        equal = places.get(letter, 0)
        stays = equal | falls
        diagonal = ((equal & rises) + rises ^ rises) | equal
        more, less = falls | ~(diagonal | rises), rises & diagonal  # from the column before
        distance += bool(more & last) - bool(less & last)
        if distance - left > most:
            return False
        more, less = more << 1 | 1, less << 1
        rises, falls = (less | ~(stays | more)) & every, more & stays & every
    return distance <= most


def _agree(a: str, b: str) -> int:
    """How many characters at the start of two texts are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def changed_at_most(share: float) -> Constraint:
    """At most `share` of the words, rounded up, differ from the original's."""

    def allows(attack: Attack, text: Text) -> bool:
        words = attack.original.words
        differing = sum(a != b for a, b in zip_longest(words, text.words))
        return differing <= math.ceil(share * min(len(words), len(text.words)))

    return _plainly(allows)
