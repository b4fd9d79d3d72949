"""A text as the words that an attack may change. What counts as a word, and where a change lands, is TextAttack's rule:
results are compared with it example by example.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import cached_property

# What TextBugger writes for "-9876543210'abcdefghijklmnopqrstuvwxyz": letters of other alphabets that look alike. They
# count as parts of words, so that a changed word stays one.
LOOKALIKES = dict(zip("-9876543210'abcdefghijklmnopqrstuvwxyz", "˗৭Ȣ𝟕бƼᏎƷᒿlO`ɑЬϲԁе𝚏ɡհіϳ𝒌ⅼｍոорԛⲅѕ𝚝սѵԝ×уᴢ", strict=True))
_EDGES = "'-_*@"  # inside a word they are part of it, at its ends they are not
_PARTS = re.compile(rf"[\w{''.join(LOOKALIKES.values())}'\-_*@]+")
_PLAIN = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")  # replaces one word by one word wherever it stands


def spans_of(text: str) -> list[tuple[int, int]]:
    """Where each word of a text begins and ends, in characters."""
    found = []
    for chunk in re.finditer(r"\S+", text):
        inner = chunk.group().strip(_EDGES)
        start = chunk.start() + chunk.group().find(inner)
        for part in _PARTS.finditer(inner):
            word = part.group().strip(_EDGES)
            if word:
                at = start + part.start() + part.group().find(word)
                found.append((at, at + len(word)))
    return found


def words_of(text: str) -> list[str]:
    """The words of a text, in order and as they are written."""
    return [text[start:end] for start, end in spans_of(text)]


def differences(old: str, new: str) -> list[tuple[str, str]]:
    """The parts of two texts between spaces, in order: (part, part) where they agree, else (old part, new part)."""
    before, after = old.split(), new.split()
    found = []
    for kind, a, b, c, d in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if kind == "replace" and b - a == d - c:  # word by word
            found += zip(before[a:b], after[c:d], strict=True)
        else:
            found.append((" ".join(before[a:b]), " ".join(after[c:d])))
    return found


class Text:
    """A text under attack. Two of them are not compared; `text` decides what a model sees.

    text: str. changed: indices of the words that differ from the original's. latest: those that the last change made.
    """

    def __init__(self, text: str, changed: frozenset[int] = frozenset(), latest: tuple[int, ...] = ()):
        self.text, self.changed, self.latest = text, changed, latest

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        return spans_of(self.text)

    @cached_property
    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans]

    def with_word(self, index: int, word: str) -> Text:
        """The text with another word, or several or none, in place of one. Of several, all are `latest`, and later
        words move on.
        """
        start, end = self.spans[index]
        if not word:
            return type(self)(self._without(index))
        made = type(self)(self.text[:start] + word + self.text[end:])
        if _PLAIN.fullmatch(word):
            count, by = 1, len(word) - (end - start)
            after = [(first + by, last + by) for first, last in self.spans[index + 1 :]]
            made.spans = [*self.spans[:index], (start, end + by), *after]
        else:
            count = len(words_of(word))
        if count == 1:
            moved = self.changed
        else:
            moved = frozenset(i if i < index else i + count - 1 for i in self.changed if i != index)
        made.latest = tuple(range(index, index + count))
        made.changed = moved.union(made.latest)
        return made

    def _without(self, index: int) -> str:
        """The text without a word and the space before it; without the space after it, if it was the first."""
        start, end = self.spans[index]
        before, after = self.text[:start], self.text[end:]
        if after:
            if index == 0:
                after = after.removeprefix(" ")
            else:
                before = before.removesuffix(" ")
        return before + after

    def window(self, index: int, size: int | None) -> str:
        """About `size` words around one, with what stands between them; None: from the first word to the last."""
        last = len(self.spans) - 1
        half = None if size is None else (size - 1) // 2
        if half is None:
            first, end = 0, last
        elif index < half:
            first, end = 0, min(size - 1, last)
        elif index + half > last:
            first, end = max(0, last + 1 - size), last
        else:
            first, end = index - half, index + half
        return self.text[self.spans[first][0] : self.spans[end][1]]


class Traced(Text):
    """A text that remembers the text that it was made from (`before`), and by which change: the word that was
    replaced, and what stands in its place.
    """

    before: Traced | None = None
    change: tuple[str, str] = ("", "")

    def with_word(self, index: int, word: str) -> Traced:
        made = super().with_word(index, word)
        made.before, made.change = self, (self.words[index], word)
        return made
