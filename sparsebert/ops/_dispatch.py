"""The one place that decides what the compiled kernels run on: which instruction set, how many threads."""

from __future__ import annotations

import functools
import math
import os
import platform
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sparsebert import environment
from sparsebert.errors import InputError, UnsupportedError, shown

if TYPE_CHECKING:  # what does not train needs no torch
    import numpy as np
    import torch


MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # more have no use; the core keeps no more either


@functools.cache
def core() -> ModuleType:
    """The compiled core, `sparsebert._C`. Raises UnsupportedError where it was never built."""
    try:
        from sparsebert import _C
    except ImportError as error:
        raise UnsupportedError(
            f"the compiled core sparsebert._C cannot be imported: {error}", fix="build it with: pip install -e ."
        ) from error
    return _C


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """What this machine can run, slowest first, whatever the cap says."""
    return tuple(core().supported_isas())


def allowed_isas() -> tuple[str, ...]:
    """What this machine can run under SPARSEBERT_ISA, slowest first."""
    cap = environment.isa_cap() or environment.ISAS[-1]
    allowed = environment.ISAS[: environment.ISAS.index(cap) + 1]
    return tuple(name for name in allowed if name in supported_isas())


def float32_isas() -> tuple[str, ...]:
    """Those of them that have float32 kernels of their own."""
    return tuple(name for name in allowed_isas() if name == float32_isa(name))


def float32_isa(name: str) -> str:
    """The instruction set whose float32 kernels this one runs."""
    return "avx512" if name in environment.BF16_ISAS else name


def isa(wanted: str | None = None) -> str:
    """The instruction set to run: `wanted` where given, else the best one this machine has under SPARSEBERT_ISA.

    Raises InputError for an unknown name, UnsupportedError for one this machine cannot run. The cap chooses; it does
    not forbid: naming an instruction set above it runs that one.
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
    """Threads to run on: `wanted` where given, else the cores this process may use. Raises InputError below 1, and
    above what a machine like this one has a use for.
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
    """Cores this process may use: by its affinity, which containers and taskset narrow, and by the CPU time that its
    control groups grant it, rounded up.
    """
    # macOS has no affinity to ask for.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, granted())))


@functools.cache
def granted(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the control groups of this process grant it, infinite without a limit; read once. A group is held to
    what those above it are. Inside a container its path may be that of the host: then the root is its own.
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
    """CPUs that one control group grants: version 2's cpu.max, or version 1's two files."""
    try:
        names = ["cpu.max"] if (group / "cpu.max").is_file() else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        quota, period = " ".join((group / name).read_text() for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """A CPU tensor as the compiled core takes it: a view where it is contiguous; bfloat16, which numpy lacks, as its
    bits.
    """
    import torch

    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def clean(mask: torch.Tensor) -> torch.Tensor:
    """A copy of a bool tensor whose bytes are 0 and 1: a view of other bytes as bool may hold any, all of them True."""
    import torch

    return mask.view(torch.uint8) != 0
