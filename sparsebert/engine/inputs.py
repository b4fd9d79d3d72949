"""Reads the texts that a caller passes: each a string, a pair of strings, or the ids of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from sparsebert.errors import InputError, shown

Row = str | tuple[str, str] | list[int]
_HOW = "pass a list of strings, of (text, text_b) pairs, or of lists of token ids"


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
