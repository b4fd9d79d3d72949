"""Files and directories written whole or not at all, and what a place must allow, tried before any work is done."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from sparsebert.errors import OutputError, first_line

# What file systems answer that have no locks (Lustre without flock, some FUSE; NFS for what is open for reading), no
# modes, or no fsync of directories.
_LACKING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EPERM, errno.EBADF}
_YOUNG = 60.0  # seconds; a folder of that age may belong to a process that has not come to its lock yet


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A fresh file beside `path` to be written to, which takes its place in one step when the block ends well: a
    process killed at any moment leaves the old content or the new. OutputError where it cannot be written.
    """
    fresh = path.with_name(f".{path.name[:64]}.tmp-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # New and no link: a name that somebody else has prepared is never followed.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield fresh
        _settle(fresh, mode)
        os.replace(fresh, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has a name of its own for a full disk
        raise OutputError(f"{path} cannot be written: {_reason(error)}", fix=_FIX) from error
    finally:
        fresh.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all. OutputError where it cannot be."""
    with writing(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` to be filled, which takes its place in one step when the block ends well, as
    `writing` does with a file. What killed processes left beside it is removed.
    """
    staging = held = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        held = lock(staging)  # says that it is in use, for as long as this process lives
        _sweep(target)
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        for path in [*staging.rglob("*"), staging]:
            # safetensors writes 0600, which another user's server cannot read.
            _settle(path, (0o777 if path.is_dir() else 0o666) & ~umask)
        _put(staging, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target} cannot be written: {_reason(error)}", fix=_FIX) from error
    finally:
        if held is not None:
            os.close(held)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


_FIX = "free space or choose another output directory"


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed; None where the file system has no locks.
    BlockingIOError where another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _LACKING:
            raise
        return None
    return descriptor


def place(path: str | Path) -> Path:
    """A path that may be written to, with its links resolved. OutputError for one that no file system takes."""
    try:
        target = Path(path).resolve()
        target.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL byte
        raise OutputError(
            f"output {_short(path)} cannot be a path: {_reason(error)}", fix="choose another -o"
        ) from error
    return target


def require_place(directory: Path, name: str = "") -> None:
    """OutputError unless a folder `name`, and others beside it, can be made in `directory`, or in the nearest of its
    parents that exists. Leaves nothing behind.
    """
    existing = _existing(directory)
    require_writable(existing)
    probe = existing / f".{name}.tmp-probe-{os.getpid()}"  # which the next `replacing` removes if this is killed
    remove = partial(shutil.rmtree, probe, ignore_errors=True)
    try:
        with ExitStack() as stack:  # twice: Ctrl-C may come in the middle of the first
            stack.callback(remove)
            stack.callback(remove)
            (probe / directory.relative_to(existing) / f".{name}.tmp-12345678").mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"nothing can be written in {_short(directory)}: {_reason(error)}", fix="choose another -o"
        ) from error


def require_writable(path: Path) -> None:
    """OutputError unless `path` is a folder that may be written to."""
    # The mode is asked as well: root may write anywhere, and a directory marked read-only is so by someone's wish.
    if not path.is_dir():
        raise OutputError(f"output {path} must be a folder", fix="choose another -o")
    if not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise OutputError(f"output directory {path} is read-only", fix="choose another -o, or make it writable")


def require_space(directory: Path, needed: int) -> None:
    """OutputError where the disk of `directory` clearly has less than so many bytes."""
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{existing} has {free / 2**20:,.0f} MiB free, what is to be written takes about {needed / 2**20:,.0f}",
            fix="free space or choose another -o",
        )


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if os.path.exists(path))  # False for what is no path


def _settle(path: Path, mode: int) -> None:
    """Gives a file or folder its mode, where there are modes, and flushes it to disk."""
    try:
        path.chmod(mode & 0o777)
    except OSError as error:
        if error.errno not in _LACKING:
            raise
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _LACKING:
            raise
    finally:
        os.close(descriptor)


def _put(staging: Path, target: Path) -> None:
    """Where the system cannot exchange two directories, the old one is moved aside first."""
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        os.rename(target, aside)
        os.rename(staging, target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths by renameat2, which glibc has and Python does not; False where it cannot be done."""
    at_fdcwd, rename_exchange = -100, 2
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _sweep(target: Path) -> None:
    """Removes staging folders of `target` that nobody holds a lock on."""
    for orphan in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        try:
            if time.time() - orphan.stat().st_mtime < _YOUNG or (held := lock(orphan)) is None:
                continue
        except OSError:
            continue  # in use, or somebody else's sweep was quicker
        shutil.rmtree(orphan, ignore_errors=True)
        os.close(held)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)[:200]


def _short(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:80]}… ({len(text)} characters)"
