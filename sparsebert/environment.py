"""The environment variables, all of them, and what they mean. Standard library only: the engine imports this."""

from __future__ import annotations

import math
import os
from pathlib import Path

from sparsebert.errors import DataError, InputError, shown

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # slowest first; a cap allows everything up to it
BF16_ISAS = ("avx512_bf16", "amx")  # which multiply bf16, and float32 as avx512 does


def isa_cap() -> str | None:
    """SPARSEBERT_ISA: the best instruction set the kernels may use; None when unset."""
    value = os.environ.get("SPARSEBERT_ISA")
    if not value:
        return None
    if value not in ISAS:
        raise InputError(
            f"SPARSEBERT_ISA must be one of {', '.join(ISAS)}, got {value!r}", fix="unset it or use one of these"
        )
    return value


# SPARSEBERT_ISA -> what keeps oneDNN, torch and MKL to the same instructions.
_RIVAL_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
_RIVAL_CAPS = {
    "scalar": ("SSE41", "default", "SSE4_2"),
    "avx2": ("AVX2", "avx2", "AVX2"),
    "avx512": ("AVX512_CORE", "avx512", "AVX512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512", "AVX512"),
}


def cap_rivals() -> None:
    """Holds torch and what is built on oneDNN to SPARSEBERT_ISA as well, where it is set and they are not imported yet.
    What the user has set stays.
    """
    caps = _RIVAL_CAPS.get(isa_cap() or "")
    if caps is not None:
        for name, cap in zip(_RIVAL_VARIABLES, caps, strict=True):
            os.environ.setdefault(name, cap)


def data_dir() -> Path | None:
    """SPARSEBERT_DATA: a folder with one sub-folder a task, one parquet file a split; None when unset."""
    value = os.environ.get("SPARSEBERT_DATA")
    if not value:
        return None
    if not Path(value).is_dir():
        raise DataError(f"SPARSEBERT_DATA must name a folder, got {value!r}", fix="correct or unset it")
    return Path(value)


def cache_dir() -> Path | None:
    """SPARSEBERT_CACHE, else the user cache directory: derived files that are safe to delete. None for a user without
    a home.
    """
    value = os.environ.get("SPARSEBERT_CACHE")
    if value:
        return Path(value)
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(caches or Path.home() / ".cache") / "sparsebert"
    except RuntimeError:  # no HOME, and a user id that has no name
        return None


DEFAULT_CACHE_MB = 10_000


def cache_mb() -> int:
    """SPARSEBERT_CACHE_MB: what packed models may take there, in 10^6 bytes; those used longest ago go first. 0 keeps
    none.
    """
    value = os.environ.get("SPARSEBERT_CACHE_MB") or str(DEFAULT_CACHE_MB)
    if not value.isdecimal() or len(value) > 12:
        raise InputError(
            f"SPARSEBERT_CACHE_MB must be a whole number of megabytes, got {shown(value)}", fix="unset or correct it"
        )
    return int(value)


# Variables that a timing, or the last bits of a result, may depend on; and those of ours that neither does.
_MATTER = (
    "SPARSEBERT_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "ATEN_", "TORCH", "PYTORCH_",
    "CUDA_", "CUBLAS_", "NVIDIA_TF32", "MALLOC_", "LD_PRELOAD",
)  # fmt: skip
_DO_NOT = ("SPARSEBERT_CACHE", "SPARSEBERT_CACHE_MB", "SPARSEBERT_REQUIRE")


def that_matter() -> dict[str, str]:
    """The variables set in this process that figures may depend on, by name; of a path its last part alone."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_MATTER) and value}
    return {name: value.rstrip("/").rpartition("/")[2] for name, value in found.items() if name not in _DO_NOT}


def calm_openmp(granted: float) -> None:
    """Has torch's OpenMP threads sleep as soon as they wait: beside another busy process they would spin against it
    and take ten times as long. And has no more of them than `granted` CPUs, where the process may use that share of
    its cores only. What the user has set stays. To be called before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if granted < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.ceil(granted))))
