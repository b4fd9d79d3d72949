"""Sparsity patterns: which zeros a pruning method may place. A pattern is a value with one spelling, which `parse`
reads.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from sparsebert.errors import InputError

DEFAULT_SPARSITY = 0.875


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero: a matrix of n weights at sparsity s gets floor(s * n) zeros exactly."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """Each row keeps n weights of every m consecutive inputs; this implies the sparsity 1 - n/m."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Grouped:
    """Groups of `rows` output rows share one list of kept columns; any rows may form a group.

    A matrix of n weights at sparsity s gets floor(s * n / rows) * rows zeros. With kept_multiple, which must divide the
    inputs, every group keeps a multiple of that many columns, and the budget is rounded down to whole multiples.
    """

    rows: int
    kept_multiple: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x1" + (f"/{self.kept_multiple}" if self.kept_multiple > 1 else "")


@dataclass(frozen=True)
class VNM:
    """In every m consecutive inputs, v consecutive rows share 4 columns, and each row keeps n of these; this implies
    the sparsity 1 - n/m. With n = 2 this is the pattern that sparse tensor cores run. [Castro et al. 2023, VENOM]
    """

    v: int
    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"


Pattern = Unstructured | NofM | Grouped | VNM


def parse(text: str) -> Pattern:
    """Parses `unstructured`, `2:4`, `32x1`, `32x1/32` (kept columns in multiples of 32) or `64:2:16` (V:N:M). Raises
    InputError for any other spelling.
    """
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return NofM(n, m)
    if (match := re.fullmatch(r"(\d+)x1(?:/(\d+))?", text)) and int(match[1]) > 0 and match[2] != "0":
        return Grouped(int(match[1]), int(match[2] or 1))
    if match := re.fullmatch(r"(\d+):(\d+):(\d+)", text):
        v, n, m = int(match[1]), int(match[2]), int(match[3])
        if v > 0 and 0 < n < 4 < m:
            return VNM(v, n, m)
    raise InputError(
        f"pattern must be unstructured, N:M with 0 < N < M, ROWSx1, ROWSx1/MULTIPLE, or V:N:M with N < 4 < M, "
        f"got {text!r}",
        fix="use --pattern unstructured",
    )


def sparsity_of(pattern: Pattern, wanted: float | None) -> float:
    """The sparsity to which a pattern is pruned: the one it implies, else `wanted` (None: 0.875). Raises InputError if
    the two differ.
    """
    implied = 1 - pattern.n / pattern.m if isinstance(pattern, NofM | VNM) else None
    if implied is None:
        return DEFAULT_SPARSITY if wanted is None else wanted
    if wanted is not None and not math.isclose(wanted, implied):
        raise InputError(f"pattern {pattern} implies sparsity {implied:g}, got {wanted:g}", fix="leave --sparsity out")
    return implied


def require_fits(pattern: Pattern, n_out: int, n_in: int, sparsity: float, name: str = "weight") -> None:
    """Raises InputError unless `pattern` divides [n_out, n_in] and keeps at least one weight.

    A row or a group may lose all its weights (its output is then its bias), a whole matrix may not.
    """
    rows = {Grouped: "rows", VNM: "v"}.get(type(pattern))
    if rows is not None and n_out % getattr(pattern, rows):
        raise InputError(
            f"pattern {pattern} needs a multiple of {getattr(pattern, rows)} outputs, {name} has {n_out}",
            fix="choose a pattern whose rows divide it",
        )
    columns = {NofM: "m", VNM: "m", Grouped: "kept_multiple"}.get(type(pattern))
    if columns is not None and n_in % getattr(pattern, columns):
        raise InputError(
            f"pattern {pattern} needs a multiple of {getattr(pattern, columns)} inputs, {name} has {n_in}",
            fix="choose a pattern that divides it",
        )
    if kept_in(pattern, n_out, n_in, sparsity) < 1:
        raise InputError(
            f"sparsity {sparsity:g} with pattern {pattern} leaves {name} [{n_out}, {n_in}] no weight at all",
            fix="lower --sparsity",
        )


def kept_in(pattern: Pattern, n_out: int, n_in: int, sparsity: float) -> int:
    """Number of weights that `pattern` keeps of a matrix [n_out, n_in]; with Grouped a multiple of rows *
    kept_multiple.
    """
    size = n_out * n_in
    if isinstance(pattern, NofM | VNM):
        return size * pattern.n // pattern.m
    if isinstance(pattern, Grouped):
        groups = n_out // pattern.rows
        kept = groups * n_in - zeros_in(groups * n_in, sparsity)
        return kept // pattern.kept_multiple * pattern.kept_multiple * pattern.rows
    return size - zeros_in(size, sparsity)


def zeros_in(weights: int, sparsity: float) -> int:
    """floor(sparsity * weights), with the sparsity taken as the decimal it is written as: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(str(sparsity)) * weights)
