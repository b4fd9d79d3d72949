"""Texts and pairs to token ids and token types, whole or cut, without any state that calls share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

from sparsebert.checkpoint.files import REBUILD
from sparsebert.errors import InputError, UnsupportedError

LONG = 16  # characters a token: a text of more is read piece by piece, until enough of it is known
PIECE = 8192  # characters of such a piece

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Pieces:
    """How long texts may be read piece by piece. between: where a text may be cut in two whose tokens, one behind the
    other, are those of the whole. word_pieces: spaces are nothing, and a word of over 100 letters is one unknown token.
    """

    between: re.Pattern
    word_pieces: bool

    def shortened(self, text: str) -> str:
        """The text with its longest words and spaces shorter, to the same tokens."""
        if not self.word_pieces:
            return text
        text = _LONG_WORD.sub(lambda found: found[0][:500] + found[0][-500:], text)
        return _LONG_SPACE.sub(" ", text)


_LONG_WORD = re.compile("[0-9A-Za-z]{1001,}")
_LONG_SPACE = re.compile("[ \\t\\r\\n]{1001,}")


class TextEncoder:
    """Token ids and token types of texts and pairs. It keeps no state between calls and takes no lock: threads, signal
    handlers and forked children may call it at once.

    max_length: tokens that a text is cut to where nothing else is said: the model's positions, or model_max_length of
    tokenizer_config.json where that is less. vocabulary: ids are below it.
    """

    def __init__(self, tokenizer: Tokenizer, *, types: bool, left: bool, max_length: int, pieces: Pieces | None):
        self._tokenizer, self._types, self._left, self._pieces = tokenizer, types, left, pieces
        self._templates = templates(tokenizer)
        self.max_length = max_length
        added = tokenizer.get_added_tokens_decoder()
        self.vocabulary = max([tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])

    def encode(
        self,
        texts: Sequence[Text],
        *,
        max_length: int | None = None,
        truncate: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(token ids, token types) of each text, special tokens included.

        max_length: tokens that a text may have; None for any number. truncate: cut longer texts, of a pair the longer
        part first, on the side that the tokenizer says; without it InputError names the text. numbers: what an error
        calls the texts, None for 0, 1, 2, ….
        """
        long = float("inf") if max_length is None else max(PIECE, LONG * max_length)
        short = [i for i, text in enumerate(texts) if sum(map(len, _parts(text))) <= long]
        encoded = (
            dict(zip(short, self._tokenizer.encode_batch([texts[i] for i in short]), strict=True)) if short else {}
        )
        ids, types = [], []
        for i, text in enumerate(texts):
            found = encoded.get(i)
            if found is None or (max_length is not None and len(found) > max_length):
                if not truncate:
                    self._refuse_long(text, found, max_length, i if numbers is None else numbers[i])
                row, kinds = self._cut(text, max_length)
            else:
                row, kinds = found.ids, found.type_ids
            ids.append(row)
            types.append(kinds if self._types else [0] * len(row))
        return ids, types

    def _refuse_long(self, text: Text, found: Encoding | None, most: int, number: int) -> None:
        """InputError for a text of too many tokens; of a long one no more is read than shows it."""
        if found is not None:
            has = str(len(found))
        else:
            count = self._special(text)
            for part in _parts(text):
                stream = _Stream(self._tokenizer, part, self._pieces, left=False)
                stream.fetch(most + 1 - count)
                count += stream.count
            if count <= most:
                return
            has = f"more than {most}"
        raise InputError(
            f"texts must have at most {most} tokens, texts[{number}] has {has}",
            fix="pass truncate=True to cut them, or shorten it",
        )

    def _special(self, text: Text) -> int:
        """Special tokens that are put around a text or pair."""
        return sum(part is None for _, _, part in self._templates[len(_parts(text))])

    def _cut(self, text: Text, most: int) -> tuple[list[int], list[int]]:
        """Token ids and token types of a text or pair that has at least so many, cut to so many."""
        parts = _parts(text)
        room = most - self._special(text)
        if room < len(parts):
            raise InputError(
                f"max_length must leave room for {len(parts)} tokens beside the special ones, got {most}",
                fix="choose a larger max_length",
            )
        streams = [_Stream(self._tokenizer, part, self._pieces, self._left) for part in parts]
        for stream in streams:
            stream.fetch(room + 1)
        keep = [room]
        if len(streams) == 2:
            a, b = streams
            while room % 2 and a.count > room and b.count > room:  # who gets the odd token hangs on which is longer
                shorter, longer = (a, b) if a.count <= b.count else (b, a)
                if shorter.done and (longer.done or longer.count > shorter.count):
                    break
                stream = longer if shorter.done else shorter
                stream.fetch(stream.count + 1)
            keep = shares(a.count, b.count, room)
        ids, types = [], []
        for token, kind, part in self._templates[len(parts)]:
            row = [token] if part is None else streams[part].kept(keep[part])
            ids += row
            types += [kind] * len(row)
        return ids, types


