"""sparse_matmul: a sparse linear layer on any number of tokens, with its weight packed once. Needs only numpy."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch

MAX_N_IN = 1 << 16  # column indices are 16 bits wide
MAX_NNZ = (1 << 31) - 1  # row offsets are 32 bits wide
ACTIVATIONS = ("none", "gelu", "relu", "tanh")


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A weight W [n_out, n_in] in the form *rows*: every row has its own columns. It is stored as sliced ELLPACK
    (SELL-C-σ), separately for each slab of SLAB_COLS columns. A slice is SLICE_ROWS rows whose entries lie side by
    side; shorter rows are filled up with zeros. Rows are sorted by their number of non-zeros and cut into blocks of
    BLOCK_ROWS; within a block they are sorted again for each slab. All arrays are read-only.

    rows: int32 [slabs, slices, SLICE_ROWS], row numbers of W, -1 after the last one; a block has the same rows in all
    slabs.
    counts: uint8 [slabs, slices], entries per row of the slice.
    cols: uint8 [entries, SLICE_ROWS], within the slab; increasing along a row, except for entries that fill it up.
    values: float32 [entries, SLICE_ROWS], finite.

    `pack` makes one from a dense weight. Raises InputError if the arrays break these rules.
    """

    rows: np.ndarray
    counts: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    n_in: int
    n_out: int

    def __post_init__(self):
        _check_shape(self.n_out, self.n_in)
        core = _dispatch.core()
        slabs, slices = -(-self.n_in // core.SLAB_COLS), -(-self.n_out // core.SLICE_ROWS)
        _freeze(self, "rows", np.int32, slabs * slices * core.SLICE_ROWS, 3)
        _freeze(self, "counts", np.uint8, slabs * slices, 2)
        entries = int(self.counts.sum(dtype=np.int64))
        _freeze(self, "cols", np.uint8, entries * core.SLICE_ROWS, 2)
        _freeze(self, "values", np.float32, entries * core.SLICE_ROWS, 2)
        rows = self.rows.reshape(slabs, -1)
        blocks = -(-self.n_out // core.BLOCK_ROWS)
        rows = np.pad(rows, ((0, 0), (0, blocks * core.BLOCK_ROWS - rows.shape[1])), constant_values=-1)
        rows = np.sort(rows.reshape(slabs, blocks, core.BLOCK_ROWS))
        if (rows != rows[0]).any() or not np.array_equal(np.sort(rows[0][rows[0] >= 0]), np.arange(self.n_out)):
            raise InputError(f"rows must list each of {self.n_out} rows once per slab", fix="use pack(weight)")
        last = int(self.counts[:-1].sum(dtype=np.int64))
        for cols, width in (
            (self.cols[:last], core.SLAB_COLS),
            (self.cols[last:], self.n_in - (slabs - 1) * core.SLAB_COLS),
        ):
            if cols.size and int(cols.max()) >= width:
                raise InputError(f"cols must stay below n_in = {self.n_in}", fix="use pack(weight)")
        _check_finite("values", self.values)

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return int(np.count_nonzero(self.values))

    @property
    def stored(self) -> int:
        """Number of entries that are multiplied: the non-zeros, and the zeros that fill up their slices."""
        return self.values.size

    def linear(self, bias: np.ndarray | None, activation: str):
        """A layer with this weight, as an object of the compiled core."""
        return _dispatch.core().sliced_linear(
            self.rows, self.counts, self.cols, self.values, self.n_in, self.n_out, bias, activation
        )


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """A weight W [n_out, n_in] as groups of rows that share one list of kept columns. Any rows may form a group; in a
    dense W all groups share one list. All arrays are read-only.

    rows: int32 [groups, GROUP_ROWS], row numbers of W, -1 if a group has fewer rows; each row of W occurs once.
    col_begin, col_count: int32 [groups], start and length of a group's columns in `cols`; groups may share them.
    cols: uint16, below n_in, increasing within a group.
    value_begin: int64 [groups], start of a group's values in `values`.
    values: float32, finite; for each group [GROUP_ROWS / GROUP_SLICE, col_count, GROUP_SLICE].

    `pack_groups` makes one from a dense weight. Raises InputError if the arrays break these rules.
    """

    rows: np.ndarray
    col_begin: np.ndarray
    col_count: np.ndarray
    cols: np.ndarray
    value_begin: np.ndarray
    values: np.ndarray
    n_in: int
    n_out: int

    def __post_init__(self):
        _check_shape(self.n_out, self.n_in)
        groups = len(self.rows)
        _freeze(self, "rows", np.int32, groups * _dispatch.core().GROUP_ROWS, 2)
        for name, dtype in (("col_begin", np.int32), ("col_count", np.int32), ("value_begin", np.int64)):
            _freeze(self, name, dtype, groups)
        _freeze(self, "cols", np.uint16, self.cols.size)
        _freeze(self, "values", np.float32, self.values.size)
        _check_places(self, "pack_groups")
        _check_finite("values", self.values)

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return int(np.count_nonzero(self.values))

    @property
    def stored(self) -> int:
        """Number of entries that are multiplied: kept ones and empty places."""
        return self.values.size

    def linear(self, bias: np.ndarray | None, activation: str):
        """A layer with this weight, as an object of the compiled core."""
        return _dispatch.core().grouped_linear(
            self.rows, self.col_begin, self.col_count, self.cols, self.value_begin, self.values, self.n_in, self.n_out,
            bias, activation,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PackedTiles:
    """A weight W [n_out, n_in] in bf16, as tiles of TILE_ROWS rows by TILE_COLS columns. A group is one or two tiles
    high. Its rows, which may be any rows of W, share one list of columns, in chunks of TILE_COLS. Its tiles are stored
    whole, or as one bit per entry and the entries that are not zero. All arrays are read-only.

    rows: int32 [groups, 2 * TILE_ROWS], row numbers of W, -1 if a group has fewer; each row of W occurs once.
    tiles: int32 [groups], height in tiles, 1 or 2. chunks: int32 [groups], chunks of columns.
    col_begin: int64 [groups], start of a group's columns in `cols`; groups may share a list.
    cols: uint16, below n_in; a list is filled up to whole chunks with its last column, there with zero weights.
    value_begin: int64 [groups], start in `values`: uint16, the bits of bf16 [chunks, tiles, TILE_ROWS, TILE_COLS].
    mask_begin: int64 [groups], start in `masks`: uint32 [chunks, tiles, TILE_ROWS], bit c for column c; -1 for whole
    tiles.

    `pack_tiles` makes one from a dense weight. Raises InputError if the arrays break these rules.
    """

    rows: np.ndarray
    tiles: np.ndarray
    col_begin: np.ndarray
    chunks: np.ndarray
    cols: np.ndarray
    value_begin: np.ndarray
    mask_begin: np.ndarray
    values: np.ndarray
    masks: np.ndarray
    n_in: int
    n_out: int

    def __post_init__(self):
        _check_shape(self.n_out, self.n_in)
        groups = len(self.rows)
        _freeze(self, "rows", np.int32, groups * 2 * _dispatch.core().TILE_ROWS, 2)
        for name, dtype in (
            ("tiles", np.int32), ("col_begin", np.int64), ("chunks", np.int32), ("value_begin", np.int64),
            ("mask_begin", np.int64),
        ):  # fmt: skip
            _freeze(self, name, dtype, groups)
        for name, dtype in (("cols", np.uint16), ("values", np.uint16), ("masks", np.uint32)):
            _freeze(self, name, dtype, getattr(self, name).size)
        _check_places(self, "pack_tiles")
        _check_finite("values", from_bf16(self.values))

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return int(np.count_nonzero(self.values & 0x7FFF))

    @property
    def stored(self) -> int:
        """Number of entries that are multiplied: kept ones and empty places."""
        core = _dispatch.core()
        return int(self.tiles.astype(np.int64) @ self.chunks) * core.TILE_ROWS * core.TILE_COLS

    def linear(self, bias: np.ndarray | None, activation: str):
        """A layer with this weight, as an object of the compiled core."""
        return _dispatch.core().tiled_linear(
            self.rows, self.tiles, self.col_begin, self.chunks, self.cols, self.value_begin, self.mask_begin,
            self.values, self.masks, self.n_in, self.n_out, bias, activation,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight W [n_out, n_in] in int8, W[r, k] = scale[r] * values[r, k] / step[k], for an input in bytes: byte b of
    input k stands for (b - zero[k]) * step[k].

    values: int8 [n_out, n_in]. scale: float32 [n_out]. step: float32 [n_in]. Both are above 0, and so is 1 / step[k].
    zero: uint8 [n_in].

    Raises InputError if the arrays break these rules.
    """

    values: np.ndarray
    scale: np.ndarray
    step: np.ndarray
    zero: np.ndarray

    def __post_init__(self):
        _check_array("values", self.values, np.int8, 2)
        n_out, n_in = self.values.shape
        _check_shape(n_out, n_in)
        for name, dtype, size in (("scale", np.float32, n_out), ("step", np.float32, n_in), ("zero", np.uint8, n_in)):
            _freeze(self, name, dtype, size)
        for name in ("scale", "step"):
            array = getattr(self, name)
            with np.errstate(divide="ignore", over="ignore"):
                bad = ~((array > 0) & np.isfinite(array) & np.isfinite(np.float32(1) / array))
            if bad.any():
                raise InputError(
                    f"{name} must be above 0 and finite, got {array[bad][0]} at {np.flatnonzero(bad)[0]}",
                    fix="calibrate it again",
                )

    @classmethod
    def of_weight(cls, weight: np.ndarray, scale: np.ndarray, step: np.ndarray, zero: np.ndarray) -> Quantized:
        """The grid whose `weight` is this one, float32 [n_out, n_in]. Raises InputError if an entry is off the grid."""
        with np.errstate(invalid="ignore", over="ignore"):
            values = np.clip(np.rint(weight * step / scale[:, None]), -128, 127).astype(np.int8)
        grid = cls(values, scale, step, zero)
        off = grid.weight != weight
        if off.any():
            row, col = np.argwhere(off)[0]
            raise InputError(
                f"{int(off.sum())} of {off.size} weights are off their int8 grid, the first in row {row}, column {col}",
                fix="quantize the model again",
            )
        return grid

    @property
    def weight(self) -> np.ndarray:
        """W, float32 [n_out, n_in]."""
        return self.scale[:, None] * self.values.astype(np.float32) / self.step


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """A `Quantized` weight in groups of rows that share one list of kept columns, in quads of QUAD_COLS columns. All
    arrays are read-only.

    row_begin: int64 [groups + 1], start of a group's rows in `rows`; a group has 4, 8, 12, ... or MOST_INT8_ROWS rows.
    rows: int32, row numbers of W, -1 if a group has fewer; each row of W occurs once.
    col_begin: int64 [groups], start of a group's columns in `cols`; groups may share a list. quads: int32 [groups].
    cols: uint16, below n_in; a list is filled up to whole quads with its last column, there with zero weights.
    value_begin: int64 [groups], start in `values`: int8 [rows, quads, QUAD_COLS]. INT8_OVERRUN zeros end `values`.
    scale, step, zero: as in Quantized.

    `pack_int8` makes one. Raises InputError if the arrays break these rules.
    """

    row_begin: np.ndarray
    rows: np.ndarray
    col_begin: np.ndarray
    quads: np.ndarray
    cols: np.ndarray
    value_begin: np.ndarray
    values: np.ndarray
    scale: np.ndarray
    step: np.ndarray
    zero: np.ndarray
    n_in: int
    n_out: int

    def __post_init__(self):
        _check_shape(self.n_out, self.n_in)
        groups = len(self.quads)
        _freeze(self, "row_begin", np.int64, groups + 1)
        for name, dtype in (("col_begin", np.int64), ("quads", np.int32), ("value_begin", np.int64)):
            _freeze(self, name, dtype, groups)
        for name, dtype in (("rows", np.int32), ("cols", np.uint16), ("values", np.int8)):
            _freeze(self, name, dtype, getattr(self, name).size)
        for name, dtype, size in (
            ("scale", np.float32, self.n_out), ("step", np.float32, self.n_in), ("zero", np.uint8, self.n_in),
        ):  # fmt: skip
            _freeze(self, name, dtype, size)
        _check_places(self, "pack_int8")

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return int(np.count_nonzero(self.values))

    @property
    def stored(self) -> int:
        """Number of entries that are multiplied: kept ones and empty places."""
        return int(np.diff(self.row_begin) @ self.quads.astype(np.int64)) * _dispatch.core().QUAD_COLS

    def linear(self, bias: np.ndarray | None, activation: str):
        """A layer with this weight, as an object of the compiled core."""
        return _dispatch.core().int8_linear(
            self.row_begin, self.rows, self.col_begin, self.quads, self.cols, self.value_begin, self.values, self.scale,
            self.step, self.zero, self.n_in, self.n_out, bias, activation,
        )  # fmt: skip


Packed = PackedRows | PackedGroups | PackedTiles | PackedInt8


def pack(weight: np.ndarray) -> PackedRows:
    """Packs W in the form *rows*: every row has its own columns. Entries that are 0 (of either sign) are dropped.

    weight: float32 [n_out, n_in], both at least 1, n_in at most 65536; finite; any memory layout.
    Raises InputError if that does not hold. `unpack(pack(weight))` equals `weight`.
    """
    _check_weight(weight)
    core = _dispatch.core()
    n_out, n_in = weight.shape
    slabs, slices, blocks = -(-n_in // core.SLAB_COLS), -(-n_out // core.SLICE_ROWS), -(-n_out // core.BLOCK_ROWS)
    kept = weight != 0
    starts = np.arange(0, n_in, core.SLAB_COLS)
    counts = np.add.reduceat(kept, starts, axis=1, dtype=np.int64)  # [n_out, slabs]

    # Blocks of rows with the most non-zeros first; in each slab, a block's rows with the most non-zeros first.
    order = np.full(blocks * core.BLOCK_ROWS, -1)
    order[:n_out] = np.argsort(-counts.sum(1), kind="stable")
    of_place = np.where(order[:, None] >= 0, counts[order], -1).reshape(blocks, core.BLOCK_ROWS, slabs)
    within = np.argsort(-of_place, axis=1, kind="stable")
    rows = np.take_along_axis(order.reshape(blocks, core.BLOCK_ROWS, 1), within, axis=1)
    rows = rows.transpose(2, 0, 1).reshape(slabs, -1)[:, : slices * core.SLICE_ROWS]
    real = rows >= 0
    length = np.where(real, counts[rows, np.arange(slabs)[:, None]], 0).reshape(slabs, slices, core.SLICE_ROWS).max(2)
    begin = np.cumsum(length) - length.ravel()
    entries = int(length.sum())
    if entries * core.SLICE_ROWS > MAX_NNZ:
        raise InputError(f"weight must have at most {MAX_NNZ} non-zeros", fix="split its rows")

    # The place of each row's first entry in each slab; its other entries follow SLICE_ROWS apart.
    place = np.empty((n_out, slabs), np.int64)
    lane = np.arange(slices * core.SLICE_ROWS) % core.SLICE_ROWS
    places = np.repeat(begin.reshape(slabs, slices), core.SLICE_ROWS, axis=1) * core.SLICE_ROWS + lane
    place[rows[real], np.nonzero(real)[0]] = places[real]
    runs = counts.ravel()
    before = np.cumsum(runs) - runs
    slots = np.repeat(place.ravel() - core.SLICE_ROWS * before, runs) + core.SLICE_ROWS * np.arange(runs.sum())
    first_of_run = (np.arange(n_out)[:, None] * n_in + starts).ravel()
    cols, values = np.zeros(entries * core.SLICE_ROWS, np.uint8), np.zeros(entries * core.SLICE_ROWS, np.float32)
    cols[slots] = np.flatnonzero(kept) - np.repeat(first_of_run, runs)
    values[slots] = weight[kept]
    shape = entries, core.SLICE_ROWS
    return PackedRows(
        np.ascontiguousarray(rows, np.int32).reshape(slabs, slices, core.SLICE_ROWS),
        np.ascontiguousarray(length, np.uint8),
        cols.reshape(shape),
        values.reshape(shape),
        n_in,
        n_out,
    )


def pack_groups(weight: np.ndarray, *, whole: bool = False) -> PackedGroups:
    """Packs W with its rows of equal support side by side: the fastest form for a weight pruned in groups of rows, and
    for a dense one. A group of fewer than GROUP_ROWS rows has empty places, which cost time.

    weight: as for `pack`. whole: keep all columns in all rows, zeros included. `unpack(pack_groups(weight))` equals
    `weight`.
    """
    _check_weight(weight)
    n_out, n_in = weight.shape
    size, tile = _dispatch.core().GROUP_ROWS, _dispatch.core().GROUP_SLICE
    rows, lists, owner, values = [], [], [], []
    for alike, cols in rows_alike(np.ones_like(weight, bool) if whole else weight != 0):
        for start in range(0, len(alike), size):
            group = alike[start : start + size]
            part = np.zeros((size, len(cols)), np.float32)
            part[: len(group)] = weight[np.ix_(group, cols)]
            values.append(part.reshape(size // tile, tile, -1).transpose(0, 2, 1).ravel())
            rows.append(np.pad(group, (0, size - len(group)), constant_values=-1))
            owner.append(len(lists))
        lists.append(cols)
    list_begin = np.concatenate(([0], np.cumsum([len(cols) for cols in lists])))
    if sum(map(len, values)) > MAX_NNZ or list_begin[-1] > MAX_NNZ:
        raise InputError(f"weight must have at most {MAX_NNZ} kept entries", fix="split its rows")
    return PackedGroups(
        np.array(rows, np.int32),
        col_begin=list_begin[owner].astype(np.int32),
        col_count=np.array([len(lists[i]) for i in owner], np.int32),
        cols=np.concatenate(lists).astype(np.uint16),
        value_begin=np.concatenate(([0], np.cumsum([len(v) for v in values])[:-1])).astype(np.int64),
        values=np.concatenate(values),
        n_in=n_in,
        n_out=n_out,
    )


def places_in_groups(weight: np.ndarray) -> int:
    """Number of entries that `pack_groups` stores for a weight, kept ones and empty places. Packs nothing."""
    size = _dispatch.core().GROUP_ROWS
    return sum(-(-len(rows) // size) * size * len(cols) for rows, cols in rows_alike(weight != 0))


def rows_alike(support: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows and the columns of each distinct support in bool [n_out, n_in]."""
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(map(bytes, np.packbits(support, axis=1))):
        rows.setdefault(key, []).append(row)
    return [(np.array(members), np.flatnonzero(support[members[0]])) for members in rows.values()]


# LEAST_ALIKE: rows of equal support that get a separate group. WHOLE_TILES: share of kept entries from which on a
# group's tiles are stored whole. OWN_LIST: share of the columns from which on a group of unlike rows uses the list of
# columns that all such groups share.
LEAST_ALIKE, WHOLE_TILES, OWN_LIST = 8, 0.5, 0.6


def pack_tiles(weight: np.ndarray) -> PackedTiles:
    """Packs W in tiles, rounded to bf16. At least LEAST_ALIKE rows of equal support form separate groups; the other
    rows are grouped in their order.

    weight: as for `pack`, and within bf16's range. `unpack(pack_tiles(weight))` equals `from_bf16(to_bf16(weight))`.
    """
    _check_weight(weight)
    n_out, n_in = weight.shape
    tile_rows, tile_cols = _dispatch.core().TILE_ROWS, _dispatch.core().TILE_COLS
    bits = to_bf16(weight)
    _check_finite("weight in bf16", from_bf16(bits))
    lists: dict[bytes, int] = {}
    parts: dict[str, list] = {name: [] for name in ("rows", "tiles", "begin", "chunks", "value", "mask")}
    cols_out, values_out, masks_out = [], [], []
    n_cols = n_values = n_masks = 0
    for rows, cols in _tile_groups((bits & 0x7FFF) != 0, 2 * tile_rows):
        tiles, chunks = -(-len(rows) // tile_rows), -(-len(cols) // tile_cols)
        filled = np.pad(cols, (0, chunks * tile_cols - len(cols)), mode="edge") if len(cols) else cols
        key = cols.tobytes()
        if key not in lists:
            lists[key] = n_cols
            cols_out.append(filled)
            n_cols += len(filled)
        block = np.zeros((tiles * tile_rows, chunks * tile_cols), np.uint16)
        block[: len(rows), : len(cols)] = bits[np.ix_(rows, cols)]
        block = block.reshape(tiles, tile_rows, chunks, tile_cols).transpose(2, 0, 1, 3)
        kept = (block & 0x7FFF) != 0
        whole = kept.mean() >= WHOLE_TILES if kept.size else True
        parts["rows"].append(np.pad(rows, (0, 2 * tile_rows - len(rows)), constant_values=-1))
        parts["tiles"].append(tiles)
        parts["begin"].append(lists[key])
        parts["chunks"].append(chunks)
        parts["value"].append(n_values)
        parts["mask"].append(-1 if whole else n_masks)
        values_out.append(block.ravel() if whole else block[kept])
        n_values += len(values_out[-1])
        if not whole:
            masks_out.append(np.packbits(kept, axis=-1, bitorder="little").view("<u4").ravel())
            n_masks += len(masks_out[-1])
    nothing = np.empty(0, np.int64)
    return PackedTiles(
        rows=np.array(parts["rows"], np.int32),
        tiles=np.array(parts["tiles"], np.int32),
        col_begin=np.array(parts["begin"], np.int64),
        chunks=np.array(parts["chunks"], np.int32),
        cols=np.concatenate([nothing, *cols_out]).astype(np.uint16),
        value_begin=np.array(parts["value"], np.int64),
        mask_begin=np.array(parts["mask"], np.int64),
        values=np.concatenate(values_out),
        masks=np.concatenate([nothing, *masks_out]).astype(np.uint32),
        n_in=n_in,
        n_out=n_out,
    )


def _tile_groups(support: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups of at most `most` rows, and the columns of each. support: bool [n_out, n_in], True where the weight is not
    zero.
    """
    groups, unlike = [], []
    for rows, cols in rows_alike(support):
        if len(rows) >= LEAST_ALIKE:
            groups += [(rows[at : at + most], cols) for at in range(0, len(rows), most)]
        else:
            unlike += rows.tolist()
    unlike = np.sort(np.array(unlike, np.int64))
    every = np.flatnonzero(support[unlike].any(0))
    for at in range(0, len(unlike), most):
        rows = unlike[at : at + most]
        own = np.flatnonzero(support[rows].any(0))
        groups.append((rows, own if len(own) < OWN_LIST * support.shape[1] else every))
    return groups


# Rows of a group -> cost of an entry in int8, measured on Zen 4.
INT8_COSTS = {4: 1.04, 8: 1.02, 16: 1.01, 32: 1.0}


def pack_int8(quantized: Quantized) -> PackedInt8:
    """Packs a weight in int8. Consecutive rows form groups of 4 to 32 rows, whichever is cheaper. They keep the columns
    that one of them keeps. `unpack(pack_int8(quantized))` equals `quantized.weight`.
    """
    values = quantized.values
    n_out, n_in = values.shape
    core = _dispatch.core()
    groups = int8_groups(values != 0)
    parts: dict[str, list] = {name: [] for name in ("rows", "begin", "quads", "cols", "value", "values")}
    lists: dict[bytes, int] = {}
    n_cols = n_values = 0
    for first, rows, cols in groups:
        quads = -(-len(cols) // core.QUAD_COLS)
        filled = np.pad(cols, (0, quads * core.QUAD_COLS - len(cols)), mode="edge") if len(cols) else cols
        key = cols.tobytes()
        if key not in lists:
            lists[key] = n_cols
            parts["cols"].append(filled)
            n_cols += len(filled)
        block = np.zeros((rows, len(filled)), np.int8)
        here = values[first : first + rows]
        block[: len(here), : len(cols)] = here[:, cols]
        parts["rows"].append(np.pad(np.arange(first, first + len(here)), (0, rows - len(here)), constant_values=-1))
        parts["begin"].append(lists[key])
        parts["quads"].append(quads)
        parts["value"].append(n_values)
        parts["values"].append(block.ravel())
        n_values += block.size
    nothing = np.empty(0, np.int64)
    return PackedInt8(
        row_begin=np.cumsum([0, *(rows for _, rows, _ in groups)]),
        rows=np.concatenate(parts["rows"]).astype(np.int32),
        col_begin=np.array(parts["begin"], np.int64),
        quads=np.array(parts["quads"], np.int32),
        cols=np.concatenate([nothing, *parts["cols"]]).astype(np.uint16),
        value_begin=np.array(parts["value"], np.int64),
        values=np.concatenate([*parts["values"], np.zeros(core.INT8_OVERRUN, np.int8)]),
        scale=quantized.scale,
        step=quantized.step,
        zero=quantized.zero,
        n_in=n_in,
        n_out=n_out,
    )


def places_in_int8(quantized: Quantized) -> int:
    """Number of entries that `pack_int8` stores, kept ones and empty places. Packs nothing."""
    quad = _dispatch.core().QUAD_COLS
    return sum(rows * -(-len(cols) // quad) * quad for _, rows, cols in int8_groups(quantized.values != 0))


def int8_groups(support: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """The first row, the number of rows and the columns of each group that `pack_int8` makes. support: bool
    [n_out, n_in].
    """
    heights = sorted(INT8_COSTS)
    union = np.pad(support, ((0, -len(support) % heights[-1]), (0, 0)))
    best: list[list[int]] = []  # of each group of the last height, the heights of the groups that it is made of
    cost = np.empty(0)
    for height in heights:
        union = union.reshape(-1, heights[0] if height == heights[0] else 2, union.shape[1]).any(1)
        own = (union.sum(1) + 1.0) * height * INT8_COSTS[height]
        if best:
            parts = cost.reshape(-1, 2).sum(1)
            best = [[height] if own[i] < parts[i] else best[2 * i] + best[2 * i + 1] for i in range(len(own))]
            cost = np.minimum(own, parts)
        else:
            best, cost = [[height]] * len(own), own
    groups, first = [], 0
    for height in (height for part in best for height in part):
        if first < len(support):
            groups.append((first, height, np.flatnonzero(support[first : first + height].any(0))))
        first += height
    return groups


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 (ties to even) of finite float32: uint16 of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpack(weight: Packed) -> np.ndarray:
    """The dense weight, float32 [n_out, n_in]."""
    dense = np.zeros((weight.n_out, weight.n_in), np.float32)
    if isinstance(weight, PackedTiles):
        return _unpack_tiles(weight, dense)
    if isinstance(weight, PackedInt8):
        return _unpack_int8(weight, dense)
    if isinstance(weight, PackedRows):
        slabs, slices, _ = weight.rows.shape
        of_slice = np.repeat(np.arange(slabs * slices), weight.counts.ravel())
        rows = weight.rows.reshape(slabs * slices, -1)[of_slice]
        cols = weight.cols + (of_slice // slices * _dispatch.core().SLAB_COLS)[:, None]
        real = weight.values != 0  # entries that fill up a row are zero
        dense[rows[real], cols[real]] = weight.values[real]
        return dense
    size, tile = _dispatch.core().GROUP_ROWS, _dispatch.core().GROUP_SLICE
    for group, begin, count, at in zip(
        weight.rows, weight.col_begin, weight.col_count, weight.value_begin, strict=True
    ):
        values = weight.values[at : at + count * size].reshape(size // tile, count, tile).transpose(0, 2, 1)
        real = group >= 0
        dense[np.ix_(group[real], weight.cols[begin : begin + count])] = values.reshape(size, count)[real]
    return dense


def _unpack_tiles(weight: PackedTiles, dense: np.ndarray) -> np.ndarray:
    tile_rows, tile_cols = _dispatch.core().TILE_ROWS, _dispatch.core().TILE_COLS
    for g, rows in enumerate(weight.rows):
        chunks, tiles = int(weight.chunks[g]), int(weight.tiles[g])
        cols = weight.cols[weight.col_begin[g] :][: chunks * tile_cols]
        block = np.zeros((chunks, tiles, tile_rows, tile_cols), np.uint16)
        if weight.mask_begin[g] >= 0:
            masks = weight.masks[weight.mask_begin[g] :][: chunks * tiles * tile_rows]
            kept = np.unpackbits(masks.astype("<u4").view(np.uint8), bitorder="little").view(bool).reshape(block.shape)
            block[kept] = weight.values[weight.value_begin[g] :][: kept.sum()]
        else:
            block.ravel()[:] = weight.values[weight.value_begin[g] :][: block.size]
        block = from_bf16(block.transpose(1, 2, 0, 3).reshape(tiles * tile_rows, chunks * tile_cols))
        at_rows, at_cols = np.nonzero(block)  # entries that fill up a list are zero
        dense[rows[at_rows], cols[at_cols]] = block[at_rows, at_cols]
    return dense


def bytes_of(x: np.ndarray, step: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The bytes of a linear's inputs in int8, uint8 as x [tokens, n_in]; step and zero as in `Quantized`."""
    low, half = -zero.astype(np.float32), np.float32(0.5)
    scaled = np.clip(x.astype(np.float32) * (np.float32(1) / step), low, low + 255)
    return (scaled + (half - low)).astype(np.uint8)


def _unpack_int8(weight: PackedInt8, dense: np.ndarray) -> np.ndarray:
    core = _dispatch.core()
    for g, quads in enumerate(weight.quads):
        rows = weight.rows[weight.row_begin[g] : weight.row_begin[g + 1]]
        cols = weight.cols[weight.col_begin[g] :][: quads * core.QUAD_COLS]
        block = weight.values[weight.value_begin[g] :][: len(rows) * len(cols)].reshape(len(rows), len(cols))
        at_rows, at_cols = np.nonzero(block)  # entries that fill up a list are zero
        dense[rows[at_rows], cols[at_cols]] = block[at_rows, at_cols]
    return weight.scale[:, None] * dense / weight.step


@dataclass(frozen=True, eq=False)
class Linear:
    """y = activation(x Wᵀ + b).

    weight: `pack(W)`, `pack_groups(W)`, `pack_tiles(W)` or `pack_int8(quantized)`, W [n_out, n_in].
    bias: float32 [n_out], or None for none.
    activation: "none", "gelu" (y Φ(y), Φ the normal distribution function: the exact form, not the tanh one), "relu" or
    "tanh".
    """

    weight: Packed
    bias: np.ndarray | None = None
    activation: str = "none"

    def __post_init__(self):
        w = self.weight
        if not isinstance(w, Packed):
            raise InputError(f"weight must be packed, got {_describe(w)}", fix="pass pack(weight)")
        if self.bias is not None:
            _check_array("bias", self.bias, np.float32, 1)
            if self.bias.size != w.n_out:
                raise InputError(f"bias must be [n_out = {w.n_out}], got {list(self.bias.shape)}", fix="match weight")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}", fix="pass one of these"
            )

    @cached_property
    def core(self):
        """This layer as an object of the compiled core."""
        return self.weight.linear(self.bias, self.activation)


def sparse_matmul(x: np.ndarray, linear: Linear, *, threads: int | None = None, isa: str | None = None) -> np.ndarray:
    """Runs a linear layer on tokens.

    x: float32 [tokens, n_in], C-contiguous. Any number of tokens, also 0: sequences are simply concatenated.
    threads: None for the cores this process may use.
    isa: None for the best instruction set under SPARSEBERT_ISA.
    Returns y: float32 [tokens, n_out], a new array.

    Sums are float32. With a weight in tiles, x is rounded to bf16 before the sums and y after them. Tiles are
    multiplied by amx or avx512_bf16; elsewhere by portable code, which is slow. A token's result is bit-equal whatever
    the other tokens, their number and the number of threads; in float32 also on avx2 and avx512. scalar rounds
    differently, and so do the packed forms. A kept weight passes on inf and NaN of x as IEEE arithmetic does. A pruned
    weight may do so too (as a dense matmul makes NaN of 0 * inf), if a zero of the packed form stands in its place. No
    value affects another token.

    Raises InputError for a wrong type, shape or layout, UnsupportedError for an isa this machine cannot run.
    """
    _check_array("x", x, np.float32, 2)
    if not isinstance(linear, Linear):
        raise InputError(f"linear must be a Linear, got {_describe(linear)}", fix="pass Linear(pack(weight))")
    if x.shape[1] != linear.weight.n_in:
        raise InputError(
            f"x must be [tokens, n_in = {linear.weight.n_in}], got {list(x.shape)}", fix="match x and weight"
        )
    return _dispatch.core().sparse_matmul(x, linear.core, _dispatch.isa(isa), _dispatch.threads(threads))


def sparse_matmul_ref(x: np.ndarray, linear: Linear) -> np.ndarray:
    """Reference for `sparse_matmul`, dense and in float64; y is not rounded. Returns [tokens, n_out]."""
    if isinstance(linear.weight, PackedTiles):
        x = from_bf16(to_bf16(x))
    if isinstance(linear.weight, PackedInt8):
        w = linear.weight
        x = (bytes_of(x, w.step, w.zero).astype(np.float64) - w.zero) * w.step
    y = x.astype(np.float64) @ unpack(linear.weight).astype(np.float64).T
    if linear.bias is not None:
        y = y + linear.bias.astype(np.float64)
    if linear.activation == "gelu":
        return y * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-y / math.sqrt(2.0))
    return {"none": np.asarray, "relu": lambda v: np.maximum(v, 0.0), "tanh": np.tanh}[linear.activation](y)


def _freeze(packed: object, name: str, dtype: type, size: int, ndim: int = 1) -> None:
    array = getattr(packed, name)
    _check_array(name, array, dtype, ndim)
    if array.size != size:
        raise InputError(f"{name} must have {size} entries, got {array.size}", fix="use pack(weight)")
    # The kernel trusts the indices, so they must not change after the check. Arrays that cannot be written to are not
    # copied: a file mapped for reading, and a read-only array that is not a view of another.
    if array.flags.writeable or not (array.flags.owndata or is_mapped(array)):
        array = array.copy()
        array.setflags(write=False)
    object.__setattr__(packed, name, array)


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array's data lies in a mapped file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def _check_array(name: str, array: object, dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        raise InputError(f"{name} must be {ndim}-d {np.dtype(dtype)}, got {_describe(array)}", fix="convert it first")
    if not array.flags.c_contiguous:
        raise InputError(
            f"{name} must be C-contiguous, got strides {array.strides} for shape {array.shape}",
            fix="pass it through numpy.ascontiguousarray",
        )


def _check_places(packed: PackedGroups | PackedTiles | PackedInt8, maker: str) -> None:
    if not np.array_equal(np.sort(packed.rows[packed.rows >= 0]), np.arange(packed.n_out)):
        raise InputError(f"rows must list each of {packed.n_out} rows once", fix=f"use {maker}(weight)")
    if packed.cols.size and int(packed.cols.max()) >= packed.n_in:
        raise InputError(f"cols must stay below n_in = {packed.n_in}", fix=f"use {maker}(weight)")


def _check_weight(weight: np.ndarray) -> None:
    if not isinstance(weight, np.ndarray) or weight.dtype != np.float32 or weight.ndim != 2:
        raise InputError(f"weight must be float32 [n_out, n_in], got {_describe(weight)}", fix="convert it first")
    _check_shape(*weight.shape)
    _check_finite("weight", weight)


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
