"""The forms of a linear on a GPU: one row each, and the choice among them. A new form is a row here, a class and a
packer in kernels/sparse_matmul.py, and a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsebert.engine import cuda_costs
from sparsebert.engine.cuda_costs import DTYPES, LONG, MARGIN, TOKENS, Costs
from sparsebert.errors import UnsupportedError
from sparsebert.kernels import cuda_core
from sparsebert.kernels.sparse_matmul import (
    MAX_N_IN,
    Groups,
    Weight,
    pack_bitmask,
    pack_two_four,
    pack_vnm,
    sparse_matmul,
)
from sparsebert.ops.sparse_matmul import Linear, rows_alike, unpack
from sparsebert.patterns import VNM

UNMEASURED = "no form is measured on this GPU: sparsebert doctor --tune"
KEPT = 0.1  # of the groups and bitmasks whose cost is measured
# Of a result, as a share of the largest, at least of 1: sums of float32, and bf16's rounding of results of either sign.
SUMS, ONCE, TWICE = 1e-5, 2**-8 + 1e-5, 2**-7 + 1e-5


@dataclass(frozen=True)
class Form:
    """A form of W [n_out, n_in]; `sparse_matmul` multiplies what `pack` returns.

    holds: what it can hold, in words. entries: how many values it reads of a support, bool [n_out, n_in], and what says
    where they stand counted as values; None if it cannot hold it. pack: packs a W that it can hold, float32, in a dtype
    on a device. sample: a random W, float32, of a size that it can hold, as its cost is measured. tolerance: dtype ->
    the largest difference from the exact result, as a share of the largest result or of 1; other dtypes it has not.
    missing: why a device has not the form, None if it has. longest: the index of the last of TOKENS for which it is
    used. invariant: a token's result has the same bits whatever the other tokens. launches: of kernels, per call with a
    bias. kernel: in what it is written.
    """

    name: str
    holds: str
    entries: Callable[[np.ndarray], int | None]
    pack: Callable[[np.ndarray, torch.dtype, torch.device], Weight]
    sample: Callable[[int, int, np.random.Generator], np.ndarray]
    tolerance: dict[str, float]
    missing: Callable[[torch.device], str | None] = lambda device: None
    longest: int = LONG
    invariant: bool = True
    launches: int = 1
    kernel: str = "triton"


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """A linear on the device. forms: the name of its form for each of TOKENS. why: the reason, likewise. weights: by
    form.
    """

    forms: tuple[str, ...]
    why: tuple[str, ...]
    weights: dict[str, Weight]
    bias: torch.Tensor | None
    activation: str

    def __call__(self, x: torch.Tensor, kind: int, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes activation(W x + b) to `out`, by the form for TOKENS[kind]; the arrays are those of the op."""
        weight = self.weights[self.forms[kind]]
        return sparse_matmul(x, weight, self.bias, self.activation, tokens=tokens, out=out)


def on_device(
    linear: Linear, dtype: torch.dtype, device: torch.device, table: Costs | None = None, *, invariant: bool = False
) -> DeviceLinear:
    """A linear on the device, in the form that costs least for each of TOKENS; each form is stored once.

    table: None for the form *fused*, whatever it costs. invariant: one form for all batches, and one whose result does
    not depend on the other tokens.
    """
    weight = unpack(linear.weight)
    if table is None:
        forms, why = ("fused",) * len(TOKENS), ("it is small",) * len(TOKENS)
    else:
        forms, why = chosen(weight != 0, dtype, device, table, invariant=invariant)
    made = {form: FORMS[form].pack(weight, dtype, device) for form in dict.fromkeys(forms)}
    bias = None if linear.bias is None else torch.tensor(linear.bias, device=device)
    return DeviceLinear(forms, why, made, bias, linear.activation)


