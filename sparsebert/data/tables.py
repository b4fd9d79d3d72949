"""Tables of texts as people have them: .csv, .tsv, .jsonl, .parquet. What is not understood is refused by its line."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sparsebert.errors import DataError, first_line

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
LARGEST = 1 << 31  # bytes of a file: more is no calibration or test set
FIELD = 1 << 27  # characters of one field


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length. at: where each row stands, for messages: "line 7", "row 7"."""

    path: Path
    columns: dict[str, list]
    at: list[str]

    def __len__(self) -> int:
        return len(self.at)

    def where(self, row: int) -> str:
        """The file and the place of a row in it."""
        return f"{self.path}, {self.at[row]}"

    def column(self, name: str) -> list:
        """DataError, listing the columns that there are, where this one is not."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            hint = f"rename {near[0]!r} to {name!r}" if near else f"name a column {name!r}"
            found = ", ".join(map(repr, self.columns))
            raise DataError(f"{self.path} must have a column {name!r}, has {found}", fix=hint)
        return self.columns[name]


def read(path: Path) -> Table:
    """The table in a file; its kind is told by its suffix. In .csv a field may be quoted, in .tsv a quote is a
    character like any other; both need a header. Values of .csv and .tsv are strings.

    Raises DataError for what is no such file, is not UTF-8, has no rows, repeats or lacks a column name, has a row of
    another width, and for a quoted text of .csv that has swallowed the rows behind it.
    """
    _require_file(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} must end in {', '.join(SUFFIXES)}", fix="convert or rename it")
    try:
        table = _parquet(path) if path.suffix == ".parquet" else _lines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}", fix="repair or replace it") from error
    if not len(table):
        raise DataError(f"{path} must hold at least one row, holds none", fix="add rows")
    return table


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "absent"
        raise DataError(f"{path} must be a file, is {what}", fix="name a .csv, .tsv, .jsonl or .parquet file")
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path} must be below {LARGEST >> 30} GiB, has {path.stat().st_size}", fix="take fewer rows")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank. DataError where there are none, or it is no such file."""
    _require_file(path)
    found = [line.strip() for line in _decoded(path).split("\n") if line.strip()]
    if not found:
        raise DataError(f"{path} must hold at least one line of text, holds none", fix="add texts")
    return found


def _lines(path: Path) -> Table:
    return {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}[path.suffix](path, _decoded(path))


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: must be UTF-8, has byte 0x{raw[error.start]:02x}",
            fix="save the file as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(f"{path} must be text, has a NUL character", fix="save the file as UTF-8")
    return text


def _csv(path: Path, text: str) -> Table:
    rows, at, start = [], [], 1
    limit = csv.field_size_limit(FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            if row:
                rows.append(row)
                at.append(f"line {start}" if reader.line_num == start else f"lines {start} to {reader.line_num}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, from line {start}: no CSV: {error}",
            fix="put texts with quotes in quotes, their quotes doubled, or save it as .tsv or .jsonl",
        ) from error
    finally:
        csv.field_size_limit(limit)
    table = _headed(path, rows, at)
    _require_no_swallowed(table)
    return table


def _tsv(path: Path, text: str) -> Table:
    lines = text.replace("\r\n", "\n").split("\n")
    kept = [(line.split("\t"), f"line {i}") for i, line in enumerate(lines, start=1) if line]
    return _headed(path, [row for row, _ in kept], [place for _, place in kept])


def _headed(path: Path, rows: list[list[str]], at: list[str]) -> Table:
    """The table of rows whose first one names the columns."""
    if not rows:
        raise DataError(f"{path} must begin with a line of column names, is empty", fix="add it")
    names = [name.strip() for name in rows[0]]
    _require_names(path, names)
    for row, place in zip(rows[1:], at[1:], strict=True):
        if len(row) != len(names):
            raise DataError(
                f"{path}, {place}: must have {len(names)} fields ({', '.join(names)}), has {len(row)}",
                fix="quote a text that holds the separator, or save the file as .jsonl",
            )
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}
    return Table(path, columns, at[1:])


def _require_names(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} must name every column once, has {twice[0]!r} twice", fix="rename one of them")


def _require_no_swallowed(table: Table) -> None:
    """DataError for a field of several lines of which one, by itself, would be a row: a quote that was opened and never
    meant to be. By a label that such a line has at the right place, else by its number of fields.
    """
    names = list(table.columns)
    if len(names) < 2:
        return
    place = names.index("label") if "label" in names else None
    labels = set() if place is None else {value.strip() for value in table.columns["label"]}
    numbers = any(value.isdecimal() for value in labels)
    for column in table.columns.values():
        for row, text in enumerate(column):
            for line in text.splitlines()[1:] if "\n" in text else ():
                fields = [field.strip().strip('"') for field in line.split(",")]
                if place is None:
                    looks = len(fields) == len(names)
                elif len(fields) < len(names):
                    looks = False
                else:
                    found = fields[place if place == 0 else place - len(names)]
                    looks = found in labels or (numbers and found.isdecimal())
                if looks:
                    raise DataError(
                        f"{table.where(row)}: a quoted text holds what looks like another row, {line[:60]!r}: its "
                        "quote was perhaps never closed",
                        fix="close or double the quote, or save the file as .tsv or .jsonl",
                    )


def _jsonl(path: Path, text: str) -> Table:
    rows, at = [], []
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_object(path, i, line))
            at.append(f"line {i}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, at)


def _object(path: Path, number: int, line: str) -> dict:
    def unique(pairs: list[tuple]) -> dict:
        _require_names(path, [name for name, _ in pairs])
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise DataError(
            f"{path}, line {number}: must be one JSON object: {reason}", fix="write one object a line"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{path}, line {number}: must be one JSON object, is {type(found).__name__}", fix="write one object a line"
        )
    return found


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        _require_names(path, table.column_names)
        columns = table.to_pydict()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} must be readable parquet, its texts UTF-8: {first_line(error)}", fix="repair or replace it"
        ) from error
    return Table(path, columns, [f"row {i}" for i in range(1, table.num_rows + 1)])


# Columns of texts under the names that public data sets give them, most usual first.
_TEXT_COLUMNS = (
    ("text", "text_b"),
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("sentence",),
)


def text_columns(table: Table) -> tuple[str, ...]:
    """The names of the one or two columns of texts: `text` (and `text_b`), else what public data sets call them.
    DataError where there are none, or where two readings are possible.
    """
    if "text" not in table.columns:
        found = [names for names in _TEXT_COLUMNS if set(names) <= table.columns.keys()]
        found = [names for names in found if not any(set(names) < set(other) for other in found)]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(
                f"{table.path} may be read as {' or as '.join(' with '.join(names) for names in found)}",
                fix="name the columns 'text' and 'text_b'",
            )
        table.column("text")
    return ("text", "text_b") if "text_b" in table.columns else ("text",)


def texts_of(table: Table, name: str) -> list[str]:
    """A column of texts, each a non-empty string that UTF-8 can hold. DataError, naming file and row, for another."""
    texts = table.column(name)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            shown = repr(text)[:60]
            raise DataError(
                f"{table.where(row)}: {name} must be a non-empty string, got {shown}", fix="remove or fill the row"
            )
        if _SURROGATE.search(text):
            raise DataError(f"{table.where(row)}: {name} has half a surrogate pair", fix="decode the file as UTF-8")
    return texts


_SURROGATE = re.compile("[\ud800-\udfff]")
