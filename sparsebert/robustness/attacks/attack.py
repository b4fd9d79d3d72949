"""One attack on one example, as a generator: it asks for what models say, and waits. So many attacks can advance
together, and every call of a model is a full batch (`lockstep`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from sparsebert.robustness.attacks.resources import Resources
from sparsebert.robustness.attacks.transformations import Draws, Source
from sparsebert.robustness.attacks.words import Text, words_of

CHUNK = 256  # texts per question, so that a text of 10,000 words is not held 10,000 times
VICTIM, ENCODER, MASKED_LM = "victim", "encoder", "masked language model"

T = TypeVar("T")


class Question(NamedTuple):
    """What an attack asks a model: model, one of the three names above, and the items. The answer has a row an item."""

    model: str
    items: list


class Blank(NamedTuple):
    """A place in a text: characters start to end. masked: whether the model sees a mask in its place [Garg &
    Ramakrishnan 2020], or the word itself, whose pieces are replaced each [Li et al. 2020]. most: proposals wanted.
    """

    text: str
    start: int
    end: int
    masked: bool
    most: int


Steps = Generator[Question, Sequence, T]  # a part of an attack that may ask; T is what it returns


class Scored(NamedTuple):
    """A text and what the victim says of it. score: 1 - probability of the true label. fooled: whether another label
    has the largest probability.
    """

    text: Text
    score: np.float32
    fooled: bool


@dataclass(frozen=True)
class Recipe:
    """An attack: goal, constraints, transformation and search. The goal is always any other label than the true one.

    transform(attack, text, index): the words to put in place of words[index]. constraints: each keeps some of the
    candidates; applied one after the other, so the cheap ones come first. search: looks for a fooling text.
    stopwords: words that are left alone: "textfooler" for its own list, or "nltk" for NLTK's English one.
    needs: the resources that decide its results, by their names in Resources.
    """

    name: str
    source: str
    transform: Callable[[Attack, Text, int], Steps[list[str]]]
    constraints: tuple[Callable[[Attack, list[Candidate], Text], Steps[list[Candidate]]], ...]
    search: Callable[[Attack], Steps[Scored]]
    stopwords: str
    needs: tuple[str, ...]


@dataclass
class Candidate:
    """A text that differs from another in one change. similarity: to the text that it was compared with, if a
    constraint has measured it.
    """

    text: Text
    similarity: float | None = None


@dataclass
class Attack:
    """The state of one attack.

    example: number of the example. original: the field under attack. other: the other field of a pair, which stays;
    first: whether the attacked field is the first of the two. label: the true one, as a column of the victim's logits.
    most: max queries; None for no limit. queries: texts that the victim was asked about, also those asked before, as
    TextAttack counts. capped: why the search stopped early.
    """

    recipe: Recipe
    resources: Resources
    example: int
    original: Text
    other: str | None
    first: bool
    label: int
    seed: int
    stopwords: frozenset[str]
    most: int | None = None
    queries: int = 0
    capped: str | None = None
    seconds: float = 0.0
    known: dict[str, tuple[np.float32, bool]] = field(default_factory=dict)
    embedded: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.source = Source(self.resources, Draws(self.seed, self.original.text))

    def run(self) -> Steps[tuple[str, Scored]]:
        """(outcome, the last text): skipped if the victim is wrong already, succeeded, or failed."""
        yield from self.query([self.original])
        if self.start.fooled:
            return "skipped", self.start
        found = yield from self.recipe.search(self)
        return ("succeeded" if found.fooled else "failed"), found

    @property
    def start(self) -> Scored:
        """The original, after `run` has asked about it."""
        return Scored(self.original, *self.known[self.original.text])

    def query(self, texts: Sequence[Text]) -> Steps[list[Scored]]:
        """What the victim says of each text; of the first ones only, if the limit of queries is reached (`over`)."""
        scores = yield from self.scores((text.text for text in texts), len(texts))
        return [Scored(text, *score) for text, score in zip(texts, scores, strict=False)]

    def scores(self, texts: Iterable[str], count: int) -> Steps[list[tuple[np.float32, bool]]]:
        """(score, fooled) of `count` texts, or of the first ones if the limit of queries is reached."""
        if self.most is not None and count > self.most - self.queries:
            count = max(0, self.most - self.queries)
            self.capped = "queries"
        coming: Iterator[str] = islice(texts, count)
        found = []
        while chunk := list(islice(coming, CHUNK)):
            asked = [text for text in dict.fromkeys(chunk) if text not in self.known]
            if asked:
                logits = yield Question(VICTIM, [self._input(text) for text in asked])
                self.known |= zip(asked, self._judged(np.asarray(logits)), strict=True)
            self.queries += len(chunk)
            found += [self.known[text] for text in chunk]
        return found

    @property
    def over(self) -> bool:
        """Whether a limit has kept the attack from asking something."""
        return self.capped is not None

    def _input(self, text: str) -> str | tuple[str, str]:
        if self.other is None:
            return text
        return (text, self.other) if self.first else (self.other, text)

    def _judged(self, logits: np.ndarray) -> list[tuple[np.float32, bool]]:
        if not np.isfinite(logits).all():
            raise ValueError("logits must be finite")
        moved = np.exp(logits - logits.max(1, keepdims=True))
        probability = (moved / moved.sum(1, keepdims=True))[:, self.label]
        fooled = logits.argmax(1) != self.label
        return list(zip(np.float32(1) - probability, fooled.tolist(), strict=True))

    def modifiable(self, text: Text) -> list[int]:
        """The words that may be changed: no stop words, and none that was changed before."""
        return [i for i, word in enumerate(text.words) if i not in text.changed and word not in self.stopwords]

    def candidates(self, text: Text, index: int) -> Steps[list[Candidate]]:
        """The texts with another word at `index` that every constraint allows, in alphabetical order."""
        if index >= len(text.words) or index in text.changed or text.words[index] in self.stopwords:
            return []
        word = text.words[index]
        words = yield from self.recipe.transform(self, text, index)
        made = [text.with_word(index, other) for other in words if other != word and words_of(other)]
        different = {other.text: Candidate(other) for other in reversed(made) if other.text != text.text}
        return (yield from self.allowed(sorted(different.values(), key=lambda candidate: candidate.text.text), text))

    def allowed(self, candidates: list[Candidate], text: Text) -> Steps[list[Candidate]]:
        """Those of the candidates, made from `text`, that every constraint allows."""
        for constraint in self.recipe.constraints:
            if candidates:
                candidates = yield from constraint(self, candidates, text)
        return candidates

    def embed(self, texts: Sequence[str]) -> Steps[np.ndarray]:
        """Sentence embeddings, float32 [texts, H], of length 1."""
        asked = [text for text in dict.fromkeys(texts) if text not in self.embedded]
        if asked:
            rows = yield Question(ENCODER, asked)
            self.embedded |= zip(asked, rows, strict=True)
        return np.stack([self.embedded[text] for text in texts])
