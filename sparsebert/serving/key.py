"""The API key that a server asks its clients for."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

from sparsebert import environment
from sparsebert.errors import InputError, SparsebertWarning, first_line

SHORTEST = 16  # characters


def key_of(file: str | None) -> str | None:
    """The first line of the file, else SPARSEBERT_API_KEY; None if neither is given. Raises InputError for a file that
    cannot be read and for a key that is too short; warns of a file that others can read.
    """
    path = None if file is None else Path(file)
    if path is None:
        key, mode = environment.api_key(), 0
        if key is None:
            return None
        key = key.strip()
    else:
        try:
            key, mode = path.read_text(encoding="utf-8").split("\n")[0].strip(), path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the API key cannot be read from {path}: {first_line(error)}", fix="correct it"
            ) from error
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the API key in {path or 'SPARSEBERT_API_KEY'} must be printable ASCII without spaces, as headers are",
            fix="make another one, as `openssl rand -hex 16` does",
        )
    if len(key) < SHORTEST:
        raise InputError(
            f"the API key in {path or 'SPARSEBERT_API_KEY'} must have at least {SHORTEST} characters, has {len(key)}",
            fix="make a longer one",
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.warn(f"{path} can be read by others: chmod 600 {path}", SparsebertWarning, stacklevel=3)
    return key
