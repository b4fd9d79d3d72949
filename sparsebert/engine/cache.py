"""The packed form of a model in the user's cache: derived, checked by content, mapped by all processes that run it."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsebert import __version__, checkpoint, environment
from sparsebert.checkpoint import Files
from sparsebert.errors import SparsebertError
from sparsebert.ops.sparse_encoder import EncoderLayer, PackedEncoder
from sparsebert.ops.sparse_matmul import Linear, PackedGroups, PackedRows, PackedTiles

FORMAT_VERSION = 3  # of the files, and of the packed forms in them
Encoders = tuple[PackedEncoder, ...]
Weights = dict[str, np.ndarray]


def packed(files: Files, settings: dict, make: Callable[[Weights], Encoders]) -> Encoders:
    """What `make` makes of a model directory's weights, in mapped memory: from the cache, or made and put there.

    settings: all that decides what `make` returns beside weights and config.json; JSON.
    The weights are held against the manifest whenever their file is not the one that was last: then its size, time and
    place are still those noted here. A cached file that is not whole, or of other content, is made anew. Where there is
    no place for one, that is said once and the packed form stays in memory. Raises CheckpointError for a damaged
    directory.
    """
    folder = environment.cache_dir() / "packed"
    content = _verified(folder, files)
    if content is None:
        _ = files.weights  # verified by reading them
        content = files.weights_sha256
        _note(folder, files, content)
    config = hashlib.sha256(files.contents["config.json"]).hexdigest()
    key = _sha256(json.dumps([FORMAT_VERSION, __version__, content, config, settings], sort_keys=True))
    path = folder / f"{key}.safetensors"
    made = _read(path, key)
    if made is not None:
        return made
    try:
        with _locked(folder):
            made = _read(path, key)  # another process may have packed it meanwhile
            if made is None:
                unmapped = make(files.weights)
                made = _stored(path, key, unmapped) or unmapped
            return made
    except _NoPlace as error:
        _no_place(folder, error)
        return make(files.weights)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class _NoPlace(Exception):
    """The cache directory cannot be used."""


def _no_place(folder: Path, error: Exception) -> None:
    warnings.warn(f"the packed model is not kept in {folder}: {error}; set SPARSEBERT_CACHE", stacklevel=4)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes; the lock goes with its holder, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _NoPlace(error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stored(path: Path, key: str, encoders: Encoders) -> Encoders | None:
    """The same, written and mapped; None, with a warning, where it cannot be written."""
    arrays: dict[int, tuple[str, np.ndarray]] = {}
    tree = _flattened(encoders, arrays)
    named = {name: np.ascontiguousarray(array) for name, array in arrays.values()}
    sums = {name: zlib.crc32(array) for name, array in named.items()}
    temporary = path.with_suffix(".tmp")  # of whoever holds the lock; one that was killed left it behind
    try:
        save_file(named, temporary, {"key": key, "tree": json.dumps(tree), "crc32": json.dumps(sums)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        temporary.unlink(missing_ok=True)
        _no_place(path.parent, error)
        return None
    return _read(path, key)


def _read(path: Path, key: str) -> Encoders | None:
    """What the file holds; None where it is missing, damaged or another's."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        if metadata.get("key") != key:
            return None
        arrays, sums = checkpoint.mapped_arrays(path), json.loads(metadata["crc32"])
        if any(zlib.crc32(array) != sums[name] for name, array in arrays.items()):
            return None
        return _restored(json.loads(metadata["tree"]), arrays)
    except (OSError, SafetensorError, SparsebertError, ValueError, KeyError, TypeError):
        return None


_CLASSES = {c.__name__: c for c in (PackedEncoder, EncoderLayer, Linear, PackedRows, PackedGroups, PackedTiles)}


def _flattened(value: Any, arrays: dict[int, tuple[str, np.ndarray]]) -> Any:
    """A JSON tree of dataclasses, tuples and scalars, with the arrays beside it; an array met twice is kept once."""
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
    """The content hash of a directory's weights, if their files are those that were last held against its manifest."""
    try:
        noted = json.loads(_note_of(folder, files).read_text(encoding="utf-8"))
        if noted["file"] != files.state:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    manifest = files.manifest
    return noted.get("sha256") if manifest is None or noted.get("sha256") == manifest["weights_sha256"] else None


def _note(folder: Path, files: Files, content: str) -> None:
    try:
        write_whole(_note_of(folder, files), json.dumps({"file": files.state, "sha256": content}))
    except OSError:  # the next load verifies again
        return


def _note_of(folder: Path, files: Files) -> Path:
    return folder / f"{_sha256(str(files.directory.resolve()))}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
