"""The record of finished work: one SQLite row a unit, keyed by everything that decides its result.

A unit whose key is present is never computed again; any change of weights, data, parameter or code is another key. The
file is in WAL mode, so that a process killed at any moment loses at most the unit it was computing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sparsebert import __version__
from sparsebert.errors import InputError, OutputError, first_line

_SCHEMA = """
CREATE TABLE IF NOT EXISTS units (
    key TEXT PRIMARY KEY,      -- sha256 over kind, inputs and code
    kind TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- JSON: what the key was made from
    result TEXT NOT NULL,      -- JSON
    seconds REAL NOT NULL,     -- wall time of the computation
    finished TEXT NOT NULL     -- UTC, ISO 8601
)
"""


_COLUMNS = ("key", "kind", "inputs", "result", "seconds", "finished")
_ALL = f"SELECT {', '.join(_COLUMNS)} FROM units ORDER BY finished, key"


def unit_key(kind: str, inputs: dict, *modules: ModuleType) -> str:
    """sha256 (hex) over the kind, the inputs as canonical JSON, the package's version, and the source of the modules
    that compute the unit.
    """
    digest = hashlib.sha256(f"{kind}\0{__version__}\0{json.dumps(inputs, sort_keys=True)}".encode())
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


class Ledger:
    """Finished units in the SQLite file `path`, created when absent. Local disks only: WAL needs shared memory."""

    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"ledger {path} cannot be opened: {error}", fix="delete it or choose another output folder"
            ) from error

    def get(self, key: str) -> dict | None:
        """The result stored under `key`, or None."""
        try:
            row = self._db.execute("SELECT result FROM units WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise OutputError(f"ledger {self._path} cannot be read: {error}", fix="delete it") from error
        return None if row is None else json.loads(row[0])

    def once(self, kind: str, inputs: dict, compute: Callable[[], dict], *modules: ModuleType) -> dict:
        """The unit's stored result; else `compute()`, stored before it is returned."""
        key = unit_key(kind, inputs, *modules)
        if (stored := self.get(key)) is not None:
            return stored
        start = time.perf_counter()
        result = compute()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._put((key, kind, json.dumps(inputs, sort_keys=True), json.dumps(result), time.perf_counter() - start, now))
        return json.loads(json.dumps(result))

    def export(self, path: Path) -> None:
        """Writes all units to `path`, one JSON object a line, for `take_over`."""
        lines = [json.dumps(dict(zip(_COLUMNS, row, strict=True))) + "\n" for row in self._db.execute(_ALL)]
        fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            fresh.write_text("".join(lines), encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}", fix="free space") from error
        finally:
            fresh.unlink(missing_ok=True)

    def take_over(self, path: Path) -> None:
        """Adds the units that another ledger has exported. InputError where `path` does not hold such."""
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            rows = [tuple(row[name] for name in _COLUMNS) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} must hold units exported from a ledger: {first_line(error)}", fix="name its cells.jsonl"
            ) from error
        for row in rows:
            if self.get(row[0]) is None:
                self._put(row)

    def _put(self, row: tuple) -> None:
        try:
            self._db.execute("INSERT OR REPLACE INTO units VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise OutputError(f"ledger {self._path} cannot be written: {error}", fix="free space") from error

    def close(self) -> None:
        self._db.close()

    def discard(self) -> None:
        """Closes the ledger and removes it: what it was kept for is done."""
        self.close()
        self._path.unlink(missing_ok=True)
