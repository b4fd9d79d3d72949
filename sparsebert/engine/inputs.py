"""Reads the texts that a caller passes: each a string, a pair of strings, or the ids of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import numpy as np

from sparsebert.checkpoint import Files
from sparsebert.errors import InputError, shown

Row = str | tuple[str, str] | list[int]
_HOW = "pass a list of strings, of (text, text_b) pairs, or of lists of token ids"


class Inputs:
    """Turns texts into what an engine computes, without one. Any number of threads may call it at once.

    limit: max tokens of a text, the model's positions. truncates_at: max tokens that are kept of a text that is cut:
    the positions, or the tokenizer's limit if less.
    """

    def __init__(self, files: Files):
        self._tokenizer, self._facts, self._model_type = files.tokenizer, files.facts, files.config["model_type"]
        self.limit, self.truncates_at = files.facts.max_length, files.tokenizer.max_length

    def encode(
        self, texts: Iterable, *, max_length: int | None = None, truncate: bool = False
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """`Engine.encode`."""
        if not isinstance(truncate, (bool, np.bool_)):
            raise InputError(f"truncate must be True or False, got {shown(truncate)}", fix="pass one of these")
        if max_length is None:
            max_length = self.truncates_at if truncate else self.limit
        elif not isinstance(max_length, Integral) or isinstance(max_length, bool) or not 3 <= max_length <= self.limit:
            raise InputError(
                f"max_length must be an integer from 3 to {self.limit}, got {shown(max_length)}",
                fix="choose a length in that range, or None",
            )
        rows, most = read(texts, self._facts.vocabulary, self._facts.padding), int(max_length)
        at = [i for i, row in enumerate(rows) if type(row) is not list]
        encoded = self._tokenizer.rows([rows[i] for i in at], max_length=most, truncate=bool(truncate), numbers=at)
        found = dict(zip(at, encoded, strict=True))
        ids, types, cut = [], [], []
        for i, row in enumerate(rows):
            if i not in found and len(row) > most and not truncate:
                raise InputError(
                    f"texts must have at most {most} tokens, texts[{i}] has {len(row)}",
                    fix="pass truncate=True to cut them, or shorten it",
                )
            row_ids, row_types, was_cut = found.get(i) or (row[:most], [0] * min(most, len(row)), len(row) > most)
            self._require_positions(i, row_ids)
            ids.append(row_ids)
            types.append(row_types)
            if was_cut:
                cut.append(i)
        return ids, types, cut

    def windows(
        self, texts: Iterable, *, size: int, step: int, most: int
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """(token ids, token types) of windows that cover the texts, in order, and how many each text has: see
        `TextEncoder.windows`. texts: strings and pairs. size: at most the model's positions. most: of all texts.
        """
        if size > self.limit:
            raise InputError(f"a window may have {self.limit} tokens, got {size}", fix="choose a smaller window")
        ids, types, counts = [], [], []
        for i, row in enumerate(read(texts, self._facts.vocabulary, self._facts.padding)):
            found = self._tokenizer.windows(row, size=size, step=step, most=most)
            for row_ids, _ in found:
                self._require_positions(i, row_ids)
            ids += [row_ids for row_ids, _ in found]
            types += [row_types for _, row_types in found]
            counts.append(len(found))
        if len(ids) > most:
            raise InputError(
                f"the texts need {len(ids)} windows, at most {most} are allowed", fix="send several requests"
            )
        return ids, types, counts

    def _require_positions(self, i: int, ids: list[int]) -> None:
        if self._facts.position_offset and self._facts.padding in ids:
            raise unplaced(i, self._facts.padding, self._model_type)


def unplaced(i: int, padding: int, model_type: str) -> InputError:
    """The error for a text that holds the padding token."""
    return InputError(
        f"texts[{i}] holds the padding token, id {padding}, which {model_type} gives no position",
        fix="remove it from the text",
    )


def read(texts: Iterable, vocabulary: int, padding: int | None = None) -> list[Row]:
    """One row per text: a string, a pair of strings as a tuple, or its token ids as a list.

    texts: any iterable except a string, a mapping or a set; an array or tensor counts as the list of its rows. A pair
    may be a tuple or a list. ids: integers from 0 to below `vocabulary`, including numpy's; `padding` tokens at their
    end, which rows of a rectangular array need, are dropped. Raises InputError that names the text.
    """
    rows = _listed(texts)
    # A mapping, or a table of columns, would be read as its keys; a set has no order.
    if isinstance(rows, (str, bytes, bytearray, set, frozenset)) or hasattr(rows, "keys"):
        raise InputError(f"texts must be a list, got {_named(texts)}", fix=_HOW)
    if not isinstance(rows, list):
        if not isinstance(rows, Iterable):
            raise InputError(f"texts must be a list, got {_named(texts)}", fix=_HOW)
        rows = list(rows)
    return [_row(i, text, vocabulary, padding) for i, text in enumerate(rows)]


def _row(i: int, text: object, vocabulary: int, padding: int | None) -> Row:
    if type(text) is str:
        return _checked(text, f"texts[{i}]")
    if isinstance(text, str):  # a subclass, such as numpy's
        return _checked(str(text), f"texts[{i}]")
    part = _listed(text)
    if isinstance(part, (list, tuple)) and part:
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], str):
            return _checked(str(part[0]), f"texts[{i}][0]"), _checked(str(part[1]), f"texts[{i}][1]")
        if set(map(type, part)) == {int} or all(isinstance(n, Integral) and not isinstance(n, bool) for n in part):
            ids = list(map(int, part))
            low, high = min(ids), max(ids)
            if low < 0 or high >= vocabulary:
                raise InputError(
                    f"texts[{i}]: token ids must be at least 0 and below {vocabulary}, got "
                    f"{shown(low if low < 0 else high)}",
                    fix="use the model's tokenizer",
                )
            end = len(ids)
            while end and ids[end - 1] == padding:
                end -= 1
            if not end:
                raise InputError(f"texts[{i}] must have a token other than padding, has none", fix="leave it out")
            return ids[:end]
    raise InputError(
        f"texts[{i}] must be a string, a pair of strings, or token ids, got {_named(text)}", fix="correct that text"
    )


def _checked(text: str, name: str) -> str:
    if not text or text.isspace():
        raise InputError(f"{name} must be a non-empty string, got {shown(text)}", fix="leave it out or fill it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} must be valid Unicode, has the lone surrogate {text[error.start]!r} at {error.start}",
                fix="decode it as UTF-8",
            ) from error
    return text


def _listed(value: object) -> object:
    """An array or a tensor as nested lists of Python values; anything else unchanged."""
    if isinstance(value, (str, list, tuple)) or not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # a tensor without values to read
        raise InputError(f"texts cannot be read from {_named(value)}: {error}", fix=_HOW) from error


def _named(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {shown(value)}"
