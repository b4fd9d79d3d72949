"""The forms of a linear on a GPU, and their costs on this GPU: the table by which the engine chooses a form. A form
whose cost was not measured here is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import triton

from sparsebert.engine.costs import require_place, store, stored
from sparsebert.engine.measure import interleave
from sparsebert.kernels.sparse_matmul import Groups, sparse_matmul
from sparsebert.ops.sparse_matmul import Linear, rows_alike, unpack

# dense: torch's matmul. fused: all columns, by our kernel. The others: groups of so many rows.
HEIGHTS = {"dense": 1, "fused": 64, "groups16": 16, "groups32": 32, "groups64": 64}
TOKENS = (32, 128, 512, 4096)  # at which each form is measured
BOUNDS = (64, 256, 1024)  # where the next of TOKENS counts
LONG = len(TOKENS) - 1
UNMEASURED = "unmeasured"
Costs = dict[str, tuple[float | str, ...]]  # form -> ns per entry of the matrix, for each of TOKENS
SHIPPED: Costs = dict.fromkeys(HEIGHTS, (UNMEASURED,) * len(TOKENS))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VERSION = 1  # of the measurement and of the measured kernels


def kind_of(tokens: int) -> int:
    """The index in TOKENS of the entry used for a batch of this many tokens."""
    return sum(tokens >= bound for bound in BOUNDS)


def costs(gpu: str, dtype: str) -> Costs:
    """The costs that `measure` has stored for this GPU and dtype, else SHIPPED. Nothing is timed here, so the same
    model on the same machine always runs the same kernels.
    """
    kept = stored().get(_key(gpu, dtype))
    try:
        found = {form: tuple(float(cost) for cost in kept[form]) for form in HEIGHTS}
    except (ValueError, KeyError, TypeError):  # no costs of this GPU, or a damaged file
        return SHIPPED
    sound = all(len(part) == len(TOKENS) and all(0 < cost < math.inf for cost in part) for part in found.values())
    return found if sound else SHIPPED


def _key(gpu: str, dtype: str) -> str:
    return f"{gpu}, {dtype}, torch {torch.__version__}, triton {triton.__version__}, version {VERSION}"


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """A linear on the device. forms: the name of its form for each of TOKENS. why: the reason, likewise. weights: by
    form.
    """

    forms: tuple[str, ...]
    why: tuple[str, ...]
    weights: dict[str, Groups | torch.Tensor]
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
        forms, why = _chosen(weight != 0, table, invariant)
    made: dict[str, Groups | torch.Tensor] = {}
    for form in dict.fromkeys(forms):
        if form == "dense":
            made[form] = torch.from_numpy(weight).to(device, dtype)
        else:
            made[form] = grouped(weight, HEIGHTS[form], dtype, device, whole=form == "fused")
    bias = None if linear.bias is None else torch.tensor(linear.bias, device=device)
    return DeviceLinear(forms, why, made, bias, linear.activation)


def _chosen(support: np.ndarray, table: Costs, invariant: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The name of the cheapest form for each of TOKENS, and why. support: bool [n_out, n_in]."""
    known = "fused" if invariant else "dense"
    allowed = [form for form in HEIGHTS if form != "dense" or not invariant]
    kinds = [LONG] * len(TOKENS) if invariant else range(len(TOKENS))
    entries: dict[str, int] = {}
    forms, why = [], []
    for kind in kinds:
        measured = [form for form in allowed if table[form][kind] != UNMEASURED]
        if known not in measured:
            forms.append(known)
            why.append("no form is measured on this GPU: sparsebert doctor --tune")
            continue
        for form in measured:
            if form not in entries:
                whole = form in ("dense", "fused")
                entries[form] = support.size if whole else places(support, HEIGHTS[form])
        ns = {form: table[form][kind] * entries[form] for form in measured}
        best = min(ns, key=ns.__getitem__)
        forms.append(best)
        why.append(f"{ns[best] / 1e3:.1f} us by the cost table, {known} {ns[known] / 1e3:.1f}")
    return tuple(forms), tuple(why)


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


# The measured matrix is [SIZE, SIZE], of which groups keep a share KEPT.
SIZE, KEPT, CALLS = 768, 0.1, 20


def measure(gpu: str, device: torch.device, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Times all forms on the GPU, which takes a few seconds, and stores the costs. The time of a launch counts as part
    of the entries' cost, so that a form with fewer entries is not made to look better than it is. Raises OutputError if
    there is no place to store them.
    """
    require_place()
    total, done = len(DTYPES) * len(TOKENS), 0
    found = {}
    for name, dtype in DTYPES.items():
        linears = _measured_linears(dtype, device)
        ns: dict[str, list[float]] = {form: [] for form in HEIGHTS}
        for tokens in TOKENS:
            progress(done, total)
            taken = seconds({form: linear for form, (linear, _) in linears.items()}, SIZE, tokens, dtype, device)
            for form, (_, entries) in linears.items():
                ns[form].append(1e9 * taken[form] / entries)
            done += 1
        found[_key(gpu, name)] = ns
    progress(total, total)
    store(found)


def _measured_linears(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[DeviceLinear, int]]:
    """For each form a linear, and its number of entries."""
    rng = np.random.default_rng(0)
    found = {}
    for form, height in HEIGHTS.items():
        weight = rng.standard_normal((SIZE, SIZE), np.float32)
        whole = form in ("dense", "fused")
        if not whole:
            weight *= np.repeat(rng.random((SIZE // height, SIZE)) < KEPT, height, axis=0)
        packed = (
            torch.from_numpy(weight).to(device, dtype)
            if form == "dense"
            else grouped(weight, height, dtype, device, whole=whole)
        )
        bias = torch.zeros(SIZE, device=device)
        linear = DeviceLinear((form,) * len(TOKENS), ("",) * len(TOKENS), {form: packed}, bias, "none")
        found[form] = linear, SIZE * SIZE if whole else places(weight != 0, height)
    return found


def seconds(
    linears: dict[str, DeviceLinear], n_in: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Seconds per call of each linear, the fastest of several rounds, within a CUDA graph of CALLS calls."""
    x = torch.randn(n_in, tokens, device=device).to(dtype)
    count = torch.tensor([tokens], dtype=torch.int32, device=device)
    kind, calls, outs = kind_of(tokens), {}, []  # the graphs write to `outs`, which must live as long
    for name, linear in linears.items():
        weight = linear.weights[linear.forms[kind]]
        n_out = weight.n_out if isinstance(weight, Groups) else len(weight)
        outs.append(torch.empty(n_out, tokens, dtype=dtype, device=device))
        call = partial(linear, x, kind, count, outs[-1])
        calls[name] = partial(_replayed, captured(lambda call=call: [call() for _ in range(CALLS)]))
    timings = interleave(calls, rounds=20)
    return {name: timings.minimum(name) / CALLS for name in calls}


def _replayed(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
    torch.cuda.synchronize()


def captured(work: Callable[[], object], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `work` launches. It is run once before, which compiles its kernels. pool: of the memory that
    it allocates.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
