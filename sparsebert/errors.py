"""Errors a user can mend. Each says what was expected, what was found, and what to do about it.

The command line prints one as a single line and exits with code 2; nothing else in the package catches them.
"""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class SparsebertError(Exception):
    """A fault in what the user gave us.

    problem: the rule, then the actual value, naming the file, tensor or field.
    fix: what to do next, an imperative without a full stop; it ends the printed line.
    """

    def __init__(self, problem: str, *, fix: str):
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return " ".join(f"{self.problem}; {self.fix}".split())


class InputError(SparsebertError):
    """An argument, a text or a label that breaks its contract."""


class DataError(SparsebertError):
    """A data set that is missing, unreadable or malformed."""


class CheckpointError(SparsebertError):
    """A model directory that is incomplete, corrupt or not what its manifest says."""


class UnsupportedError(SparsebertError):
    """A model, pattern or machine the package has no code for."""


class OutputError(SparsebertError):
    """A place results were to be written to and cannot be."""
