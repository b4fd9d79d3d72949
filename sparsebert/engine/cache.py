"""The user's cache of packed models. An entry is derived from a model directory, is checked by content, and is mapped
by all processes that run the model.

An entry is written under another name, renamed into place, and never changed afterwards: a process that maps it keeps
the same data. Only the owner can write to the folder, so nobody else can cut an entry short while an engine runs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsebert import __version__, checkpoint, environment, jobs
from sparsebert.checkpoint import Files
from sparsebert.errors import OutputError, SparsebertError, SparsebertWarning
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import EncoderLayer, PackedEncoder
from sparsebert.ops.sparse_matmul import Linear, PackedGroups, PackedInt8, PackedRows, PackedTiles

FORMAT_VERSION = 6  # of the files and of the packed forms in them
_ROOT = 0  # the user who may write anywhere
LEFT_BEHIND = 3600.0  # seconds after which no process still writes to a temporary file
Encoders = tuple[PackedEncoder, ...]
Weights = dict[str, np.ndarray]


def packed(files: Files, settings: dict, make: Callable[[Weights], Encoders], *, anew: bool = False) -> Encoders:
    """The packed encoders of a model directory, in mapped memory: read from the cache, or made by `make` and stored
    there.

    settings: everything besides weights and config.json that decides what `make` returns; JSON. anew: make them even if
    the cache holds them.
    The weights are read and checked against the manifest only if their files have changed since the last time, by the
    sizes, times, inodes and devices noted in the cache. A cached file that is incomplete or has other content is made
    anew. If there is no folder that only this user can write to, a warning says so and the packed form stays in memory.
    Raises CheckpointError for a damaged directory.
    """
    folder = _folder()
    if folder is None:
        return make(files.weights)
    content = _verified(folder, files)
    if content is None:
        _ = files.weights  # reading verifies them
        content = files.weights_sha256
        _note(folder, files, content)
    config = hashlib.sha256(files.contents["config.json"]).hexdigest()
    key = _sha256(json.dumps([FORMAT_VERSION, __version__, _layout(), content, config, settings], sort_keys=True))
    path = folder / f"{key}.safetensors"
    if not anew and (made := _read(path, key)) is not None:
        return made
    with _locked(folder):
        made = None if anew else _read(path, key)  # another process may have packed it meanwhile
        if made is None:
            facts = {"model": str(files.directory.resolve()), "dtype": settings["dtype"]}
            unmapped = make(files.weights)
            made = _stored(path, key, unmapped, facts) or unmapped
        return made


def shared(encoders: Encoders) -> Encoders:
    """The same encoders; those that consist of the same arrays and numbers become one object."""
    arrays: dict[int, tuple[str, np.ndarray]] = {}
    first: dict[str, PackedEncoder] = {}
    return tuple(first.setdefault(json.dumps(_flattened(encoder, arrays)), encoder) for encoder in encoders)


def entries() -> list[dict]:
    """Every packed model in the cache, last used first: path, model (the directory it was made from), dtype, bytes, and
    used (the last use, in seconds since the epoch).
    """
    folder = _folder(create=False)
    found = []
    for path in () if folder is None else folder.glob("*.safetensors"):
        with suppress(OSError, SafetensorError):  # a damaged file is listed without a model
            status = path.stat()
            row = {"path": str(path), "model": "", "dtype": "", "bytes": status.st_size, "used": status.st_mtime}
            found.append(row)
            with safe_open(path, framework="np") as file:
                row |= {name: (file.metadata() or {}).get(name, "") for name in ("model", "dtype")}
    return sorted(found, key=lambda row: -row["used"])


def prune(limit: int = 0, keep: Path | None = None) -> list[dict]:
    """Removes the packed models used longest ago until the others take at most `limit` bytes; never removes `keep`.
    Returns the removed ones. Engines that use them keep running. Also removes files that killed processes left behind,
    and with limit 0 the notes on model directories.
    """
    folder = _folder(create=False)
    if folder is None:
        return []
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                path.unlink()
    removed, total = [], 0
    for row in entries():
        total += row["bytes"]
        if total > limit and row["path"] != str(keep):
            with suppress(FileNotFoundError):
                os.unlink(row["path"])
            removed.append(row)
            total -= row["bytes"]
    if not limit:
        for path in folder.glob("*.json"):  # the notes on model directories
            path.unlink(missing_ok=True)
    return removed


def _folder(*, create: bool = True) -> Path | None:
    """The folder of packed models, if nobody else can write to it; otherwise None, with a warning that says why.
    create: make the folder if it is missing; without it a missing folder gives None and no warning.
    """
    cache = environment.cache_dir()
    if cache is None:
        _no_place("the user's cache", "there is no HOME, and the user id has no name")
        return None
    folder = cache / "packed"
    try:
        if create:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        elif not folder.exists():
            return None
        found = {cache: cache.stat(), folder: folder.lstat()}
    except OSError as error:
        _no_place(folder, error)
        return None
    for path, status in found.items():
        why = None
        if not stat.S_ISDIR(status.st_mode):
            why = f"{path} is a link or not a folder"
        elif status.st_uid not in (_ROOT, os.geteuid()):
            why = f"{path} belongs to user {status.st_uid}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (path == folder or not status.st_mode & stat.S_ISVTX):
            # In a sticky folder, such as /tmp, others can replace nothing of ours, but they can add what is not there.
            why = f"others may write to {path}: chmod go-w it"
        if why:
            _no_place(folder, why)
            return None
    return folder


def _no_place(folder: Path | str, why: object) -> None:
    message = f"the packed model is not kept in {folder}: {why}; set SPARSEBERT_CACHE"
    warnings.warn(message, SparsebertWarning, stacklevel=4)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, on file systems that have locks, so that two processes that load the same model pack it
    once. The lock is released when its process ends, in whatever way.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stored(path: Path, key: str, encoders: Encoders, facts: dict[str, str]) -> Encoders | None:
    """The same encoders, written to a file and mapped. None if they cannot be kept, with a warning unless the user
    wants none kept.
    """
    limit = environment.cache_mb() * 10**6
    if not limit:
        return None
    arrays: dict[int, tuple[str, np.ndarray]] = {}
    tree = json.dumps(_flattened(encoders, arrays))
    named = {name: np.ascontiguousarray(array) for name, array in arrays.values()}
    size = sum(array.nbytes for array in named.values())
    if size > limit:
        _no_place(path.parent, f"it takes {size / 1e6:.0f} MB, SPARSEBERT_CACHE_MB is {limit / 1e6:.0f}")
        return None
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(named, temporary, {"key": key, "tree": tree, "sum": _sum(key, tree, named)} | facts)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _no_place(path.parent, error)
        return None
    prune(limit, keep=path)
    return _read(path, key)


def _read(path: Path, key: str) -> Encoders | None:
    """The encoders that the file holds; None if it is missing, damaged or has another key."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        tree, arrays = metadata["tree"], checkpoint.mapped_arrays(path)
        if metadata["key"] != key or metadata["sum"] != _sum(key, tree, arrays):
            return None
        with suppress(OSError):  # marks it as just used; may fail on a read-only file system
            os.utime(path)
        return _restored(json.loads(tree), arrays)
    except (OSError, SafetensorError, SparsebertError, ValueError, KeyError, TypeError):
        return None


