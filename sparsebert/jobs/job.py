"""A piece of long work: its key, the rule for its output, and the folder of its unfinished results."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsebert.errors import OutputError, first_line
from sparsebert.jobs.files import lock, require_space, write, writing

_PACKAGE = Path(__file__).parents[1]
# Parts that do not affect results: their choices are in the inputs, or they only report and store things.
_NO_RESULT = {"config", "environment", "errors", "jobs", "machine"}
_STATE, _LOCK = "job.json", "lock"
_FORMAT = 1  # version of the state file
_KEPT: dict[Path, str] = {}  # path -> what this process has kept there


def told() -> str:
    """What this process has kept so far, as a message for a user who interrupts it."""
    kept = [f"{path} ({what})" for path, what in _KEPT.items() if path.exists()]
    return f"kept: {', '.join(kept)}" if kept else "nothing was finished yet"


def tell(path: Path, what: str) -> None:
    """Notes, for `told`, that something is kept at `path`."""
    _KEPT.pop(path, None)
    _KEPT[path] = what


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_of(module: str) -> str:
    """sha256 (hex) over a module of the package and everything that it imports from the package, directly or not,
    inside functions too. It covers their syntax trees without docstrings and without the messages of errors, so a
    change of prose does not change it.
    """
    found: dict[str, str] = {}
    coming = [module]
    while coming:
        name = coming.pop()
        if name not in found and name.split(".")[1] not in _NO_RESULT:
            found[name], imported = _parsed(name)
            coming += imported
    return digest(found)


@functools.cache
def _parsed(module: str) -> tuple[str, list[str]]:
    """(sha256 of a module's code, modules of the package that it imports)."""
    tree = ast.parse(_file(module).read_bytes())
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if "." in alias.name and _file(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and _file(node.module):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [part for part in parts if _file(part)]
            if node.module != _PACKAGE.name and not all(map(_file, parts)):
                imported.append(node.module)
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.Raise):
            node.exc = node.cause = None
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), imported


@functools.cache
def _file(module: str) -> Path | None:
    """The source file of a module of the package; None for any other module."""
    package, *parts = module.split(".")
    if package != _PACKAGE.name:
        return None
    folder = _PACKAGE.joinpath(*parts)
    if parts[:1] == ["kernels"] and not folder.exists() and not folder.with_suffix(".py").exists():
        folder = _PACKAGE.parent.joinpath(*parts)  # in the repository they lie beside the package
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)


@functools.cache
def core_sha256() -> str:
    """The hash of the compiled core."""
    from sparsebert.ops import _dispatch

    return file_sha256(Path(_dispatch.core().__file__))


def _isa() -> str:
    from sparsebert.ops import _dispatch

    return _dispatch.float32_isa(_dispatch.isa())


