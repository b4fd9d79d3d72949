"""All environment variables and their meaning. Standard library only: the engine imports this."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from sparsebert.errors import DataError, InputError, shown

# Slowest first; a cap allows everything up to it. Each multiplies what it has no kernels for as the ones before it do.
ISAS = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
FLOAT32_ISAS = ("scalar", "avx2", "avx512")  # with kernels of their own for float32, and so on
BF16_ISAS = ("avx512_bf16", "amx")
INT8_ISAS = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")


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


# SPARSEBERT_ISA -> the values that limit oneDNN, torch and MKL to the same instructions.
_RIVAL_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
_RIVAL_CAPS = {
    "scalar": ("SSE41", "default", "SSE4_2"),
    "avx2": ("AVX2", "avx2", "AVX2"),
    "avx_vnni": ("AVX2_VNNI", "avx2", "AVX2"),
    "avx512": ("AVX512_CORE", "avx512", "AVX512"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "avx512", "AVX512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512", "AVX512"),
}


def cap_rivals() -> None:
    """Limits torch and everything built on oneDNN to SPARSEBERT_ISA as well, if it is set and they are not imported
    yet. Variables that the user has set do not change.
    """
    caps = _RIVAL_CAPS.get(isa_cap() or "")
    if caps is not None:
        for name, cap in zip(_RIVAL_VARIABLES, caps, strict=True):
            os.environ.setdefault(name, cap)


def data_dir() -> Path | None:
    """SPARSEBERT_DATA: a folder with one sub-folder per task, one parquet file per split; None when unset."""
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
    except RuntimeError:  # no HOME, and the user id has no name
        return None


def nltk_data() -> list[Path]:
    """Folders of NLTK's data: those of NLTK_DATA, and nltk_data in the user's home."""
    found = [Path(part) for part in os.environ.get("NLTK_DATA", "").split(os.pathsep) if part]
    try:
        return [*found, Path.home() / "nltk_data"]
    except RuntimeError:  # no HOME, and the user id has no name
        return found


DEFAULT_CACHE_MB = 10_000


def cache_mb() -> int:
    """SPARSEBERT_CACHE_MB: the space that packed models may take there, in 10^6 bytes; those used longest ago are
    removed first. 0 keeps none.
    """
    value = os.environ.get("SPARSEBERT_CACHE_MB") or str(DEFAULT_CACHE_MB)
    if not value.isdecimal() or len(value) > 12:
        raise InputError(
            f"SPARSEBERT_CACHE_MB must be a whole number of megabytes, got {shown(value)}", fix="unset or correct it"
        )
    return int(value)


# Variables on which a timing, or the last bits of a result, may depend; and those of ours that affect neither, or are
# nobody's business.
_MATTER = (
    "SPARSEBERT_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "ATEN_", "TORCH", "PYTORCH_",
    "CUDA_", "CUBLAS_", "NVIDIA_TF32", "MALLOC_", "LD_PRELOAD",
)  # fmt: skip
_DO_NOT = ("SPARSEBERT_API_KEY", "SPARSEBERT_CACHE", "SPARSEBERT_CACHE_MB", "SPARSEBERT_REQUIRE")


def that_matter() -> dict[str, str]:
    """The variables set in this process on which figures may depend, by name; of a path only the last part."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_MATTER) and value}
    return {name: value.rstrip("/").rpartition("/")[2] for name, value in found.items() if name not in _DO_NOT}


def unknown_variables(prefix: str, fields: Iterable[str]) -> list[str]:
    """Variables that begin with `prefix` and name no field."""
    known = {f"{prefix}{name.upper()}" for name in fields}
    return sorted(name for name in os.environ if name.startswith(prefix) and name not in known)


def api_key() -> str | None:
    """The key that clients of a server must send, SPARSEBERT_API_KEY; None if it is not set or empty."""
    return os.environ.get("SPARSEBERT_API_KEY") or None


def send_no_usage() -> None:
    """Keeps Ray from reporting its use over the network; before it is imported. A user's own choice stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def wants_traces() -> bool:
    """Whether OpenTelemetry's own variables name an address for traces, and do not turn them off."""
    named = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return named and not off


def calm_openmp(granted: float) -> None:
    """Makes torch's OpenMP threads sleep as soon as they wait: beside another busy process, spinning threads take ten
    times as long. Also limits their number to the `granted` CPUs if the process may use only a part of its cores.
    Variables that the user has set do not change. Call this before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if granted < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.ceil(granted))))
