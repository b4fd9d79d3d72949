"""Errors that a user can fix. Each says what was expected, what was found, and what to do about it.

The command line prints one as a single line and exits with code 2.
"""

import re
import reprlib
import shlex
from functools import partial
from pathlib import Path

LONGEST = 500  # max characters of a problem, or of its fix, in a message


def cut(text: str, longest: int = LONGEST) -> str:
    """The text on one line: other white space than spaces becomes a space, what a terminal would obey its escape. If it
    is longer than `longest`, its middle is left out, so that a long path keeps both ends.
    """
    text = re.sub(r" *[^\S \xa0]+ *", " ", text).strip()
    if not text.isprintable():
        text = "".join(one if one.isprintable() or one == "\xa0" else ascii(one)[1:-1] for one in text)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {text[-half:]}"


def quoted(word: str) -> str:
    """The word as a shell reads it; of characters that a terminal would obey, the bytes by number, as in $'\\x0a'."""
    if word.isprintable():
        return shlex.quote(word)

    def escaped(one: str) -> str:
        if one.isprintable():
            return f"\\{one}" if one in "\\'" else one
        return "".join(f"\\x{byte:02x}" for byte in one.encode(errors="surrogateescape"))

    return f"$'{''.join(map(escaped, word))}'"


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:  # Python does not print more than 4,300 digits
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<an integer of {x.bit_length()} bits>"


_short = _Short()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """A value as messages show it: its repr, shortened; the type's name if repr fails."""
    return cut(_short.repr(value), 200)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def alike(path: Path, *, folders: bool = False) -> Path | None:
    """The file or folder beside `path` whose name is most like its name, if one is. folders: only folders."""
    import difflib  # for bad input only

    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or not folders]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, names, 1, 0.8)
    return path.parent / close[0] if close else None


class SparsebertError(Exception):
    """An error that the user can fix.

    problem: the rule, then the actual value, naming the file, tensor or field.
    fix: what to do next, an imperative without a full stop; it ends the printed line.
    """

    def __init__(self, problem: str, *, fix: str):
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{cut(self.problem)}; {cut(self.fix)}"

    def __reduce__(self):  # between processes; an exception is else made again without keywords
        return partial(type(self), fix=self.fix), (self.problem,)


class InputError(SparsebertError):
    """An argument, a text or a label that breaks its contract."""


class DataError(SparsebertError):
    """A data set that is missing, unreadable or malformed."""


class CheckpointError(SparsebertError):
    """A model directory that is incomplete, corrupt or not what its manifest says."""


class UnsupportedError(SparsebertError):
    """A model, pattern or machine the package has no code for."""


class OutputError(SparsebertError):
    """A place to which results cannot be written."""


class SparsebertWarning(UserWarning):
    """A fact that the user should know and need not fix; the command line prints it as one line."""


# Module -> the extra of this package that installs it.
_EXTRAS = {
    **dict.fromkeys(("greenlet", "pyarrow", "scipy", "sklearn", "torch", "transformers"), "prune"),
    **dict.fromkeys(("duckdb", "plotly"), "eval"),
    "sentence_transformers": "demo",
    "datasets": "hub",
    **dict.fromkeys(
        ("aiohttp", "fastapi", "httptools", "prometheus_client", "starlette", "uvicorn", "uvloop"), "serve"
    ),
    "matplotlib": "bench",
    **dict.fromkeys(("grpc", "ray"), "ray"),
    "opentelemetry": "trace",
    "textattack": "textattack",
}


def without_extra(what: str, error: ModuleNotFoundError) -> UnsupportedError | None:
    """The error for `what`, which needs a module that is not installed; None if no extra installs it."""
    module = (error.name or "").partition(".")[0]
    if module not in _EXTRAS:
        return None
    return UnsupportedError(f"{what} needs {module}", fix=f"pip install 'sparsebert[{_EXTRAS[module]}]'")
