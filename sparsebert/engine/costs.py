"""The costs of the forms of a linear on this machine: the table by which the engine chooses a form."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import environment, jobs, machine
from sparsebert.engine.measure import interleave
from sparsebert.errors import OutputError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import Linear, Packed, Quantized, pack, pack_groups, pack_int8, sparse_matmul

# Batches are short, middling or long. TOKENS: the tokens at which each kind is measured. BOUNDS: where the next begins.
TOKENS = (8, 32, 128)
BOUNDS = (16, 64)
LONG = len(TOKENS) - 1
VERSION = 3  # of the measurement and of the measured kernels
ISAS = tuple(name for name in environment.ISAS if name in environment.FLOAT32_ISAS + environment.INT8_ISAS)
LONGEST = 1 << 20  # characters of the file; a longer one is ignored


@dataclass(frozen=True)
class Costs:
    """Costs of an entry in each form, for each of TOKENS. Only their ratio matters, so any unit will do.

    rows: every row has its own columns; an entry is a non-zero. groups: the rows of a group share their columns; an
    entry is a place, kept or empty. int8: likewise.
    """

    rows: tuple[float, ...]
    groups: tuple[float, ...]
    int8: tuple[float, ...]


def kind_of(tokens: int) -> int:
    """The index in TOKENS of the entry used for a batch of this many tokens."""
    return sum(tokens >= bound for bound in BOUNDS)


def costs(isa: str) -> Costs:
    """This machine's costs if `measure` has stored them, else those measured on another machine with this instruction
    set.

    Nothing is timed here, so the same model on the same machine always runs the same kernels.
    """
    isa = _dispatch.kernels_of(isa, ISAS)
    try:
        kept = stored()[_machine(isa)]
        parts = {form: tuple(float(cost) for cost in kept[form]) for form in ("rows", "groups", "int8")}
    except (ValueError, KeyError, TypeError):  # no costs of this machine, or a damaged file
        return SHIPPED[isa]
    sound = all(len(part) == len(TOKENS) and all(0 < cost < math.inf for cost in part) for part in parts.values())
    return Costs(**parts) if sound else SHIPPED[isa]


def measure(progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Costs]:
    """Times all forms on every instruction set allowed here, which takes a few seconds, and stores the costs. Raises
    OutputError if there is no place to store them.
    """
    require_place()
    isas = _dispatch.with_kernels(ISAS)
    found = {}
    for done, isa in enumerate(isas):
        progress(done, len(isas))
        found[isa] = _measured(isa)
    progress(len(isas), len(isas))
    store({_machine(isa): asdict(cost) for isa, cost in found.items()})
    return found


def require_place() -> Path:
    """The file of the stored costs. Raises OutputError if there is no place for it."""
    path = _path()
    if path is None:
        raise OutputError("there is no home directory for the costs", fix="set SPARSEBERT_CACHE to a folder")
    return path


def store(found: dict[str, dict]) -> None:
    """Keeps measured costs, by the name of what they were measured on; other names keep theirs."""
    jobs.write(require_place(), json.dumps(stored() | found, indent=1))


def stored() -> dict:
    """The costs that were stored; empty if the file is missing or damaged."""
    path = _path()
    try:
        with open(path or os.devnull, encoding="utf-8") as file:
            kept = json.loads(file.read(LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _path() -> Path | None:
    folder = environment.cache_dir()
    return None if folder is None else folder / "costs.json"


def _machine(isa: str) -> str:
    return f"{machine.cpu()}, {isa}, version {VERSION}"


# The measured matrix is [SIZE, SIZE]. In the form rows a share KEPT is kept, near which rows and groups cost the same.
SIZE, KEPT = 768, 0.4


def _measured(isa: str) -> Costs:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((SIZE, SIZE), np.float32)
    rows = pack(weight * (rng.random(weight.shape) < KEPT))
    one = np.ones(SIZE, np.float32)
    int8 = pack_int8(Quantized(np.ones((SIZE, SIZE), np.int8), one, one, np.zeros(SIZE, np.uint8)))
    forms = (rows, pack_groups(weight), int8)
    return Costs(*(tuple(_ns(packed, tokens, isa) for tokens in TOKENS) for packed in forms))


def _ns(packed: Packed, tokens: int, isa: str) -> float:
    """ns per entry and token, in excess of the time for a matrix without entries."""
    x = np.random.default_rng(1).standard_normal((tokens, SIZE), np.float32)
    linears = {"empty": Linear(pack(np.zeros((SIZE, SIZE), np.float32))), "packed": Linear(packed)}
    calls = {name: partial(sparse_matmul, x, linear, threads=1, isa=isa) for name, linear in linears.items()}
    timings = interleave(calls, rounds=30)
    return max(1e9 * (timings.minimum("packed") - timings.minimum("empty")) / (tokens * packed.stored), 1e-6)


# Medians of `measure`. Float32: avx2 on a Zen 3 core, the others on a Zen 5 core. int8: on a Zen 4 core, times the
# ratio of those cores in `groups`. Not measured: avx_vnni, with the costs of avx2, and amx, with those of avx512_vnni.
_AVX2 = Costs(rows=(0.052, 0.032, 0.033), groups=(0.024, 0.020, 0.0225), int8=(0.070, 0.0158, 0.0172))
_AVX512 = Costs(rows=(0.036, 0.0163, 0.0146), groups=(0.019, 0.0081, 0.0079), int8=(0.0555, 0.0071, 0.0061))
_VNNI = replace(_AVX512, int8=(0.018, 0.0023, 0.0020))
SHIPPED = {
    "scalar": Costs(rows=(0.089, 0.045, 0.045), groups=(0.0445, 0.050, 0.050), int8=(0.125, 0.070, 0.069)),
    "avx2": _AVX2,
    "avx_vnni": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": _VNNI,
    "amx": _VNNI,
}