class Job:
    """One piece of work and the directory it makes.

    kind: what kind of work it is.
    inputs: JSON, everything that decides the result besides code and machine: content hashes of all files read, and the
        flags, under "settings".
    code: the module that computes it. output: the directory it makes.
    overwrite: whether the results of other work there may be replaced. space: about how many bytes will be written.

    The rule, for finished and unfinished results: results of the same work are used and continued. Results of other
    work at the same place are refused, naming the difference, unless `overwrite` is set.

    As a context manager it holds the folder `<output>.partial`, which `keep` and `value` write to. What they have
    stored is there for the next run of the same job, however this one ends. Each file is written whole, and compared
    with its checksum before it is used. `finish` removes the folder; so does the end of a block that has stored
    nothing. resumed: what the last stored result of an earlier run is; empty if there was none.
    """

    def __init__(self, kind: str, inputs: dict, code: str, output: Path, *, overwrite: bool = False, space: int = 0):
        self.output, self.overwrite, self.space = output, overwrite, space
        self.record = {
            "kind": kind, "inputs": json.loads(json.dumps(inputs)), "code": code_of(code), "core": core_sha256(),
            "isa": _isa(),
        }  # fmt: skip
        self.key = digest(self.record)
        self.partial = output.with_name(f"{output.name}.partial")
        self.resumed = ""
        self._state: dict = {}
        self._lock: int | None = None
        self._held = False
        self._made: list[Path] = []

    def refuse(self, other: dict | None, what: str) -> None:
        """Raises OutputError, naming how `other` differs from this job; does nothing if `overwrite` is set. other: the
        record of another job, or None if it is not known. what: where its results are, as the beginning of the message.
        """
        if not self.overwrite:
            difference, again = self._difference(other)
            raise OutputError(
                f"{what} {difference}", fix=f"{again}choose another -o, or give --overwrite to replace it"
            )

    def __enter__(self) -> Job:
        absent = [path for path in (self.partial, *self.partial.parents) if not path.exists()]
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._made = absent[1:]
            self._take()
        except OSError as error:
            self._leave()
            raise OutputError(
                f"{self.partial} cannot be written: {error.strerror or first_line(error)}", fix="choose another -o"
            ) from error
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_error) -> None:
        if self._state:
            if self._state["files"] or self._state["values"]:
                tell(self.partial, f"up to {self._state['last']}")
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
        self._leave()

    def unfinished(self) -> str:
        """What the last result is that an unfinished run of this job has stored; empty if there is none. Raises
        OutputError if another job has left results in its place that may not be replaced.
        """
        return (self._own() or {}).get("last", "")

    def finish(self) -> None:
        """Removes the stored results: the finished output is in its place, since this run or an earlier one."""
        tell(self.output, "finished")
        if self._state or self._same(self._read()):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._state = {}

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value that `compute` returns, or returned in an earlier run of this job."""
        values = self._state["values"]
        if name not in values:
            values[name] = json.loads(json.dumps(compute()))
            self._commit(name)
        return values[name]

    def keep(self, name: str, tensors: dict, facts: dict | None = None, last: str = "") -> None:
        """Stores torch tensors by name, from any device, and JSON facts about them, in place of those stored under this
        name before. last: what they are, for messages.
        """
        from safetensors.torch import save_file

        before = self._state["files"].get(name)
        file = f"{name}.safetensors"
        if before is not None and before["file"] == file:
            file = f"{name}.next.safetensors"  # the old one stays until the new one is noted
        with writing(self.partial / file) as fresh:
            save_file({part: tensor.cpu().contiguous() for part, tensor in tensors.items()}, fresh)
            sha256 = file_sha256(fresh)
        self._state["files"][name] = {"file": file, "sha256": sha256, "facts": facts or {}}
        self._commit(last or name)
        if before is not None:
            (self.partial / before["file"]).unlink(missing_ok=True)

    def kept(self, name: str) -> tuple[dict, dict] | None:
        """(tensors, facts) that were stored under this name; None if there are none."""
        from safetensors.torch import load_file

        noted = self._state["files"].get(name)
        return None if noted is None else (load_file(self.partial / noted["file"]), noted["facts"])

    def _take(self) -> None:
        """Locks the folder, and reads what an earlier run of the same job has left in it."""
        entries = {path.name for path in self.partial.iterdir()}
        foreign = sorted(name for name in entries if name != _LOCK and not name.startswith("."))
        if self.partial.is_symlink() or (foreign and _STATE not in entries):
            raise OutputError(
                f"{self.partial} exists and holds no unfinished work of this package ({', '.join(foreign[:3])})",
                fix="move it away or choose another -o",
            )
        os.close(os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        try:
            self._lock = lock(self.partial / _LOCK)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is at work on {self.output}", fix="wait for it, or choose another -o"
            ) from error
        self._held = True
        state = self._own()
        damaged = None if state is None else self._damaged(state)
        if damaged is not None:
            if not self.overwrite:
                raise OutputError(
                    f"{damaged} is damaged or missing (its sha256 is not the one noted), so the run cannot resume",
                    fix=f"delete {self.partial}, or give --overwrite, to begin anew",
                )
            state = None
        taken = sum(path.stat().st_size for path in self.partial.iterdir())
        require_space(self.output.parent, self.space - taken)
        noted = {_LOCK} if state is None else {_LOCK, _STATE, *(file["file"] for file in state["files"].values())}
        for path in self.partial.iterdir():
            if path.name not in noted:  # left by other work, or incomplete because of a kill
                path.unlink()
        if state is None:
            self._state = {
                "format": _FORMAT,
                "key": self.key,
                "job": self.record,
                "files": {},
                "values": {},
                "last": "",
            }
            self._commit("")
        else:
            self._state, self.resumed = state, state["last"]

    def _read(self) -> dict | None:
        """The state that a job, this or another, has left; None if there is none, an empty one if it is damaged."""
        try:
            state = json.loads((self.partial / _STATE).read_text(encoding="utf-8"))
            sha256 = state.pop("sha256")
            return state if sha256 == digest(state) and state["format"] == _FORMAT else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return {}

    def _own(self) -> dict | None:
        """As `_read`, but None if another job has left it. Raises OutputError if that may not be replaced."""
        state = self._read()
        if state and not self._same(state):
            self.refuse(state["job"], f"{self.partial} holds an unfinished run")
            return None
        return state

    def _same(self, state: dict | None) -> bool:
        return bool(state) and state["key"] == self.key

    def _damaged(self, state: dict) -> Path | None:
        """A file that differs from what was noted when it was written; None if there is none."""
        if not state:
            return self.partial / _STATE
        for noted in state["files"].values():
            path = self.partial / noted["file"]
            if not path.is_file() or file_sha256(path) != noted["sha256"]:
                return path
        return None

    def _commit(self, last: str) -> None:
        self._state["last"] = last
        write(self.partial / _STATE, json.dumps({**self._state, "sha256": digest(self._state)}))

    def _leave(self) -> None:
        """Releases the folder, and removes the folders that were made for it if they are empty."""
        self._state = {}
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._held and self.partial.is_dir() and {path.name for path in self.partial.iterdir()} <= {_LOCK}:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._held = False
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                break  # in use by now
        self._made = []

    def _difference(self, other: dict | None) -> tuple[str, str]:
        """(how another job differs, how to continue that one)."""
        if other is None:
            return "by a version of this package that did not record its settings", ""
        here, there = _flat(self.record["inputs"]), _flat(other["inputs"])
        shown = [
            _told(name, there.get(name), here.get(name))
            for name in sorted(here | there)
            if here.get(name) != there.get(name)
        ]
        if self.record["kind"] != other["kind"]:
            shown.insert(0, f"{other['kind']}, not {self.record['kind']}")
        again = "repeat those settings, "
        if not shown:  # only then: other work usually has other code anyway
            again = ""
            shown = [
                _told(name, other[part], self.record[part])
                for part, name in (("code", "code"), ("core", "compiled core"), ("isa", "instruction set"))
                if self.record[part] != other[part]
            ]
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        return f"with {'; '.join(shown[:4])}{more}", again


def _flat(inputs: dict, before: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}; settings get the names of their flags."""
    found = {}
    for name, value in inputs.items():
        if before == "settings.":
            found[f"--{name.replace('_', '-')}"] = value
        elif isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def _told(name: str, there: Any, here: Any) -> str:
    """How one input of another job, `there`, differs, for messages."""
    if all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in (there, here)):
        what = _CONTENTS.get(name, f"contents of {name}" if name.startswith("--") else name)
        return f"other {what} (sha256 {there[:8]}…, not {here[:8]}…)"
    return f"{name} {_shown(there)}, not {_shown(here)}"


# What the inputs are whose values are hashes.
_CONTENTS = {"data": "texts or labels in --task", "model": "weights or tokenizer in the model directory"}


def _shown(value: Any) -> str:
    """A value for messages; long ones are cut."""
    return ("the default" if value is None else str(value) or "none")[:60]
