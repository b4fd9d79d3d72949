"""The dtypes that the engine runs in, and the packed forms of a linear: one row each. A new form is a row here, a class
and a packer in ops/sparse_matmul.py, and a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparsebert import environment
from sparsebert.engine.costs import TOKENS, Costs
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import (
    Packed,
    PackedGroups,
    PackedInt8,
    PackedRows,
    PackedTiles,
    Quantized,
    pack,
    pack_groups,
    pack_int8,
    pack_tiles,
    places_in_groups,
    places_in_int8,
)


@dataclass(frozen=True)
class Dtype:
    """A dtype of weights and states; sums are float32. In int8 that of the weights, and of the linears' inputs; the
    states are float32, and sums of products are exact.

    tolerance: the largest allowed difference of logits from the golden ones, as a share of the largest golden logit; 0:
    the difference that rounding in float32 explains. isas: the instruction sets with kernels of their own, and scalar,
    the portable path. lacking: what a machine lacks that runs on it.
    """

    name: str
    tolerance: float
    isas: tuple[str, ...]
    lacking: str

    def kernel(self, isa: str) -> str:
        """The instruction set of the kernels that run where the best one is `isa`."""
        return _dispatch.kernels_of(isa, self.isas)

    def has_kernel(self, isa: str) -> bool:
        """Whether this instruction set multiplies the dtype faster than the portable path."""
        return self.kernel(isa) != "scalar"


@dataclass(frozen=True)
class Format:
    """A packed form. name: as `explain` says it. dtypes: the names of the Dtypes that may use it. pack: packs a float32
    weight, or its grid. entries: how many entries of that it multiplies. cost: the field of Costs with the cost of an
    entry; None if the form is the only one of its dtype.
    """

    name: str
    dtypes: tuple[str, ...]
    pack: Callable[..., Packed]
    entries: Callable[..., int] | None = None
    cost: str | None = None
    of_grid: bool = False


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("fp32", 0.0, environment.FLOAT32_ISAS, "AVX2"),
        Dtype("bf16", 0.05, ("scalar", *environment.BF16_ISAS), "AMX and no AVX-512 BF16"),
        Dtype("int8", 0.05, environment.INT8_ISAS, "AVX2"),
    )
}
FORMATS = (  # of equal costs, the first is chosen
    Format("groups", ("fp32",), pack_groups, places_in_groups, "groups"),
    Format("dense", ("fp32",), partial(pack_groups, whole=True), np.size, "groups"),
    Format("int8", ("int8",), pack_int8, places_in_int8, "int8", of_grid=True),
    Format("rows", ("fp32", "int8"), pack, np.count_nonzero, "rows"),
    Format("tiles", ("bf16",), pack_tiles),
)


FORM_DTYPES = {form.name: form.dtypes[0] for form in FORMATS}  # in which a form multiplies


def has_choice(dtype: str) -> bool:
    """Whether the cost table decides about forms of this dtype."""
    return sum(dtype in form.dtypes for form in FORMATS) > 1


def pack_cheapest(
    weight: np.ndarray, table: Costs, dtype: str = "fp32", grid: Quantized | None = None
) -> tuple[Packed, ...]:
    """A float32 weight in the cheapest form of a dtype for each of TOKENS, or in its only form for all batches; each
    form is packed once. grid: its int8 grid. A weight without one is multiplied in float32 if the dtype is int8.
    """
    forms = [form for form in FORMATS if ("fp32" if dtype == "int8" and grid is None else dtype) in form.dtypes]
    if len(forms) == 1:
        return (forms[0].pack(weight),)
    entries = {form.name: form.entries(grid if form.of_grid else weight) for form in forms}
    chosen = [
        min(forms, key=lambda form: getattr(table, form.cost)[kind] * entries[form.name]) for kind in range(len(TOKENS))
    ]
    made = {form.name: form.pack(grid if form.of_grid else weight) for form in dict.fromkeys(chosen)}
    return tuple(made[form.name] for form in chosen)


def explained(weight: Packed) -> tuple[str, str]:
    """The name of a packed weight's form, and why it was chosen."""
    size, stored = weight.n_in * weight.n_out, weight.stored
    if isinstance(weight, PackedTiles):
        whole = float((weight.mask_begin < 0).mean())
        return "tiles", f"{stored / size:.0%} of the matrix in tiles, {whole:.0%} of the groups' tiles stored whole"
    if isinstance(weight, PackedInt8):
        heights = np.diff(weight.row_begin)
        sizes = ", ".join(f"{(heights == h) @ heights / heights.sum():.0%} of {h}" for h in np.unique(heights))
        return "int8", f"rows in groups: {sizes}; {weight.nnz / max(stored, 1):.0%} of their places kept"
    if isinstance(weight, PackedRows):
        return "rows", "rows share too few kept columns for groups to be cheaper"
    assert isinstance(weight, PackedGroups)
    if len(np.unique(weight.col_begin)) == 1 and stored >= size:
        return "dense", f"{weight.nnz / size:.0%} is kept: the dense form is cheaper"
    return "groups", f"groups of rows with the same columns; {weight.nnz / stored:.0%} of their places kept"
