"""Commands run in this process, as by a user."""

from __future__ import annotations

import time
from pathlib import Path

from sparsebert.cli import main


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


def spawned(parent: int) -> list[int]:
    """The processes that a process, in any of its threads, has spawned by multiprocessing and that have begun."""

    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:  # the thread or process has ended meanwhile
            return b""

    listed = [read(task / "children").split() for task in Path(f"/proc/{parent}/task").iterdir()]
    return [int(pid) for each in listed for pid in each if b"spawn_main" in read(Path(f"/proc/{int(pid)}/cmdline"))]


def until(happens, seconds: float = 60.0) -> None:
    """Returns once `happens()` is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
