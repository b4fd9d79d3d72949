"""The costs of the forms of a linear on this GPU: the table by which the engine chooses a form, and how it is measured.

A form that was not measured on this GPU is not chosen. What bytes and launches alone would take is an estimate, which
only says whether measuring may pay.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from torch.sparse import SparseSemiStructuredTensor

from sparsebert.engine.costs import require_place, store, stored
from sparsebert.engine.cuda_graphs import captured, queue
from sparsebert.engine.measure import interleave
from sparsebert.errors import SparsebertWarning, UnsupportedError, first_line
from sparsebert.kernels.sparse_matmul import Weight, sparse_matmul

if TYPE_CHECKING:
    from sparsebert.engine.cuda_forms import Form

TOKENS = (32, 128, 512, 4096)  # at which each form is measured
BOUNDS = (64, 256, 1024)  # the most tokens for which each of these but the last counts
LONG = len(TOKENS) - 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VERSION = 2  # of the measurement and of the measured kernels
MARGIN = 0.9  # of the cost of dense, which a form must be below: costs are a line through two measured sizes

# form -> for each of TOKENS: ns per call and ns per entry; None: not measured.
Line = tuple[float, float]
Costs = dict[str, tuple[Line | None, ...]]
NONE: Costs = {}  # nothing is measured


def kind_of(tokens: int) -> int:
    """The index in TOKENS of the entry used for a batch of this many tokens."""
    return sum(tokens > bound for bound in BOUNDS)


def costs(gpu: str, dtype: str) -> Costs:
    """The costs that `measure` has stored for this GPU and dtype, else NONE. Nothing is timed here, so the same model
    on the same machine always runs the same kernels.
    """
    try:
        return {form: _lines(lines) for form, lines in stored()[_key(gpu, dtype)].items()}
    except (ValueError, LookupError, TypeError, AttributeError):  # no costs of this GPU, or a damaged file
        return NONE


def _lines(given: Sequence[Sequence[float] | None]) -> tuple[Line | None, ...]:
    """The lines of a form, from a file. Raises ValueError, IndexError or TypeError if they are damaged."""
    lines = tuple(None if line is None else (float(line[0]), float(line[1])) for line in given)
    numbers = [number for line in lines if line is not None for number in line]
    if len(lines) != len(TOKENS) or not all(0 <= number < math.inf for number in numbers):
        raise ValueError("not the costs of a form")
    return lines


def cost(table: Costs, form: str, kind: int, entries: int) -> float | None:
    """ns per call of a form with so many entries, for TOKENS[kind]. None if that was not measured."""
    lines = table.get(form)
    if lines is None or lines[kind] is None:
        return None
    per_call, per_entry = lines[kind]
    return per_call + per_entry * entries


def _key(gpu: str, dtype: str) -> str:
    return f"{gpu}, {dtype}, torch {torch.__version__}, triton {triton.__version__}, version {VERSION}"


LAUNCH_NS = 1000.0  # assumed
BYTES_PER_NS = 1000.0  # assumed if the GPU does not tell its own


def estimate(launches: int, entries: int, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> float:
    """ns per call if it did nothing but launch, and read and write each byte once: unmeasured."""
    values = entries + sum(shape) * tokens
    return launches * LAUNCH_NS + values * dtype.itemsize / _bytes_per_ns()


def _bytes_per_ns() -> float:
    """What this GPU's memory could deliver, by its clock."""
    if not torch.cuda.is_available():
        return BYTES_PER_NS
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    kilohertz, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    return 2 * kilohertz * 1e3 * bits / 8 / 1e9 or BYTES_PER_NS


# The measured matrices are square. CALLS: in a graph, at least.
SIZES, CALLS, ROUNDS = (768, 3072), 20, 20


