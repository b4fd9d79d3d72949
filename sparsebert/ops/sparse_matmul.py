"""sparse_matmul: a sparse linear layer on any number of tokens, with its weight packed once. Needs numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch

MAX_N_IN = 1 << 16  # column indices are 16 bits wide
MAX_NNZ = (1 << 31) - 1  # row offsets are 32 bits wide


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The non-zeros of a weight W [n_out, n_in], row by row (compressed sparse rows). Its arrays are read-only.

    row_ptr: int32 [n_out + 1]; row r owns the entries row_ptr[r] to row_ptr[r + 1] of the other two.
    cols: uint16 [nnz], increasing within a row.
    values: float32 [nnz], finite.
    n_in, n_out: the shape of W; n_in is at most 65536.

    Raises InputError when the arrays break this. `pack` makes one from a dense weight.
    """

    row_ptr: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    n_in: int
    n_out: int

    def __post_init__(self):
        _check_shape(self.n_out, self.n_in)
        nnz = self.values.size
        self._freeze("row_ptr", np.int32, self.n_out + 1)
        self._freeze("cols", np.uint16, nnz)
        self._freeze("values", np.float32, nnz)
        if self.row_ptr[0] != 0 or self.row_ptr[-1] != nnz or (np.diff(self.row_ptr) < 0).any():
            raise InputError(f"row_ptr must rise from 0 to nnz = {nnz}, got {self.row_ptr}", fix="use pack(weight)")
        # Across a row's start a column may fall back; anywhere else the next one must be larger.
        falls = np.diff(self.cols.astype(np.int32)) <= 0
        starts = self.row_ptr[1:-1]
        falls[starts[(starts > 0) & (starts < nnz)] - 1] = False
        if nnz and (falls.any() or int(self.cols.max()) >= self.n_in):
            raise InputError(
                f"cols must increase within each row and stay below n_in = {self.n_in}", fix="use pack(weight)"
            )
        _check_finite("values", self.values)

    def _freeze(self, name: str, dtype: type, size: int) -> None:
        array = getattr(self, name)
        _check_array(name, array, dtype, 1)
        if array.size != size:
            raise InputError(f"{name} must have {size} entries, got {array.size}", fix="use pack(weight)")
        # The kernel trusts the indices, so nobody may change them after the check. What is read-only already (a mapped
        # file) stays where it is.
        if array.flags.writeable:
            array = array.copy()
            array.setflags(write=False)
        object.__setattr__(self, name, array)

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self.values.size

    @property
    def density(self) -> float:
        """Share of non-zeros, in [0, 1]; 1 - sparsity."""
        return self.nnz / (self.n_in * self.n_out)


def pack(weight: np.ndarray) -> PackedWeight:
    """The packed form of W: its non-zeros, row by row. Entries that are 0 (of either sign) are dropped.

    weight: float32 [n_out, n_in], both at least 1, n_in at most 65536; finite; any memory layout.
    Raises InputError when that does not hold. `unpack(pack(weight))` equals `weight`.
    """
    if not isinstance(weight, np.ndarray) or weight.dtype != np.float32 or weight.ndim != 2:
        raise InputError(f"weight must be float32 [n_out, n_in], got {_describe(weight)}", fix="convert it first")
    n_out, n_in = weight.shape
    _check_shape(n_out, n_in)
    _check_finite("weight", weight)
    rows, cols = np.nonzero(weight)
    if rows.size > MAX_NNZ:
        raise InputError(f"weight must have at most {MAX_NNZ} non-zeros, got {rows.size}", fix="split its rows")
    row_ptr = np.zeros(n_out + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=n_out), out=row_ptr[1:])
    arrays = row_ptr, cols.astype(np.uint16), weight[rows, cols]
    for array in arrays:
        array.setflags(write=False)
    return PackedWeight(*arrays, n_in, n_out)


def unpack(weight: PackedWeight) -> np.ndarray:
    """The dense weight, float32 [n_out, n_in]."""
    dense = np.zeros((weight.n_out, weight.n_in), np.float32)
    rows = np.repeat(np.arange(weight.n_out), np.diff(weight.row_ptr))
    dense[rows, weight.cols] = weight.values
    return dense


def sparse_matmul(
    x: np.ndarray,
    weight: PackedWeight,
    bias: np.ndarray | None = None,
    *,
    gelu: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """y = x Wᵀ + b, then y = y Φ(y) with `gelu` (Φ the normal distribution function: the exact form, not the tanh one).

    x: float32 [tokens, n_in], C-contiguous. Any number of tokens from 0: sequences are simply concatenated.
    weight: `pack(W)`, W [n_out, n_in].
    bias: float32 [n_out], or None for none.
    threads: None for the cores this process may use.
    isa: None for the best instruction set under SPARSEBERT_ISA.
    Returns y: float32 [tokens, n_out], a new array.

    Sums are float32. A token's result is bit-equal whatever the other tokens, their number and the number of threads,
    and on avx2 and avx512; scalar rounds differently. A kept weight carries inf and NaN of x as IEEE arithmetic does, a
    pruned one does not (a dense matmul makes NaN of 0 * inf); no value reaches another token.

    Raises InputError for a wrong type, shape or layout, UnsupportedError for an isa this machine cannot run.
    """
    _check_array("x", x, np.float32, 2)
    if not isinstance(weight, PackedWeight):
        raise InputError(f"weight must be a PackedWeight, got {_describe(weight)}", fix="pass pack(weight)")
    if x.shape[1] != weight.n_in:
        raise InputError(f"x must be [tokens, n_in = {weight.n_in}], got {list(x.shape)}", fix="match x and weight")
    if bias is not None:
        _check_array("bias", bias, np.float32, 1)
        if bias.size != weight.n_out:
            raise InputError(f"bias must be [n_out = {weight.n_out}], got {list(bias.shape)}", fix="match it to weight")
    return _dispatch.core().sparse_matmul(
        x, weight.row_ptr, weight.cols, weight.values, bias, bool(gelu), _dispatch.isa(isa), _dispatch.threads(threads)
    )


def sparse_matmul_ref(
    x: np.ndarray, weight: PackedWeight, bias: np.ndarray | None = None, *, gelu: bool = False
) -> np.ndarray:
    """What `sparse_matmul` computes, dense and in float64. Returns float64 [tokens, n_out]."""
    y = x.astype(np.float64) @ unpack(weight).astype(np.float64).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    if gelu:
        y = y * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-y / math.sqrt(2.0))
    return y


def _check_array(name: str, array: object, dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        raise InputError(f"{name} must be {ndim}-d {np.dtype(dtype)}, got {_describe(array)}", fix="convert it first")
    if not array.flags.c_contiguous:
        raise InputError(
            f"{name} must be C-contiguous, got strides {array.strides} for shape {array.shape}",
            fix="pass numpy.ascontiguousarray of it",
        )


def _check_shape(n_out: int, n_in: int) -> None:
    if n_out < 1 or not 1 <= n_in <= MAX_N_IN:
        raise InputError(
            f"weight must be [n_out >= 1, 1 <= n_in <= {MAX_N_IN}], got [{n_out}, {n_in}]", fix="split its columns"
        )


def _check_finite(name: str, array: np.ndarray) -> None:
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(f"{name} must be finite, got {bad} of {array.size} inf or NaN", fix="repair the weight")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
