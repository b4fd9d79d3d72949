"""Texts with changed words, as attacks and careless writers change them. The labels they would have do not matter: the
dense model answers the changed text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sparsebert import data

TEXTS, WORDS = 0.5, 0.2  # shares of the texts that are changed, and of their words
EDITS = ("exchange", "replace", "delete", "insert")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"[^\W\d_]+")


def perturbed(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The texts, of which about half are changed: by `swap_words` or by `misspell`, as often."""
    how = rng.random(len(texts))
    return [
        text if chance >= TEXTS else (swap_words if chance < TEXTS / 2 else misspell)(text, rng)
        for text, chance in zip(texts, how, strict=True)
    ]


def swap_words(text: str, rng: np.random.Generator) -> str:
    """The text, in which about a fifth of the words with neighbours are replaced by a random neighbour."""
    near = data.word_neighbors()

    def swap(match: re.Match) -> str:
        options = near.get(match[0].lower())
        return match[0] if options is None or rng.random() >= WORDS else options[rng.integers(len(options))]

    return _WORD.sub(swap, text)


def misspell(text: str, rng: np.random.Generator) -> str:
    """The text, in which about a fifth of the words of two or more letters from a to z have one edit: two letters
    exchanged, or one replaced, deleted or inserted.
    """

    def edit(match: re.Match) -> str:
        word = match[0]
        if len(word) < 2 or not word.isascii() or rng.random() >= WORDS:
            return word
        kind, letter = EDITS[rng.integers(len(EDITS))], LETTERS[rng.integers(len(LETTERS))]
        at = int(rng.integers(len(word) - 1 if kind == "exchange" else len(word)))
        before, after = word[:at], word[at:]
        if kind == "exchange":
            return before + after[1] + after[0] + after[2:]
        return before + {"replace": letter + after[1:], "delete": after[1:], "insert": letter + after}[kind]

    return _WORD.sub(edit, text)
