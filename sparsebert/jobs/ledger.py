"""Many small results in one file: one SQLite row per unit, with a key made of everything that decides the result.

A unit whose key is present is never computed again. The file is in WAL mode, so a process killed at any moment loses at
most the unit it was computing. Each row has a checksum, so a damaged file is refused, not used. Several processes may
share a file: each claims the units that it is going to compute.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
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
);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY,      -- of a unit that a process is computing
    owner TEXT NOT NULL,
    until REAL NOT NULL        -- Unix time; later it is anybody's
)
"""
_VERSION = 1  # of the tables; 0 is that of files written before there were claims
LEASE = 60.0  # seconds that a claim lasts unless it is renewed
_COLUMNS = ("key", "kind", "inputs", "code", "result", "seconds", "finished", "sha256")
_ALL = f"SELECT {', '.join(_COLUMNS)} FROM units"


class Ledger:
    """Finished units in the SQLite file `path`, which is created if absent. Local disks only: WAL needs shared memory.
    overwrite: whether a damaged file is moved aside, to a name that ends in .damaged-1 and so on, and begun anew.
    moved: where it was moved to; None if it was not. read_only: the file must be there, and stays as it is.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, read_only: bool = False):
        self._path, self._overwrite, self._read_only = path, overwrite, read_only
        self._told = 0
        self._owner = secrets.token_hex(8)
        self._renewed = 0.0
        self.moved = _moved_aside(path) if overwrite and path.exists() and _is_damaged(path) else None
        import sqlite3  # here, so that users of `jobs` that only write files, such as the engine, do not load it

        with self._refusing("opened"):
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            place = f"{path.absolute().as_uri()}?mode=ro" if read_only else path
            self._db = sqlite3.connect(place, uri=read_only, isolation_level=None, timeout=60)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version < _VERSION and not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(f"{_SCHEMA}; PRAGMA user_version = {_VERSION}")
        if version > _VERSION:
            raise OtherVersion(
                f"ledger {path} was written by a newer version of this package", fix="update it, or name another file"
            )

    def get(self, kind: str, inputs: dict, code: str = "") -> dict | None:
        """The stored result of a unit; None if there is none."""
        key = key_of(kind, inputs, code)
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

    def found(self, kind: str, inputs: Sequence[dict], code: str = "") -> list[dict | None]:
        """The stored result of each unit; None where there is none."""
        keys = [key_of(kind, each, code) for each in inputs]
        held: dict[str, dict] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            rows = self._rows(f"{_ALL} WHERE key IN ({', '.join('?' * len(part))})", *part)
            held |= {row["key"]: json.loads(row["result"]) for row in rows}
        return [held.get(key) for key in keys]

    def add(self, kind: str, units: Sequence[tuple[dict, dict, float]], code: str = "") -> None:
        """Stores units that were computed, (inputs, result, seconds) each, in one step, and ends their claims."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._transaction():
            for inputs, result, seconds in units:
                self._put(kind, inputs, code, json.dumps(result), seconds, now)
                self._db.execute("DELETE FROM claims WHERE key = ?", (key_of(kind, inputs, code),))
        self._told += len(units)
        tell(self._path, f"{self._told} results of this run")

    def remove(self, kind: str, inputs: Sequence[dict], code: str = "") -> None:
        """Forgets these units, so that they are computed again."""
        if inputs:
            with self._transaction():
                self._db.executemany(
                    "DELETE FROM units WHERE key = ?", [(key_of(kind, each, code),) for each in inputs]
                )

    def claim(self, kind: str, inputs: Sequence[dict], code: str = "") -> list[bool]:
        """Claims units for this object, and says which: those that are neither finished nor claimed by another one.
        A claim ends with the unit, with `release`, or LEASE seconds after it was last renewed.
        """
        now, claimed = time.time(), []
        with self._transaction():
            for each in inputs:
                key = key_of(kind, each, code)
                done = self._db.execute("SELECT 1 FROM units WHERE key = ?", (key,)).fetchone()
                held = self._db.execute("SELECT owner FROM claims WHERE key = ? AND until > ?", (key, now)).fetchone()
                claimed.append(not done and (held is None or held[0] == self._owner))
                if claimed[-1]:
                    row = (key, self._owner, now + LEASE)
                    self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", row)
        return claimed

    def renew(self) -> None:
        """Makes this object's claims last LEASE seconds from now. May be called often."""
        if (now := time.time()) - self._renewed > LEASE / 6:
            with self._refusing("written"):
                self._db.execute("UPDATE claims SET until = ? WHERE owner = ?", (now + LEASE, self._owner))
            self._renewed = now

    def release(self) -> None:
        """Ends this object's claims."""
        with self._refusing("written"):
            self._db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))

    def results(self, kind: str) -> list[tuple[dict, dict]]:
        """(inputs, result) of every unit of a kind, in the order in which they were finished."""
        return [(row["inputs"], row["result"]) for row in self.units(kind)]

    def units(self, kind: str) -> list[dict]:
        """Every unit of a kind, in the order in which they were finished: key, inputs, code, result, seconds and
        finished (UTC, ISO 8601).
        """
        rows = self._rows(f"{_ALL} WHERE kind = ? ORDER BY finished, rowid", kind)
        return [row | {"inputs": json.loads(row["inputs"]), "result": json.loads(row["result"])} for row in rows]

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

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """What is written inside the block is written together, or not at all."""
        with self._refusing("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # on a full disk SQLite has ended it
                    self._db.execute("ROLLBACK")
                raise

    def _put(self, kind: str, inputs: dict, code: str, result: str, seconds: float, finished: str) -> None:
        values = (key_of(kind, inputs, code), kind, json.dumps(inputs, sort_keys=True), code, result, seconds, finished)
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
        if self._read_only:
            return "name the ledger of earlier work"
        if self._overwrite:  # it was no damage, or could not be moved aside
            return "free space, or choose another place for it"
        return "free space, or give --overwrite to begin a damaged one anew"


class OtherVersion(OutputError):
    """A ledger that a newer version of this package has written."""


def _is_damaged(path: Path) -> bool:
    """Whether a ledger holds something else than sound rows. A full disk, a lock or missing rights are no damage."""
    import sqlite3

    try:
        with contextlib.closing(Ledger(path)) as ledger:
            ledger._rows(_ALL)
    except OtherVersion:
        return False
    except OutputError as error:
        passing = {
            sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_CANTOPEN,
        }  # fmt: skip
        code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF  # without SQLite's extensions of it
        rights = code == sqlite3.SQLITE_READONLY and not os.access(path, os.W_OK)
        return not (isinstance(error.__cause__, OSError) or code in passing or rights)
    return False


def _moved_aside(path: Path) -> Path:
    number = next(n for n in count(1) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    target = path.with_name(f"{path.name}.damaged-{number}")
    for part in ("-wal", "-shm", ""):
        if (old := path.with_name(f"{path.name}{part}")).exists():
            old.rename(f"{target}{part}")
    return target


def key_of(kind: str, inputs: dict, code: str = "") -> str:
    """The key of a unit."""
    return digest({"kind": kind, "inputs": inputs, "code": code})


def _checksum(row: dict) -> str:
    return digest([str(row[name]) for name in _COLUMNS[:-1]])  # as text: damage may have turned one into a number