def chosen(
    support: np.ndarray, dtype: torch.dtype, device: torch.device, table: Costs, *, invariant: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The name of the cheapest form for each of TOKENS, and why. support: bool [n_out, n_in].

    *dense*, and if invariant *fused*, gives way only to a form that was measured on this GPU, as it was itself, and
    that costs less by more than the table may be wrong.
    """
    known = "fused" if invariant else "dense"
    held = _entries([form for form in _allowed(dtype, device, invariant) if form.name in table], support)
    forms, why = [], []
    for kind in [LONG] * len(TOKENS) if invariant else range(len(TOKENS)):
        ns = {form: cuda_costs.cost(table, form, kind, held[form]) for form in held if kind <= FORMS[form].longest}
        ns = {form: cost for form, cost in ns.items() if cost is not None}
        if known not in ns:
            forms.append(known)
            why.append(UNMEASURED)
            continue
        best = min(ns, key=ns.__getitem__)
        if ns[best] > MARGIN * ns[known]:
            best = known
        forms.append(best)
        other = known if best != known else min(ns.keys() - {known}, key=ns.__getitem__, default=None)
        versus = "" if other is None else f", {other} {ns[other] / 1e3:.1f}"
        why.append(f"{ns[best] / 1e3:.1f} us by the cost table{versus}")
    return tuple(forms), tuple(why)


def hint(support: np.ndarray, dtype: torch.dtype, device: torch.device, *, invariant: bool) -> str:
    """Which form may be faster than all columns in short batches, by bytes alone; empty if none is."""
    ns = {
        form: cuda_costs.estimate(FORMS[form].launches, entries, support.shape, TOKENS[0], dtype)
        for form, entries in _entries(_allowed(dtype, device, invariant), support).items()
    }
    best = min(ns, key=ns.__getitem__)
    if ns[best] > MARGIN * ns["fused"]:
        return ""
    return f" ({best} may pay in short batches: by bytes {ns[best] / 1e3:.1f} us, fused {ns['fused'] / 1e3:.1f})"


def _allowed(dtype: torch.dtype, device: torch.device, invariant: bool) -> list[Form]:
    """The forms that this device has in a dtype."""
    name = next(name for name in DTYPES if DTYPES[name] == dtype)
    forms = [form for form in FORMS.values() if name in form.tolerance and (form.invariant or not invariant)]
    return [form for form in forms if form.missing(device) is None]


def _entries(forms: list[Form], support: np.ndarray) -> dict[str, int]:
    """The entries of those that can hold a support."""
    entries = {form.name: form.entries(support) for form in forms}
    return {form: count for form, count in entries.items() if count is not None}


# --- dense ---


def _dense(weight: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(weight).to(device, dtype)


def _full(n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n_out, n_in), np.float32)


# --- groups of rows ---


def groups_of(support: np.ndarray, height: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows and the columns of each group of at most `height` rows, those with the most columns first. Rows of equal
    support form groups; what is left over of these, if it fills less than half a group, forms groups that keep the
    columns that one of their rows keeps. support: bool [n_out, n_in].
    """
    groups, unlike = [], []
    for rows, cols in rows_alike(support):
        for start in range(0, len(rows), height):
            part = rows[start : start + height]
            if 2 * len(part) >= height:
                groups.append((part, cols))
            else:
                unlike.append(part)
    left = np.sort(np.concatenate([np.empty(0, np.int64), *unlike]))
    for start in range(0, len(left), height):
        part = left[start : start + height]
        groups.append((part, np.flatnonzero(support[part].any(0))))
    return sorted(groups, key=lambda group: -len(group[1]))


def places(support: np.ndarray, height: int) -> int:
    """Number of places of `groups_of`, kept ones and empty ones."""
    return height * sum(len(cols) for _, cols in groups_of(support, height))


def grouped(
    weight: np.ndarray, height: int, dtype: torch.dtype, device: torch.device, *, whole: bool = False
) -> Groups:
    """Packs W, float32 [n_out, n_in], in groups of at most `height` rows. whole: keep all columns in all rows."""
    n_out, n_in = weight.shape
    if whole:
        found = [(np.arange(at, min(at + height, n_out)), np.arange(n_in)) for at in range(0, n_out, height)]
    else:
        found = groups_of(weight != 0, height)
    rows = np.full((len(found), height), -1, np.int32)
    values = np.zeros((sum(len(cols) for _, cols in found), height), np.float32)
    begin = np.concatenate(([0], np.cumsum([len(cols) for _, cols in found]))).astype(np.int32)
    for g, (own, cols) in enumerate(found):
        rows[g, : len(own)] = own
        values[begin[g] : begin[g + 1], : len(own)] = weight[np.ix_(own, cols)].T
    every = np.concatenate([cols for _, cols in found]).astype(np.int32)
    return Groups(
        rows=torch.from_numpy(rows).to(device),
        begin=torch.from_numpy(begin).to(device),
        cols=None if whole else torch.from_numpy(every).to(device),
        values=torch.from_numpy(values).to(device, dtype),
        n_out=n_out,
    )


def _groups(height: int) -> Form:
    def sample(n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
        kept = rng.random((-(-n_out // height), n_in)) < KEPT
        return _full(n_out, n_in, rng) * np.repeat(kept, height, axis=0)[:n_out]

    return Form(
        name=f"groups{height}",
        holds=f"any weight; cheap if any {height} rows keep the same columns",
        entries=lambda support: places(support, height) * (height + 2) // height,  # a column number is 4 bytes
        pack=lambda weight, dtype, device: grouped(weight, height, dtype, device),
        sample=sample,
        tolerance={"fp32": SUMS, "bf16": ONCE},
    )


# --- V:2:M, 2:4 and bitmasks ---


def vnm_of(support: np.ndarray, v: int) -> VNM | None:
    """The pattern v:2:m of the largest m that a support, bool [n_out, n_in], keeps to; None if it keeps to none."""
    n_out, n_in = support.shape
    if n_out % v or n_in > MAX_N_IN:
        return None
    most = max(1, int(support.sum(1).max()))
    for m in range(min(n_in, 2 * n_in // most), 4, -1):
        if n_in % m:
            continue
        # Most supports keep to none, as the first rows show.
        if all(_keeps_to(rows.reshape(-1, v, n_in // m, m)) for rows in (support[:v], support)):
            return VNM(v, 2, m)
    return None


def _keeps_to(blocks: np.ndarray) -> bool:
    """Whether each row keeps at most 2, and rows together 4, columns of a block: bool [groups, v, blocks, m]."""
    return blocks.any(1).sum(2).max() <= 4 and blocks.sum(3).max() <= 2


def _vnm(v: int) -> Form:
    def entries(support: np.ndarray) -> int | None:
        pattern = vnm_of(support, v)
        # Of 4 kept columns of a block 2 are stored per row, with 2 bits of 16 each that say which.
        return None if pattern is None else len(support) * _up(support.shape[1] // pattern.m * 4, 32) // 2 * 9 // 8

    def pack(weight: np.ndarray, dtype: torch.dtype, device: torch.device) -> Weight:
        return pack_vnm(torch.from_numpy(weight), vnm_of(weight != 0, v)).to(device)

    def sample(n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
        m = next(m for m in range(16, n_in + 1) if n_in % m == 0)
        cols = rng.random((n_out // v, 1, n_in // m, m)).argsort(-1)[..., :4]
        cols = np.take_along_axis(cols.repeat(v, 1), rng.random((n_out // v, v, n_in // m, 4)).argsort(-1)[..., :2], -1)
        weight = np.zeros((n_out // v, v, n_in // m, m), np.float32)
        np.put_along_axis(weight, cols, rng.standard_normal(cols.shape, np.float32), -1)
        return weight.reshape(n_out, n_in)

    return Form(
        name=f"vnm{v}",
        holds=f"{v}:2:M with M > 4, and n_out a multiple of {v}",
        entries=entries,
        pack=pack,
        sample=sample,
        tolerance={"bf16": ONCE},
        missing=_no_cuda_core,
        kernel="cuda",
    )


def _no_cuda_core(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on a GPU only"
    try:
        cuda_core()
    except UnsupportedError as error:
        return str(error)
    return None


def _no_cusparselt(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on a GPU only"
    return None if torch.backends.cusparselt.is_available() else "this torch is built without cuSPARSELt"


def _two_four_entries(support: np.ndarray) -> int | None:
    n_out, n_in = support.shape
    if n_out % 16 or n_in % 16:
        return None
    if any(rows.reshape(-1, n_in // 4, 4).sum(2).max() > 2 for rows in (support[:16], support)):
        return None
    return support.size // 2 * 9 // 8  # 2 bits of 16 say where a value stands


def _two_four_sample(n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
    rank = rng.random((n_out, n_in // 4, 4)).argsort(2)
    return _full(n_out, n_in, rng) * (rank < 2).reshape(n_out, n_in)


def _bitmask_entries(support: np.ndarray) -> int:
    # Tiles are expanded whatever is in them, so that fewer values than were measured do not cost less.
    return max(int(support.sum()), int(KEPT * support.size)) + support.size // 16


def _unstructured(n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
    return _full(n_out, n_in, rng) * (rng.random((n_out, n_in)) < KEPT)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "dense",
            "any weight; torch's matmul",
            np.size,
            _dense,
            _full,
            {"fp32": SUMS, "bf16": TWICE},
            invariant=False,
            launches=2,
            kernel="torch",
        ),
        Form(
            "fused",
            "any weight; all columns",
            np.size,
            lambda weight, dtype, device: grouped(weight, 64, dtype, device, whole=True),
            _full,
            {"fp32": SUMS, "bf16": ONCE},
        ),
        *map(_groups, (16, 32, 64)),
        *map(_vnm, (32, 64, 128)),
        Form(
            "two_four",
            "2:4, and both sizes multiples of 16; cuSPARSELt",
            _two_four_entries,
            lambda weight, dtype, device: pack_two_four(_dense(weight, dtype, device)),
            _two_four_sample,
            {"bf16": TWICE},
            missing=_no_cusparselt,
            invariant=False,
            launches=2,
            kernel="cusparselt",
        ),
        Form(
            "bitmask",
            f"any weight, in batches of at most {cuda_costs.BOUNDS[0]} tokens; cheap if zeros stand anywhere",
            _bitmask_entries,
            lambda weight, dtype, device: pack_bitmask(_dense(weight, dtype, device)),
            _unstructured,
            {"fp32": SUMS, "bf16": ONCE},
            longest=0,
            launches=2,
        ),
    )
}