def _sum(key: str, tree: str, arrays: Weights) -> str:
    """The checksum of an entry: of its key, its tree, and every array's name, dtype, shape and bytes."""
    sums = [[name, str(array.dtype), array.shape, zlib.crc32(array)] for name, array in sorted(arrays.items())]
    return _sha256(json.dumps([key, tree, sums]))


def _layout() -> list[int]:
    """The core's constants that decide the layout of packed forms."""
    core = _dispatch.core()
    return [core.GROUP_ROWS, core.GROUP_SLICE, core.SLICE_ROWS, core.BLOCK_ROWS, core.SLAB_COLS, core.TILE_ROWS,
            core.TILE_COLS, core.QUAD_COLS, core.INT8_OVERRUN]  # fmt: skip


_CLASSES = {
    c.__name__: c for c in (PackedEncoder, EncoderLayer, Linear, PackedRows, PackedGroups, PackedTiles, PackedInt8)
}


def _flattened(value: Any, arrays: dict[int, tuple[str, np.ndarray]]) -> Any:
    """A JSON tree of dataclasses, tuples and scalars. Arrays are put into `arrays`, each of them once."""
    if isinstance(value, np.ndarray):
        return {"array": arrays.setdefault(id(value), (str(len(arrays)), value))[0]}
    if dataclasses.is_dataclass(value):
        parts = {f.name: _flattened(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": parts}
    return [_flattened(part, arrays) for part in value] if isinstance(value, tuple) else value


def _restored(tree: Any, arrays: Weights) -> Any:
    if isinstance(tree, list):
        return tuple(_restored(part, arrays) for part in tree)
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    parts = {name: _restored(part, arrays) for name, part in tree["fields"].items()}
    return _CLASSES[tree["class"]](**parts)


def _verified(folder: Path, files: Files) -> str | None:
    """The content hash of a directory's weights if its files are the same as when they were last checked, else None."""
    try:
        noted = json.loads(_note_of(folder, files).read_text(encoding="utf-8"))
        if noted["file"] != files.state:
            return None
        content = noted["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(content, str) and (files.manifest is None or content == files.manifest["weights_sha256"])
    return content if known else None


def _note(folder: Path, files: Files, content: str) -> None:
    with suppress(OutputError):  # the next load verifies again
        jobs.write(_note_of(folder, files), json.dumps({"file": files.state, "sha256": content}))


def _note_of(folder: Path, files: Files) -> Path:
    return folder / f"{_sha256(str(files.directory.resolve()))}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
