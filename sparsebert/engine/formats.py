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
    PackedRows,
    PackedTiles,
    pack,
    pack_groups,
    pack_tiles,
    places_in_groups,
)


@dataclass(frozen=True)
class Dtype:
    """A dtype of weights and states; sums are float32.

    tolerance: the largest allowed difference of logits from the golden ones, as a share of the largest golden logit; 0:
    the difference that rounding in float32 explains. isas: the instruction sets with kernels of their own, or None for
    all but scalar; elsewhere the portable path runs. lacking: what a machine without them lacks.
    """

    name: str
    tolerance: float
    isas: tuple[str, ...] | None
    lacking: str

    def has_kernel(self, isa: str) -> bool:
        """Whether this instruction set multiplies the dtype with kernels of its own."""
        return isa != "scalar" if self.isas is None else isa in self.isas

    def kernel(self, isa: str) -> str:
        """The instruction set of the kernels that run where the best one is `isa`."""
        if self.isas is None:
            return _dispatch.float32_isa(isa)
        return isa if isa in self.isas else "scalar"


@dataclass(frozen=True)
class Format:
    """A packed form. name: as `explain` says it. dtype: the name of its Dtype. pack: packs a float32 weight. entries:
    how many entries of a weight it multiplies. cost: the field of Costs with the cost of an entry; None if the form is
    the only one of its dtype.
    """

    name: str
    dtype: str
    pack: Callable[[np.ndarray], Packed]
    entries: Callable[[np.ndarray], int] | None = None
    cost: str | None = None


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("fp32", 0.0, None, "AVX2"),
        Dtype("bf16", 0.05, environment.BF16_ISAS, "AMX and no AVX-512 BF16"),
    )
}
FORMATS = (  # of equal costs, the first is chosen
    Format("groups", "fp32", pack_groups, places_in_groups, "groups"),
    Format("dense", "fp32", partial(pack_groups, whole=True), np.size, "groups"),
    Format("rows", "fp32", pack, np.count_nonzero, "rows"),
    Format("tiles", "bf16", pack_tiles),
)


def has_choice(dtype: str) -> bool:
    """Whether the cost table decides about forms of this dtype."""
    return sum(form.dtype == dtype for form in FORMATS) > 1


def pack_cheapest(weight: np.ndarray, table: Costs, dtype: str = "fp32") -> tuple[Packed, ...]:
    """A float32 weight in the cheapest form of a dtype for each of TOKENS, or in its only form for all batches; each
    form is packed once.
    """
    forms = [form for form in FORMATS if form.dtype == dtype]
    if len(forms) == 1:
        return (forms[0].pack(weight),)
    entries = {form.name: form.entries(weight) for form in forms}
    chosen = [
        min(forms, key=lambda form: getattr(table, form.cost)[kind] * entries[form.name]) for kind in range(len(TOKENS))
    ]
    made = {form.name: form.pack(weight) for form in dict.fromkeys(chosen)}
    return tuple(made[form.name] for form in chosen)


def explained(weight: Packed) -> tuple[str, str]:
    """The name of a packed weight's form, and why it was chosen."""
    size, stored = weight.n_in * weight.n_out, weight.stored
    if isinstance(weight, PackedTiles):
        whole = float((weight.mask_begin < 0).mean())
        return "tiles", f"{stored / size:.0%} of the matrix in tiles, {whole:.0%} of the groups' tiles stored whole"
    if isinstance(weight, PackedRows):
        return "rows", "rows share too few kept columns for groups to be cheaper"
    assert isinstance(weight, PackedGroups)
    if len(np.unique(weight.col_begin)) == 1 and stored >= size:
        return "dense", f"{weight.nnz / size:.0%} is kept: the dense form is cheaper"
    return "groups", f"groups of rows with the same columns; {weight.nnz / stored:.0%} of their places kept"
