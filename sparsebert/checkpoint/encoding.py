"""Converts texts and pairs to token ids and token types, whole or cut. Calls share no state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

from sparsebert.checkpoint.files import REBUILD
from sparsebert.errors import InputError, UnsupportedError

LONG = 16  # characters per token: a longer text is read piece by piece, until it has enough tokens
PIECE = 8192  # min characters per piece

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Pieces:
    """How long texts may be read piece by piece.

    between: where a text may be cut in two so that the tokens of the two parts, joined, are those of the whole text.
    word_pieces: True if spaces give no tokens, and a word longer than a limit (100 letters by default) is one unknown
        token.
    """

    between: re.Pattern
    word_pieces: bool

    def shortened(self, text: str) -> str:
        """The text with very long words and runs of spaces shortened; its tokens stay the same."""
        if not self.word_pieces:
            return text
        text = _LONG_WORD.sub(lambda found: found[0][:500] + found[0][-500:], text)
        return _LONG_SPACE.sub(" ", text)


_LONG_WORD = re.compile("[0-9A-Za-z]{1001,}")
_LONG_SPACE = re.compile("[ \\t\\r\\n]{1001,}")


class TextEncoder:
    """Token ids and token types of texts and pairs. It keeps no state between calls and takes no lock: threads, signal
    handlers and forked children may call it at the same time.

    max_length: default max tokens per text: the model's positions, or model_max_length of tokenizer_config.json if that
        is less.
    vocabulary: all ids are below it.
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

        max_length: max tokens per text; None for no limit. truncate: cut longer texts on the side that the tokenizer
        names, of a pair the longer part first; without it, InputError names the text. numbers: how error messages
        number the texts; None for 0, 1, 2, ….
        """
        rows = list(self.rows(texts, max_length=max_length, truncate=truncate, numbers=numbers))
        return [ids for ids, _, _ in rows], [types for _, types, _ in rows]

    def rows(
        self,
        texts: Sequence[Text],
        *,
        max_length: int | None = None,
        truncate: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], list[int], bool]]:
        """(token ids, token types, whether it was cut) of each text; arguments as for `encode`."""
        long = float("inf") if max_length is None else max(PIECE, LONG * max_length)
        short = [i for i, text in enumerate(texts) if sum(map(len, _parts(text))) <= long]
        encoded = (
            dict(zip(short, self._tokenizer.encode_batch_fast([texts[i] for i in short]), strict=True)) if short else {}
        )
        for i, text in enumerate(texts):
            found, cut = encoded.get(i), False
            if found is None or (max_length is not None and len(found) > max_length):
                if not truncate:
                    self._refuse_long(text, found, max_length, i if numbers is None else numbers[i])
                ids, types, cut = self._cut(text, max_length)
            else:
                ids, types = found.ids, found.type_ids if self._types else [0] * len(found.ids)
            yield ids, types, cut

    def exceeds(self, text: Text, most: int) -> bool:
        """Whether a text or pair has more than `most` tokens. A long text is only read until that is certain."""
        count = self._special(text)
        for part in _parts(text):
            stream = _Stream(self._tokenizer, part, self._pieces, left=False)
            stream.fetch(most + 1 - count)
            count += stream.count
        return count > most

    def windows(self, text: Text, *, size: int, step: int, most: int) -> list[tuple[list[int], list[int]]]:
        """(token ids, token types) of windows of at most `size` tokens, special ones included, that cover a text; each
        begins `step` tokens after the one before. Of a pair, windows go over the second part and all hold the first.
        Raises InputError if tokens would fall between two windows, and for more than `most` windows.
        """
        parts = _parts(text)
        room = size - self._special(text)
        streams = [_Stream(self._tokenizer, part, self._pieces, left=False) for part in parts]
        for stream in streams:
            stream.fetch(max(room, 0) + step * most)
        long = streams[-1]
        room -= sum(stream.count for stream in streams[:-1])
        if room < step:
            beside = "special tokens" if len(parts) == 1 else "the first part of the pair and special tokens"
            raise InputError(
                f"windows of {size} tokens hold at most {max(room, 0)} besides {beside}, so that tokens between two "
                f"that begin {step} apart would be left out",
                fix="choose a smaller stride or a larger window",
            )
        count = 1 + max(0, -(-(long.count - room) // step))
        if count > most:
            raise InputError(
                f"a text of {long.count}{'' if long.done else ' or more'} tokens needs {count} windows, at most {most} "
                "are allowed",
                fix="choose a larger window or stride, or send a part of it",
            )
        return [
            self._arranged([stream.kept(stream.count) for stream in streams[:-1]] + [long.slice(i * step, room)])
            for i in range(count)
        ]

    def _refuse_long(self, text: Text, found: Encoding | None, most: int, number: int) -> None:
        """Raises InputError for a text of more than `most` tokens."""
        if found is None and not self.exceeds(text, most):
            return
        has = f"more than {most}" if found is None else str(len(found))
        raise InputError(
            f"texts must have at most {most} tokens, texts[{number}] has {has}",
            fix="pass truncate=True to cut them, or shorten it",
        )

    def _special(self, text: Text) -> int:
        """Number of special tokens around a text or pair."""
        return sum(part is None for _, _, part in self._templates[len(_parts(text))])

    def _cut(self, text: Text, most: int) -> tuple[list[int], list[int], bool]:
        """Token ids and token types of a text or pair, cut to at most `most` tokens, and whether it has more."""
        parts = _parts(text)
        room = most - self._special(text)
        if room < len(parts):
            raise InputError(
                f"max_length must leave room for {len(parts)} tokens besides the special ones, got {most}",
                fix="choose a larger max_length",
            )
        streams = [_Stream(self._tokenizer, part, self._pieces, self._left) for part in parts]
        for stream in streams:
            stream.fetch(room + 1)
        keep = [room]
        if len(streams) == 2:
            a, b = streams
            while room % 2 and a.count > room and b.count > room:  # the longer one gets the odd token
                shorter, longer = (a, b) if a.count <= b.count else (b, a)
                if shorter.done and (longer.done or longer.count > shorter.count):
                    break
                stream = longer if shorter.done else shorter
                stream.fetch(stream.count + 1)
            keep = shares(a.count, b.count, room)
        ids, types = self._arranged([stream.kept(tokens) for stream, tokens in zip(streams, keep, strict=True)])
        return ids, types, sum(stream.count for stream in streams) > room

    def _arranged(self, parts: list[list[int]]) -> tuple[list[int], list[int]]:
        """(token ids, token types) of a text or a pair with its special tokens. parts: ids without them."""
        ids, types = [], []
        for token, kind, part in self._templates[len(parts)]:
            row = [token] if part is None else parts[part]
            ids += row
            types += [kind if self._types else 0] * len(row)
        return ids, types


class _Stream:
    """Tokens of one text without special ones, read piece by piece from its beginning or, if `left`, from its end."""

    def __init__(self, tokenizer: Tokenizer, text: str, pieces: Pieces | None, left: bool):
        self._tokenizer, self._pieces, self._left = tokenizer, pieces, left
        self._rest = _split(text, pieces, left)
        self._found: list[int] = []
        self.count, self.done = 0, False

    def fetch(self, count: int) -> None:
        """Reads on until there are `count` tokens or the text ends."""
        while self.count < count and not self.done:
            piece = next(self._rest, None)
            if piece is None:
                self.done = True
            else:
                if len(piece) > 2 * PIECE and self._pieces is not None:
                    piece = self._pieces.shortened(piece)
                if len(piece) > 2 * PIECE:  # as a batch, which lets other threads run meanwhile
                    (encoding,) = self._tokenizer.encode_batch([piece], add_special_tokens=False)
                else:
                    encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                found = encoding.ids
                self.count += len(found)
                self._found = found + self._found if self._left else self._found + found

    def kept(self, tokens: int) -> list[int]:
        """The first `tokens` of the tokens read so far; the last ones if `left`."""
        return self._found[-tokens:] if self._left else self._found[:tokens]

    def slice(self, start: int, tokens: int) -> list[int]:
        """`tokens` of the tokens read so far, from number `start` on."""
        return self._found[start : start + tokens]


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
    """The max number of tokens that each part of a pair keeps, if both may have `room` tokens in total. The longer part
    is cut first. If both have more than half of `room`, each keeps half; an odd token goes to the longer part, or to
    the second one if they are equal.
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [long, short] if first > second else [short, long]


def _parts(text: Text) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


def _template(tokenizer: Tokenizer, parts: int) -> list[tuple[int, int, int | None]]:
    """How the post-processor arranges a text or a pair: one triple per special token, (id, type, None), and one per
    part, (0, type of its tokens, number of the part).
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
    """Number of parts, 1 or 2 -> how the post-processor arranges a text or a pair."""
    return {parts: _template(tokenizer, parts) for parts in (1, 2)}
