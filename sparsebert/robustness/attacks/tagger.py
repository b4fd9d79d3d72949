"""Parts of speech: the averaged perceptron of NLTK [Collins 2002; Honnibal 2013], read from its data file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

# Penn Treebank tag -> universal tag [Petrov et al. 2012].
UNIVERSAL = {
    tag: universal
    for universal, tags in {
        "NOUN": "NN NNP NNPS NNS",
        "VERB": "MD VB VBD VBG VBN VBP VBZ",
        "ADJ": "JJ JJR JJS",
        "ADV": "RB RBR RBS WRB",
        "PRON": "PRP PRP$ WP WP$",
        "DET": "DT EX PDT WDT",
        "ADP": "IN",
        "NUM": "CD",
        "CONJ": "CC",
        "PRT": "POS RP TO",
        "X": "FW LS SYM UH",
        ".": "# $ '' ( ) , . : ``",
    }.items()
    for tag in tags.split()
}
_BEFORE, _AFTER = ("-START-", "-START2-"), ("-END-", "-END2-")


class Tagger:
    """A greedy tagger, left to right. Of a word that has one tag in its dictionary it asks for nothing else; of any
    other it adds up the weights of 14 features, and takes the tag with the largest sum.
    """

    def __init__(self, weights: dict[str, dict[str, float]], single: dict[str, str], tags: Sequence[str]):
        self._weights, self._single, self._tags = weights, single, sorted(tags)
        self.tag = lru_cache(1 << 16)(self._tag)
        self._best = lru_cache(1 << 16)(self._heaviest)

    @classmethod
    def read(cls, weights: bytes, single: bytes, tags: bytes) -> Tagger:
        """From the three JSON files of averaged_perceptron_tagger_eng. ValueError, TypeError or AttributeError if they
        hold something else.
        """
        summed, sure, known = json.loads(weights), json.loads(single), json.loads(tags)
        if not known or not all(isinstance(tag, str) for tag in [*known, *sure.values()]):
            raise ValueError("tags must be words")
        for feature, of_tags in summed.items():
            if not of_tags.keys() <= set(known) or not all(isinstance(w, float | int) for w in of_tags.values()):
                raise ValueError(f"the weights of {feature!r} must be numbers by tag")
        return cls(summed, sure, known)

    def _tag(self, words: tuple[str, ...], at: int) -> str:
        """The universal tag of words[at]. What follows the second word after it has no influence on it."""
        seen = [*_BEFORE, *map(_normal, words), *_AFTER]
        last, before_last = _BEFORE
        for i, word in enumerate(words[: at + 1]):
            tag = self._single.get(word) or self._best(tuple(seen[i : i + 5]), word, last, before_last)
            last, before_last = tag, last
        return UNIVERSAL.get(last, "X")

    def _heaviest(self, seen: tuple[str, ...], word: str, last: str, before_last: str) -> str:
        """The tag with the largest sum for a word. seen: it and two words on each side, as the features see them."""
        second_before, before, this, after, second_after = seen
        sums = dict.fromkeys(self._tags, 0.0)
        for feature in (
            "bias",
            f"i suffix {word[-3:]}",
            f"i pref1 {word[:1]}",
            f"i-1 tag {last}",
            f"i-2 tag {before_last}",
            f"i tag+i-2 tag {last} {before_last}",
            f"i word {this}",
            f"i-1 tag+i word {last} {this}",
            f"i-1 word {before}",
            f"i-1 suffix {before[-3:]}",
            f"i-2 word {second_before}",
            f"i+1 word {after}",
            f"i+1 suffix {after[-3:]}",
            f"i+2 word {second_after}",
        ):
            for tag, weight in self._weights.get(feature, {}).items():
                sums[tag] += weight
        return max(self._tags, key=lambda tag: (sums[tag], tag))


def _normal(word: str) -> str:
    """A word as the features see it."""
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    return "!DIGITS" if word[0].isdigit() else word.lower()
