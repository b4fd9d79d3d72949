"""Sparsity patterns: which zeros a pruning method may place. A pattern is a value, parsed from its one spelling."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from sparsebert.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero: a matrix of n weights at sparsity s gets floor(s * n) zeros exactly."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """n weights kept of every m consecutive inputs of a row; the sparsity 1 - n/m is implied."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Grouped:
    """Groups of `rows` output rows share one list of kept columns; any rows may form a group."""

    rows: int

    def __str__(self) -> str:
        return f"{self.rows}x1"


Pattern = Unstructured | NofM | Grouped


def parse(text: str) -> Pattern:
    """`unstructured`, `2:4`, `32x1` … as a pattern; InputError for any other spelling."""
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return NofM(n, m)
    if (match := re.fullmatch(r"(\d+)x1", text)) and int(match[1]) > 0:
        return Grouped(int(match[1]))
    raise InputError(
        f"pattern must be unstructured, N:M with 0 < N < M, or ROWSx1, got {text!r}", fix="use --pattern unstructured"
    )


def zeros_in(weights: int, sparsity: float) -> int:
    """floor(sparsity * weights), the sparsity taken as the decimal it is written as: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(str(sparsity)) * weights)


def require_unstructured(pattern: Pattern, method: str) -> None:
    """UnsupportedError unless `pattern` is the one that `method` can place."""
    if not isinstance(pattern, Unstructured):
        raise UnsupportedError(
            f"method {method!r} prunes unstructured only, got pattern {pattern}", fix="use --pattern unstructured"
        )
