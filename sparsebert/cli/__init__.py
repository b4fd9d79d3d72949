"""The `sparsebert` command. `main` is its entry point; each command imports what it needs when it runs, so that --help
is quick.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparsebert import environment
from sparsebert.errors import LONGEST, SparsebertError, SparsebertWarning, cut, without_extra
from sparsebert.ops import _dispatch

INTERRUPTED = 130
RETRY = 0.05  # seconds after which an interrupt that came at a bad moment is tried again


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stdout is None:
        return _refuse("standard output is closed; open it, or send it to a file")
    if hasattr(sys.stdout, "reconfigure"):  # of the console's encoding, which may lack a text's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError:  # of which torch's libraries would abort
        return _refuse("the working directory is not there any more; go to another one")
    if arguments[:1] != ["bench"]:  # there torch is timed as it comes
        environment.calm_openmp(_dispatch.granted())
    try:
        with interrupts_at_safe_moments(), warnings_of_one_line():
            code = _run(arguments or ["--help"])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SparsebertError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        if (told := without_extra("this command", error)) is None:
            raise
        code = _refuse(str(told))
    except OSError as error:  # a path no file system takes, a standard output that is full
        where = f"{cut(str(error.filename))}: " if error.filename else ""
        code = _refuse(f"{where}{error.strerror or error}; correct the path or free space")
        _give_up_stdout()
    if code == INTERRUPTED:
        from sparsebert.jobs import told

        print(f"interrupted: {told()}, nothing is half-written; run the same command again", file=sys.stderr)
    return code


@contextmanager
def interrupts_at_safe_moments() -> Iterator[None]:
    """While it lasts, Ctrl-C in the middle of an import or a finalizer takes effect when that is over: in torch's
    import it would abort the process, in a finalizer be printed and forgotten. Where the caller handles or ignores
    Ctrl-C otherwise, that stays.
    """
    alone = threading.current_thread() is threading.main_thread()  # no other may set what signals do
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(_signal: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>" or frame.f_code.co_name == "__del__":
                signal.setitimer(signal.ITIMER_REAL, RETRY)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def warnings_of_one_line() -> Iterator[None]:
    """While it lasts, what the package warns of is said once, without the place in the code."""
    with warnings.catch_warnings():
        others = warnings.showwarning
        warnings.simplefilter("once", SparsebertWarning)

        def show(message, category, *where, **more) -> None:
            if issubclass(category, SparsebertWarning):
                print(f"warning: {cut(str(message))}", file=sys.stderr)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _give_up_stdout() -> None:
    """Lets the interpreter's last flush succeed where standard output cannot be written: it would exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    from typer.exceptions import TyperException

    from sparsebert.cli.commands import app

    try:
        return app(arguments, standalone_mode=False) or 0
    except TyperException as error:  # a missing, unknown or malformed argument
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "sparsebert"
        problem = error.format_message().rstrip(".").replace("Value error, ", "")  # of pydantic
        return _refuse(f"{cut(problem)}; see {command} --help")


def _refuse(problem: str) -> int:
    print("error: " + cut(problem, 2 * LONGEST), file=sys.stderr)
    return 2
