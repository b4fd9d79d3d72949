"""Many small results in one file: one SQLite row per unit, with a key made of everything that decides the result.

A unit whose key is present is never computed again. The file is in WAL mode, so a process killed at any moment loses at
most the unit it was computing. Each row has a checksum, so a damaged file is refused, not used.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsebert.errors import InputError, OutputError, first_line
from sparsebert.jobs.files import write
from sparsebert.jobs.job import digest, tell

_SCHEMA = """
CREATE TABLE IF NOT EXISTS units (
    key TEXT PRIMARY KEY,      -- sha256 over kind, inputs and code
    kind TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- JSON
    code TEXT NOT NULL,        -- hash of the code, if it is part of the key; else empty
    result TEXT NOT NULL,      -- JSON
    seconds REAL NOT NULL,     -- wall time of the computation
    finished TEXT NOT NULL,    -- UTC, ISO 8601
    sha256 TEXT NOT NULL       -- over the other columns
)
"""
_COLUMNS = ("key", "kind", "inputs", "code", "result", "seconds", "finished", "sha256")
_ALL = f"SELECT {', '.join(_COLUMNS)} FROM units"


class Ledger:
    """Finished units in the SQLite file `path`, which is created if absent. Local disks only: WAL needs shared memory.
    overwrite: whether a damaged file is replaced by an empty one.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        self._path = path
        self._told = 0
        if overwrite and path.exists():
            try:
                old = Ledger(path)
                with contextlib.closing(old):
                    old._rows(_ALL)
            except OutputError:
                for part in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                    part.unlink(missing_ok=True)
        import sqlite3  # here, so that users of `jobs` that only write files, such as the engine, do not load it

        with self._refusing("opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)

    def get(self, kind: str, inputs: dict, code: str = "") -> dict | None:
        """The stored result of a unit; None if there is none."""
        key = _key(kind, inputs, code)
        rows = [row for row in self._rows(f"{_ALL} WHERE key = ?", key) if row["key"] == key]
        return json.loads(rows[0]["result"]) if rows else None

    def once(self, kind: str, inputs: dict, compute: Callable[[], dict], code: str = "") -> dict:
        """The unit's stored result; else the result of `compute()`, stored before it is returned. code: `code_of` the
        module that computes it, if another version of that module must compute it again.
        """
        if (stored := self.get(kind, inputs, code)) is not None:
            return stored
        start = time.perf_counter()
        result = json.dumps(compute())
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._put(kind, inputs, code, result, time.perf_counter() - start, now)
        self._told += 1
        tell(self._path, f"{self._told} results of this run")
        return json.loads(result)

    def results(self, kind: str) -> list[tuple[dict, dict]]:
        """(inputs, result) of every unit of a kind, in the order in which they were finished."""
        rows = self._rows(f"{_ALL} WHERE kind = ? ORDER BY finished, rowid", kind)
        return [(json.loads(row["inputs"]), json.loads(row["result"])) for row in rows]

    def export(self, path: Path) -> None:
        """Writes all units to `path`, one JSON object per line, for `take_over`."""
        rows = self._rows(f"{_ALL} ORDER BY finished, key")
        write(path, "".join(json.dumps(row) + "\n" for row in rows))

    def take_over(self, path: Path) -> None:
        """Adds the units that another ledger has exported, with this version or an earlier one. InputError if `path`
        does not hold such units, or is damaged.
        """
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                json.loads(row["result"])
                if "sha256" in row and row["sha256"] != _checksum(row):
                    raise ValueError(f"unit {row['key']} does not match its checksum")
            units = [
                (row["kind"], json.loads(row["inputs"]), row.get("code", ""), row["result"], float(row["seconds"]),
                 str(row["finished"])) for row in rows
            ]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} must hold units exported from a ledger: {first_line(error)}", fix="name its cells.jsonl"
            ) from error
        for unit in units:
            if self.get(*unit[:3]) is None:
                self._put(*unit)

    def close(self) -> None:
        self._db.close()

    def _put(self, kind: str, inputs: dict, code: str, result: str, seconds: float, finished: str) -> None:
        values = (_key(kind, inputs, code), kind, json.dumps(inputs, sort_keys=True), code, result, seconds, finished)
        row = dict(zip(_COLUMNS, values, strict=False))
        with self._refusing("written"):
            self._db.execute("INSERT OR REPLACE INTO units VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, _checksum(row)))

    def _rows(self, query: str, *values: str) -> list[dict]:
        with self._refusing("read"):
            rows = [dict(zip(_COLUMNS, row, strict=True)) for row in self._db.execute(query, values)]
        for row in rows:
            if row["sha256"] != _checksum(row):
                raise OutputError(f"ledger {self._path} is damaged: unit {row['key']!r}", fix=self._fix)
        return rows

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        import sqlite3

        try:
            yield
        # Damage may raise any of these: SQLite's own errors, text that is not UTF-8, a missing page.
        except (OSError, sqlite3.Error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise OutputError(f"ledger {self._path} cannot be {what}: {first_line(error)}", fix=self._fix) from error

    @property
    def _fix(self) -> str:
        return "free space, or give --overwrite to begin a damaged one anew"


def _key(kind: str, inputs: dict, code: str) -> str:
    return digest({"kind": kind, "inputs": inputs, "code": code})


def _checksum(row: dict) -> str:
    return digest([str(row[name]) for name in _COLUMNS[:-1]])  # as text: damage may have turned one into a number