class _Stream:
    """The tokens of one text without special ones, read piece by piece from its beginning or, `left`, from its end."""

    def __init__(self, tokenizer: Tokenizer, text: str, pieces: Pieces | None, left: bool):
        self._tokenizer, self._pieces, self._left = tokenizer, pieces, left
        self._rest = _split(text, pieces, left)
        self._found: list[int] = []
        self.count, self.done = 0, False

    def fetch(self, count: int) -> None:
        """Reads on until there are so many tokens, or no more."""
        while self.count < count and not self.done:
            piece = next(self._rest, None)
            if piece is None:
                self.done = True
            else:
                if len(piece) > 2 * PIECE and self._pieces is not None:
                    piece = self._pieces.shortened(piece)
                found = self._tokenizer.encode(piece, add_special_tokens=False).ids
                self.count += len(found)
                self._found = found + self._found if self._left else self._found + found

    def kept(self, tokens: int) -> list[int]:
        """The first, or last, so many of them."""
        return self._found[-tokens:] if self._left else self._found[:tokens]


def _split(text: str, pieces: Pieces | None, left: bool) -> Iterator[str]:
    if pieces is None or len(text) <= PIECE:
        yield text
        return
    between = pieces.between
    if not left:
        start = 0
        while start < len(text):
            found = between.search(text, start + PIECE)
            end = found.start() if found else len(text)
            yield text[start:end]
            start = end
        return
    end = len(text)
    while end > 0:
        begin, window = 0, PIECE
        while end - PIECE > 0:
            low = max(0, end - PIECE - window)
            places = [m.start() for m in between.finditer(text, low, end - PIECE + 2) if m.start() > low]
            if places or low == 0:
                begin = places[-1] if places else 0
                break
            window *= 2
        yield text[begin:end]
        end = begin


def shares(first: int, second: int, room: int) -> list[int]:
    """Tokens that each part of a pair keeps of its own where both get `room`: the longer one is cut first, and of two
    long ones each keeps half, the longer the odd token; the second where they are equal.
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [long, short] if first > second else [short, long]


def _parts(text: Text) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


def _template(tokenizer: Tokenizer, parts: int) -> list[tuple[int, int, int | None]]:
    """How the post-processor arranges a text or a pair: the id and type of a special token and None, or 0, the type of
    a part's tokens and its number.
    """
    probes = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b")[:parts]]
    for probe in probes:
        probe.truncate(1)
    made = tokenizer.post_process(*probes)
    numbers = iter(range(parts))  # every post-processor keeps the order of the parts
    whole = zip(made.ids, made.type_ids, made.special_tokens_mask, strict=True)
    found = [(token, kind, None) if special else (0, kind, next(numbers, None)) for token, kind, special in whole]
    if [part for _, _, part in found if part is not None] != list(range(parts)):
        raise UnsupportedError("tokenizer must have one or more tokens for the texts 'a' and 'b'", fix=REBUILD)
    return found


def templates(tokenizer: Tokenizer) -> dict[int, list[tuple[int, int, int | None]]]:
    """Of 1 and 2 parts: how the post-processor arranges a text and a pair."""
    return {parts: _template(tokenizer, parts) for parts in (1, 2)}
