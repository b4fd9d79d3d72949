"""Commands run in this process, as by a user."""

from __future__ import annotations

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
