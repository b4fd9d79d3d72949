"""The `sparsebert` command. `main` is its entry point; each command imports what it needs when it runs, so that --help
is quick.
"""

from __future__ import annotations

import sys

from sparsebert.errors import SparsebertError

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    from typer.exceptions import TyperException

    from sparsebert.cli.commands import app

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SparsebertError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except TyperException as error:  # a missing, unknown or malformed argument
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "sparsebert"
        print(f"error: {error.format_message().rstrip('.')}; see {command} --help", file=sys.stderr)
        code = 2
    if code == INTERRUPTED:
        print(
            "interrupted: finished work is kept, nothing is half-written; run the same command again", file=sys.stderr
        )
    return code
