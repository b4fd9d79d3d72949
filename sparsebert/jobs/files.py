"""Writes files and directories whole or not at all, and checks before any work is done that a path can be written."""

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
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from sparsebert.errors import OutputError, first_line

# Errors of file systems that have no locks (Lustre without flock, some FUSE; NFS for files that are open for reading),
# no modes, or no fsync of directories.
_LACKING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EPERM, errno.EBADF}
_YOUNG = 60.0  # seconds; a younger folder may belong to a process that has not locked it yet


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a new file beside `path` to write to. It takes the place of `path` in one step when the block ends without
    an error, so a process killed at any moment leaves the old content or the new. OutputError if it cannot be written.
    """
    fresh = path.with_name(f".{path.name[:64]}.tmp-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It must be new and no link: a file or link that somebody else has placed there is never followed.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield fresh
        _settle(fresh, mode)
        os.replace(fresh, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise OutputError(f"{path} cannot be written: {_reason(error)}", fix=_FIX) from error
    finally:
        with suppress(OSError):  # such as a folder that is none
            fresh.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all. OutputError if that is not possible."""
    with writing(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `target` to fill. It takes the place of `target` in one step when the block ends
    without an error, as `writing` does for a file. Removes the folders that killed processes have left beside it.
    """
    staging = held = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        held = lock(staging)  # marks it as in use while this process lives
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
    """Locks a file or folder and returns a descriptor; closing it releases the lock. None if the file system has no
    locks. BlockingIOError if another process holds the lock.
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
    """An output path with its links resolved. OutputError for a path that no file system accepts."""
    try:
        target = Path(path).resolve()
        str(target).encode()  # records name it, in UTF-8
        target.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL byte
        raise OutputError(
            f"output {_short(path)} cannot be a path: {_reason(error)}", fix="choose another -o"
        ) from error
    return target


def require_place(directory: Path, name: str = "") -> None:
    """Raises OutputError unless a folder `name`, and temporary ones beside it, can be made in `directory` or, if that
    does not exist, in the nearest of its parents that does. Leaves nothing behind.
    """
    existing = _existing(directory)
    require_writable(existing)
    probe = existing / f".{name}.tmp-probe-{os.getpid()}"  # the next `replacing` removes it if this is killed
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
    """Raises OutputError unless `path` is a folder that may be written to."""
    # The mode is checked as well: root may write anywhere, but a directory marked read-only was marked on purpose.
    if not path.is_dir():
        raise OutputError(f"output {path} must be a folder", fix="choose another -o")
    if not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise OutputError(f"output directory {path} is read-only", fix="choose another -o, or make it writable")


def require_space(directory: Path, needed: int) -> None:
    """Raises OutputError if the disk of `directory` has less than `needed` bytes free."""
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{existing} has {free / 2**20:,.0f} MiB free, the output takes about {needed / 2**20:,.0f}",
            fix="free space or choose another -o",
        )


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if os.path.exists(path))  # False for an invalid path


def _settle(path: Path, mode: int) -> None:
    """Gives a file or folder its mode, if the file system has modes, and flushes it to disk."""
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
    """Moves `staging` to `target`. If the system cannot exchange two directories, the old one is moved aside first."""
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        os.rename(target, aside)
        os.rename(staging, target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths by renameat2, which glibc has and Python has not; False if that is not possible."""
    at_fdcwd, rename_exchange = -100, 2
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _sweep(target: Path) -> None:
    """Removes staging folders of `target` that no process has locked."""
    for orphan in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        try:
            if time.time() - orphan.stat().st_mtime < _YOUNG or (held := lock(orphan)) is None:
                continue
        except OSError:
            continue  # in use, or already removed by another process
        shutil.rmtree(orphan, ignore_errors=True)
        os.close(held)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)[:200]


def _short(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:80]}… ({len(text)} characters)"
