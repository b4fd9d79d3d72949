"""Reads the files of a folder in one consistent state: opened once, regular files only, of limited length."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sparsebert.errors import CheckpointError, first_line

REBUILD = "copy the directory again from its source, or make it anew"
MIB = 2**20


class Folder:
    """An open folder. Everything read through it comes from this one folder, even if another takes its path in the
    meantime; `require_same` detects changed files.
    """

    def __init__(self, path: Path):
        self.path = path
        self._state: dict[str, tuple[int, ...] | None] = {}
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise CheckpointError(
                f"{path} must be a readable folder: {error.strerror}", fix="check the path"
            ) from error

    def __del__(self):
        if (handle := getattr(self, "_handle", None)) is not None:
            os.close(handle)

    def names(self) -> set[str]:
        return set(os.listdir(self._handle))

    def open(self, name: str) -> BinaryIO | None:
        """Opens a file; None if it does not exist. CheckpointError if it is not a regular file."""
        try:
            # O_NONBLOCK: opening a pipe that nobody writes to must not block.
            handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._handle)
        except FileNotFoundError:
            self._state[name] = None
            return None
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror}", fix=REBUILD) from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            raise CheckpointError(f"{self.path / name} must be a regular file", fix=REBUILD)
        self._state[name] = _state(status)
        return os.fdopen(handle, "rb", buffering=0)

    def read(self, name: str, most: int) -> bytes | None:
        """The content of a file, which may have at most `most` bytes; None if it does not exist."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            size = self._state[name][0]
            if size > most:
                raise CheckpointError(
                    f"{self.path / name} must have at most {most // MIB} MiB, has {size // MIB}", fix=REBUILD
                )
            return b"".join(iter(lambda: file.read(MIB), b""))

    def read_json(self, name: str, most: int) -> Any:
        """The JSON document in a file; None if the file does not exist."""
        data = self.read(name, most)
        return None if data is None else parse_json(data, self.path / name)

    def state(self, names: list[str]) -> list[list[int]]:
        """Size, times, inode and device of files that were opened: the numbers stay the same until somebody writes a
        file.
        """
        return [list(self._state[name] or ()) for name in names]

    def require_same(self) -> None:
        """Raises Changed, a CheckpointError, if a file that was read has been changed or replaced since."""
        for name, seen in self._state.items():
            try:
                now = _state(os.stat(self.path / name))
            except OSError:
                now = None
            if now != seen:
                raise Changed(f"{self.path / name} changed while it was read", fix="load it again after the write")


class Changed(CheckpointError):
    """The error for a file that was written while the directory was read."""


def parse_json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        fault = "it is nested too deep"
    except ValueError as error:
        fault = first_line(error)
    raise CheckpointError(f"{path} must be a JSON file in UTF-8: {fault}", fix="restore it from its source")


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
