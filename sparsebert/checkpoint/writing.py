"""Writing a model directory: whole or not at all, with its manifest and recipe."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from sparsebert.checkpoint.classifier import quiet_transformers, require_model
from sparsebert.checkpoint.manifest import FORMAT_VERSION, MANIFEST
from sparsebert.checkpoint.reading import RECIPE, Files
from sparsebert.checkpoint.sealing import manifest_of
from sparsebert.errors import InputError, OutputError


def save(
    model, tokenizer, directory: str | Path, *, recipe: dict, key: str, figures: dict, summary: dict | None = None
) -> str:
    """Writes a model directory, whole or not at all, and returns the sha256 of its weights.

    recipe: the arguments that made it (recipe.yaml). key: the ledger key of that work, and figures: what it measured,
    both for `finished`.
    summary: method, pattern and sparsity, for config.json["sparsebert"]. An older directory written by this package is
    replaced in one step; anything else at that place is an OutputError.
    """
    import yaml
    from safetensors import SafetensorError

    require_model(model)
    target = check_output(directory)
    was_training = model.training
    model.eval()
    staging, lock = None, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        lock = os.open(staging, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # says that it is in use, for as long as this process lives
        _sweep_orphans(target)
        with quiet_transformers():
            (staging / "sparsebert").mkdir()
            model.save_pretrained(staging, safe_serialization=True)
            tokenizer.save_pretrained(staging)
        _require_finite(model)
        written = Files(staging)
        sha256 = written.weights_sha256
        model.config.sparsebert = {"format_version": FORMAT_VERSION, **(summary or {}), "weights_sha256": sha256}
        model.config.save_pretrained(staging)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(staging.iterdir())
            if path.is_file() and path.name not in written.weight_files
        }
        manifest = manifest_of(written, model, tokenizer, files, key=key, figures=figures)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        (staging / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        _settle(staging)
        replace_directory(staging, target)
    except (OSError, SafetensorError) as error:  # safetensors has a name of its own for a full disk
        raise OutputError(
            f"{target} cannot be written: {error}", fix="free space or choose another output directory"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        model.train(was_training)
    return sha256


def check_output(directory: str | Path, *, source: Path | None = None) -> Path:
    """`directory` with its links resolved, a path that a model may be written to; OutputError before any work is done
    where it may not. Makes nothing.

    source: the model directory the work starts from, which may not be replaced by its result.
    """
    target = Path(directory).resolve()
    here = Path.cwd()
    if target == here or target in here.parents:
        raise OutputError(f"output {target} is or holds the working directory", fix="choose another -o")
    if source is not None and target == source.resolve():
        raise OutputError(f"output {target} is the model it starts from", fix="choose another -o")
    if target.exists() and not (target / MANIFEST).exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"output {target} exists and is no model directory of this package", fix="choose another -o, or remove it"
        )
    if target.exists():
        _require_writable(target)
    require_place(target.parent)
    return target


def require_place(directory: Path) -> None:
    """OutputError unless files can be made in `directory`, or in the nearest of its parents that exists."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    _require_writable(existing)
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing):
            pass
    except OSError as error:
        raise OutputError(f"{existing} cannot be written to: {error.strerror}", fix="choose another -o") from error


def _require_writable(path: Path) -> None:
    # The mode is asked as well: root may write anywhere, and a directory marked read-only is so by someone's wish.
    if not path.is_dir():
        raise OutputError(f"output {path} must be a folder", fix="choose another -o")
    if not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise OutputError(f"output directory {path} is read-only", fix="choose another -o, or make it writable")


def _require_finite(model) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"the finished model's {name} has NaN or infinite values", fix="lower --lr, or train longer"
            )


def _sweep_orphans(target: Path) -> None:
    """Removes what killed processes left beside `target`: staging folders a minute old that nobody holds a lock on.
    A younger one may belong to a process that has not come to its lock yet.
    """
    for orphan in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        try:
            if time.time() - orphan.stat().st_mtime < 60:
                continue
            descriptor = os.open(orphan, os.O_RDONLY)
        except OSError:
            continue  # somebody else's sweep was quicker
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(orphan, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def replace_directory(staging: Path, target: Path) -> None:
    """Puts `staging` in the place of `target` in one step: a process killed at any moment leaves the old one or the new
    one. Where the system cannot exchange two directories, the old one is moved aside first.
    """
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        os.rename(target, aside)
        os.rename(staging, target)
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths by renameat2, which glibc has and Python does not; False where it cannot be done."""
    at_fdcwd, rename_exchange = -100, 2
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _settle(directory: Path) -> None:
    """Flushes every file to disk and gives it the umask's mode: safetensors writes 0600, which another user's server
    cannot read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [*directory.rglob("*"), directory]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
