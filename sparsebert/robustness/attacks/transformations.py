"""Transformations: what an attack may put in place of a word. Each is a function (word, Source) -> words."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass

from sparsebert.robustness.attacks.resources import Resources
from sparsebert.robustness.attacks.words import LOOKALIKES


@dataclass(frozen=True)
class Draws:
    """Random numbers that depend on a seed, on the text under attack, and on what they are for; not on their order. So
    they are the same whatever else runs, and however often something is asked.
    """

    seed: int
    text: str

    def below(self, n: int, *what: object) -> int:
        """A number from 0 to n - 1."""
        name = "\0".join(map(str, (self.seed, self.text, *what)))
        return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8]) % n


@dataclass(frozen=True)
class Source:
    """What transformations draw on."""

    resources: Resources
    draws: Draws


Transformation = Callable[[str, Source], list[str]]


def neighbours(most: int, least: float = -1.0) -> Transformation:
    """The `most` nearest neighbours by word vectors, of a cosine of at least `least`, in the case of the word."""

    def swap(word: str, source: Source) -> list[str]:
        return [in_case_of(word, near) for near in source.resources.neighbours.of(word, least)[:most]]

    return swap


def synonyms(word: str, source: Source) -> list[str]:
    """The words that share a sense with the word in WordNet, as WordNet writes them."""
    return source.resources.synonyms.of(word)


def in_case_of(word: str, other: str) -> str:
    """`other` in lower case, in capitals or with a capital, as `word` is written; unchanged if it is none of these."""
    if word.islower():
        return other.lower()
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other.capitalize() if word[0].isupper() and word[1:].islower() else other


# Changes of one character, at a random place. inner: neither the first character nor the last one is touched.


def swap_characters(word: str, source: Source, inner: bool = False) -> list[str]:
    """Two neighbouring characters in each other's place."""
    first, end = (1, len(word) - 2) if inner else (0, len(word) - 1)
    if len(word) < 2 or first >= end:
        return []
    i = first + source.draws.below(end - first, "swap", word)
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :]]


def substitute_character(word: str, source: Source) -> list[str]:
    """A letter of A-Z or a-z in place of a character."""
    if len(word) < 2:
        return []
    i = source.draws.below(len(word), "substitute", word)
    return [word[:i] + _letter(source, "substitute", word) + word[i + 1 :]]


def delete_character(word: str, source: Source, inner: bool = False) -> list[str]:
    first, end = (1, len(word) - 1) if inner else (0, len(word))
    if len(word) < 2 or first >= end:
        return []
    i = first + source.draws.below(end - first, "delete", word)
    return [word[:i] + word[i + 1 :]]


def insert_character(word: str, source: Source) -> list[str]:
    """A letter of A-Z or a-z before a character."""
    if len(word) < 2:
        return []
    i = source.draws.below(len(word), "insert", word)
    return [word[:i] + _letter(source, "insert", word) + word[i:]]


def insert_space(word: str, source: Source) -> list[str]:
    """A space inside the word."""
    if len(word) < 3:
        return []
    i = 1 + source.draws.below(len(word) - 2, "insert", word)
    return [f"{word[:i]} {word[i:]}"]


def lookalikes(word: str, source: Source) -> list[str]:
    """Each character in turn in the letter of another alphabet that looks like it."""
    return [word[:i] + LOOKALIKES[c] + word[i + 1 :] for i, c in enumerate(word) if c in LOOKALIKES]


def inner(change: Callable[..., list[str]]) -> Transformation:
    """The change of a character inside the word."""
    return lambda word, source: change(word, source, inner=True)


def _letter(source: Source, what: str, word: str) -> str:
    return string.ascii_letters[source.draws.below(len(string.ascii_letters), f"{what}: letter", word)]