def measure(
    forms: Iterable[Form],
    gpu: str,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Times the forms that this GPU has, and stores their costs: for each number of tokens a line through two sizes of
    a matrix. A form that does not run here, or gives a wrong result, is left out with a warning, and so never chosen.
    Raises OutputError if there is no place to store them.
    """
    require_place()
    total, done, found = len(DTYPES) * len(SIZES), 0, {}
    for name, dtype in DTYPES.items():
        here = []
        for form in forms:
            if name in form.tolerance and form.missing(device) is None:
                if (why := fault(form, name, device)) is None:
                    here.append(form)
                else:
                    warnings.warn(f"{form.name} in {name} is left out on {gpu}: {why}", SparsebertWarning, stacklevel=2)
        points: dict[str, list[list[tuple[int, float]]]] = {form.name: [[] for _ in TOKENS] for form in here}
        for size in SIZES:
            progress(done, total)
            for form, kind, entries, ns in _times(here, size, dtype, device):
                points[form][kind].append((entries, ns))
            done += 1
        found[_key(gpu, name)] = {form: [_line(*two) if two else None for two in by] for form, by in points.items()}
    progress(total, total)
    store(found)


def fault(form: Form, dtype: str, device: torch.device) -> str | None:
    """Why a form cannot be used on this device, after one product by a CUDA graph: it does not run, or is off by more
    than its tolerance. None if nothing is wrong.
    """
    rng, of = np.random.default_rng(0), DTYPES[dtype]
    weight = form.sample(256, 256, rng)
    x = torch.from_numpy(rng.standard_normal((256, 64), np.float32)).to(of)
    try:
        got = _in_a_graph(form.pack(weight, of, device), x.to(device), weight.shape[0]).double()
    except UnsupportedError as error:
        return str(error)
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        return f"it does not run in a CUDA graph: {first_line(error)}"
    want = torch.from_numpy(weight).to(of).double() @ x.double()
    off = float((got - want).abs().max() / max(1.0, float(want.abs().max())))
    allowed = form.tolerance[dtype]
    return None if off <= allowed else f"its result is off by {off:.1e} of the largest, {allowed:.1e} is allowed"


def _in_a_graph(weight: Weight, x: torch.Tensor, n_out: int) -> torch.Tensor:
    """W x, on the host."""
    queue(x.device).follow()
    with queue(x.device).turn():
        out = x.new_empty(n_out, x.shape[1])
        graph = captured(partial(sparse_matmul, x, weight, out=out))
        graph.replay()
        return out.cpu()


def _times(
    forms: Sequence[Form], size: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, int, int, float]]:
    """Name, index in TOKENS, entries and ns per call of each form."""
    made = {}
    for form in forms:
        weight = form.sample(size, size, np.random.default_rng(0))
        made[form.name] = form.pack(weight, dtype, device), form.entries(weight != 0)
    for kind, tokens in enumerate(TOKENS):
        here = {form.name: made[form.name] for form in forms if kind <= form.longest}
        for name, taken in seconds(here, (size, size), tokens, dtype, device).items():
            yield name, kind, made[name][1], 1e9 * taken


def _line(first: tuple[int, float], second: tuple[int, float]) -> Line:
    """ns per call and per entry that give both times, neither below 0."""
    (few, short), (many, long) = first, second
    per_entry = max(0.0, (long - short) / (many - few))
    return max(0.0, short - per_entry * few), per_entry


def seconds(
    weights: dict[str, tuple[Weight, int]],
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Seconds per call of `sparse_matmul` with a bias, the fastest of several rounds, for each of some weights and
    their numbers of entries, all of one shape [n_out, n_in].

    A CUDA graph holds the calls of a weight. They go round as many copies of it, of its input and of its output as fill
    the second-level cache twice, so that no call finds there what it reads.
    """
    queue(device).follow()  # the weights were packed on the current stream
    with queue(device).turn():
        calls = {name: _rotated(*weight, shape, tokens, dtype, device) for name, weight in weights.items()}
        graphs = {name: captured(lambda own=own: [call() for call in own]) for name, own in calls.items()}
        timings = interleave({name: partial(_replayed, graph) for name, graph in graphs.items()}, ROUNDS)
    return {name: timings.minimum(name) / len(own) for name, own in calls.items()}


def _rotated(
    weight: Weight, entries: int, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """At least CALLS calls, which go round copies of what they use."""
    n_out, n_in = shape
    size = (entries + (n_in + n_out) * tokens) * dtype.itemsize
    bias, round_ = torch.zeros(n_out, device=device), []
    for _ in range(max(1, math.ceil(2 * _cache_bytes(device) / size))):
        x = torch.randn(n_in, tokens, device=device).to(dtype)
        out = torch.empty(n_out, tokens, dtype=dtype, device=device)
        round_.append(partial(sparse_matmul, x, copied(weight), bias, out=out))
    return round_ * math.ceil(CALLS / len(round_))


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copied(weight: Weight) -> Weight:
    """The same weight at another place in memory."""
    if isinstance(weight, SparseSemiStructuredTensor):  # which torch 2.11 does not clone
        names, facts = weight.__tensor_flatten__()
        clones = {name: getattr(weight, name).clone() for name in names}
        return type(weight).__tensor_unflatten__(clones, facts, None, None)
    if isinstance(weight, torch.Tensor):
        return weight.clone()
    parts = {name: part.clone() for name, part in vars(weight).items() if isinstance(part, torch.Tensor)}
    return dataclasses.replace(weight, **parts)


def _replayed(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
    torch.cuda.current_stream().synchronize()
