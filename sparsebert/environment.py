"""The environment variables, all of them, and what they mean. Standard library only: the engine imports this."""

from __future__ import annotations

import os
from pathlib import Path

from sparsebert.errors import DataError, InputError

ISAS = ("scalar", "avx2", "avx512", "amx")  # slowest first; a cap allows everything up to it


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


def data_dir() -> Path | None:
    """SPARSEBERT_DATA: a folder with one sub-folder a task, one parquet file a split; None when unset."""
    value = os.environ.get("SPARSEBERT_DATA")
    if not value:
        return None
    if not Path(value).is_dir():
        raise DataError(f"SPARSEBERT_DATA must name a folder, got {value!r}", fix="correct or unset it")
    return Path(value)


def cache_dir() -> Path:
    """SPARSEBERT_CACHE, else the user cache directory: derived files that are safe to delete."""
    value = os.environ.get("SPARSEBERT_CACHE")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebert"
