"""Decides which instruction set and how many threads the compiled kernels use. No other module decides this."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sparsebert import environment
from sparsebert.errors import InputError, UnsupportedError, shown

if TYPE_CHECKING:  # code that does not train must run without torch
    import numpy as np
    import torch


MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # more would not help; the core limits itself to as many


@functools.cache
def core() -> ModuleType:
    """The compiled core, `sparsebert._C`. Raises UnsupportedError if it cannot be imported."""
    try:
        from sparsebert import _C
    except ImportError as error:
        raise UnsupportedError(
            f"the compiled core sparsebert._C cannot be imported: {error}", fix="build it with: pip install -e ."
        ) from error
    _C.share_cores(cores())
    return _C


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """The instruction sets this machine can run, slowest first, regardless of SPARSEBERT_ISA."""
    return tuple(core().supported_isas())


def allowed_isas() -> tuple[str, ...]:
    """The instruction sets this machine can run that SPARSEBERT_ISA allows, slowest first."""
    cap = environment.isa_cap() or environment.ISAS[-1]
    allowed = environment.ISAS[: environment.ISAS.index(cap) + 1]
    return tuple(name for name in allowed if name in supported_isas())


def with_kernels(isas: tuple[str, ...]) -> tuple[str, ...]:
    """The allowed ones of these instruction sets, slowest first."""
    return tuple(name for name in allowed_isas() if name in isas)


def float32_isas() -> tuple[str, ...]:
    """The allowed instruction sets that have their own float32 kernels, slowest first."""
    return with_kernels(environment.FLOAT32_ISAS)


def float32_isa(name: str) -> str:
    """The instruction set whose float32 kernels `name` uses."""
    return kernels_of(name, environment.FLOAT32_ISAS)


def kernels_of(name: str, isas: tuple[str, ...]) -> str:
    """The instruction set whose kernels `name` uses: of those that have some, the last one that is not above it."""
    return [isa for isa in isas if environment.ISAS.index(isa) <= environment.ISAS.index(name)][-1]


def isa(wanted: str | None = None) -> str:
    """The instruction set to run: `wanted` if given, else the best one that this machine has and SPARSEBERT_ISA allows.

    Raises InputError for an unknown name, UnsupportedError for one this machine cannot run. SPARSEBERT_ISA only limits
    the default: an instruction set above it still runs if `wanted` names it.
    """
    if wanted is None:
        return allowed_isas()[-1]
    if wanted not in environment.ISAS:
        raise InputError(f"isa must be one of {', '.join(environment.ISAS)}, got {wanted!r}", fix="pass one, or None")
    if wanted not in supported_isas():
        raise UnsupportedError(f"isa {wanted!r} cannot run here: {why_off()[wanted]}", fix="pass isa=None")
    return wanted


def why_off() -> dict[str, str]:
    """Instruction set -> why `isa()` does not choose it, for every one that is unavailable or above the cap."""
    cap = environment.isa_cap()
    reasons = {}
    for rank, name in enumerate(environment.ISAS):
        if name not in supported_isas():
            reasons[name] = f"not supported by this processor ({platform.machine()}) or its operating system"
        elif cap is not None and rank > environment.ISAS.index(cap):
            reasons[name] = f"above the cap SPARSEBERT_ISA={cap}"
    return reasons


def threads(wanted: int | None = None) -> int:
    """Number of threads to use: `wanted` if given, else the number of cores this process may use. Raises InputError if
    `wanted` is not an integer from 1 to MAX_THREADS.
    """
    if wanted is None:
        return cores()
    if not isinstance(wanted, int | Integral) or isinstance(wanted, bool) or wanted < 1:
        raise InputError(
            f"threads must be an integer of at least 1, got {shown(wanted)}", fix="pass 1 or more, or None"
        )
    if wanted > MAX_THREADS:
        raise InputError(
            f"threads must be at most {MAX_THREADS} on this machine, got {shown(wanted)}",
            fix="pass None for the cores this process may use",
        )
    return int(wanted)


def cores() -> int:
    """Number of cores this process may use: the smaller of its CPU affinity, which containers and taskset restrict, and
    the CPUs that its control groups grant it, rounded up.
    """
    # macOS has no call for the affinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, granted())))


@functools.cache
def granted(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Number of CPUs that the control groups of this process grant it, infinite without a limit; read once. A group is
    also bound by the limits of its parents. Inside a container the path may be the one on the host: then the
    container's own group is the root.
    """
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return math.inf
    least = math.inf
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        for mount in mounts:
            at = mount / path.lstrip("/")
            for group in (at, *at.parents):
                if group == root.parent:
                    break
                least = min(least, _quota(group))
    return least


def _quota(group: Path) -> float:
    """Number of CPUs that one control group grants, from version 2's cpu.max or version 1's two files."""
    try:
        names = ["cpu.max"] if (group / "cpu.max").is_file() else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        quota, period = " ".join((group / name).read_text() for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """A CPU tensor as the array that the compiled core takes: a view if the tensor is contiguous. bfloat16, which numpy
    lacks, is passed as its bits.
    """
    import torch

    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def clean(mask: torch.Tensor) -> torch.Tensor:
    """A copy of a bool tensor whose bytes are all 0 or 1. A bool view of other bytes may hold any value, and all but 0
    count as True.
    """
    import torch

    return mask.view(torch.uint8) != 0


def place(tensor: torch.Tensor) -> tuple[torch.device, str]:
    """The device that all tensors of a call must be on if its first one is `tensor`, and how messages call it: the GPU
    that this one is on, else the CPU.
    """
    import torch

    return (tensor.device, f"{tensor.device}") if tensor.is_cuda else (torch.device("cpu"), "the CPU")


@contextmanager
def needing_triton(op: str) -> Iterator[None]:
    """A context in which a kernel in Triton is imported. Raises UnsupportedError if Triton is missing."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(
            f"{op} on a GPU needs Triton, which cannot be imported: {error}",
            fix="pip install 'sparsebert[triton]', or run it on the CPU",
        ) from error


def require_finite(finite: dict[str, torch.Tensor]) -> None:
    """Raises InputError for the first tensor that is not finite. finite: for each tensor's name whether it is, bool [].
    The host waits once if they are on a GPU.
    """
    import torch

    for name, is_finite in zip(finite, torch.stack(list(finite.values())).tolist(), strict=True):
        if not is_finite:
            raise InputError(f"{name} must be finite, got inf or NaN", fix="check how it was computed")
