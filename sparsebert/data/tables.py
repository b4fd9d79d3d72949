"""Reads tables of texts: .csv, .tsv, .jsonl, .parquet. An error names the line that cannot be understood."""

from __future__ import annotations

import decimal
import difflib
import json
import os
import re
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsebert.errors import DataError, InputError, SparsebertWarning, alike, first_line, quoted, shown

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
OF_TEXTS = (".txt", *SUFFIXES)  # files that texts without labels are read from
LABEL = "label"
TEXT_FLAG, LABEL_FLAG = "--text-column", "--label-column"  # of TaskConfig
LARGEST = 1 << 31  # max bytes per file: calibration and test sets are smaller
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# A quoted field, in which quotes are doubled, or a bare one, followed by a comma or a line end. The csv module is not
# used because its limit on the length of a field applies to the whole process.
_FIELD = re.compile(r'(?:"([^"]*+(?:""[^"]*+)*+)"|([^",\r\n][^,\r\n]*+|))(,|\r?\n)')
# Names of text columns in public data sets, the most usual first.
_TEXT_COLUMNS = (
    ("text", "text_b"),
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("query", "passage"),
    ("sentence",),
)
# Other usual names, which a message proposes to rename.
_MEANT = {
    "text": "review content comment message body document tweet utterance headline title phrase input".split(),
    "label": "labels class category sentiment target topic intent rating stars score polarity gold y".split(),
}


@dataclass(frozen=True)
class Table:
    """Columns by name, all of the same length; of .parquet only the columns that are used here. at: the position of
    each row for messages, such as "line 7" or "row 7". names: all columns of the file. label: its column of labels, if
    it has one.
    """

    path: Path
    columns: dict[str, list]
    at: list[str]
    names: tuple[str, ...]
    label: str = LABEL

    def __len__(self) -> int:
        return len(self.at)

    def where(self, row: int) -> str:
        """The file and the position of a row in it, for messages."""
        return f"{self.path}, {self.at[row]}"

    def column(self, name: str, flag: str | None = None, named: bool = False) -> list:
        """The values of a column. DataError, listing the columns, if there is none of this name. flag: by what another
        one can be named. named: whether the user named this one by it.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.path} must have a column {shown(name)}, has {', '.join(map(shown, self.names[:20]))}",
                fix=self._instead_of(name, flag, named),
            )
        return self.columns[name]

    def _instead_of(self, name: str, flag: str | None, named: bool) -> str:
        """What to do about a column that is not there."""
        if any(other.startswith('"') for other in self.names):
            return "write .tsv without quotes, or save it as .csv"
        parts = [part.strip() for part in name.split(",")]
        if named and flag == TEXT_FLAG and len(parts) == len(set(parts) & set(self.names)) == 2:
            return f"give the flag once for each column: {_flags(parts, flag)}"
        like = self._like(name)
        if flag is None:
            fix = f"rename {like!r} to {name!r}" if like else f"name a column {name!r} on the first line"
        elif like:
            fix = f"name the column: {_flags([like], flag)}"
        elif named:
            fix = f"name one of these: {flag} COLUMN"
        else:
            fix = f"name the column: {flag} COLUMN"
            fix += ", or put a line of column names first" if self.path.suffix in (".csv", ".tsv") else ""
        return fix + (" (prune and predict need none)" if name == LABEL and not like else "")

    def _like(self, name: str) -> str | None:
        """The column that is most likely meant by a name that the file does not have, if one is."""
        folded: dict[str, str] = {}
        for other in self.names:
            folded.setdefault(_folded(other), other)
        for meant in (name, *_MEANT.get(name, ())):  # but for case, separators and how accents are composed
            if _folded(meant) in folded:
                return folded[_folded(meant)]
        second = {names[1] for names in _TEXT_COLUMNS if len(names) == 2}  # never meant as the first text
        close = difflib.get_close_matches(_folded(name), [key for key in folded if folded[key] not in second], n=1)
        within = [key for meant in _MEANT.get(name, ()) if len(meant) > 3 for key in folded if meant in key]
        return next((folded[key] for key in (*close, *within)), None)


def read(path: Path, also: tuple[str, ...] = (), label: str | None = None) -> Table:
    """Reads the table in a file; the suffix tells its format. In .csv a field may be quoted; in .tsv a quote is an
    ordinary character. Both need a header, and their values are strings. also: columns wanted besides those of the
    usual names. label: the column of labels where the file has it; else `label` is.

    Raises DataError for a file that is of no such format, is not UTF-8, has no rows, repeats or lacks a column name, or
    has a row of another width, and for a quoted .csv text that has swallowed the rows after it.
    """
    _require_file(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} must end in {', '.join(SUFFIXES)}", fix="convert or rename it")
    try:
        table = _parquet(path, also, label) if path.suffix == ".parquet" else _lines(path, label)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}", fix="repair or replace it") from error
    if not len(table):
        raise DataError(f"{path} must hold at least one row, holds none", fix="add rows")
    return table


def read_texts(path: Path, named: tuple[str, ...] = (), must: bool = False) -> tuple[list[list[str]], int]:
    """(the text columns of a file, one, or two for pairs: the non-blank lines of a .txt, else those of its table; how
    many lines of a .txt were blank). named, must: as in `text_columns`; InputError for names that `require_columns`
    refuses, and with `must` for columns of a .txt.
    """
    require_columns(named)
    if path.suffix == ".txt":
        if named and must:
            raise InputError(f"{path} has lines and no columns, got {shown(named[0])}", fix="leave --text-column out")
        _require_file(path)
        lines, blank = lines_of(path.read_bytes(), path)
        return [lines], blank
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} must end in {', '.join(OF_TEXTS)}", fix="convert or rename it")
    table = read(path, named)
    return [texts_of(table, column) for column in text_columns(table, named, must)], 0


def lines_of(raw: bytes, where: Path | str) -> tuple[list[str], int]:
    """(the non-blank lines of UTF-8 text, stripped; how many were blank). DataError if there are none, or if it is no
    such text; where: what it is from, for messages.
    """
    lines = [line.strip() for line in _decoded(raw, where).removesuffix("\n").split("\n")]
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{where} must hold at least one line of text, holds none", fix="add texts")
    return found, len(lines) - len(found)


def _require_file(path: Path) -> None:
    mode = path.stat().st_mode if path.exists() else 0
    if not stat.S_ISREG(mode):
        kinds = {0: "absent", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        what = "a broken link" if not mode and os.path.islink(path) else kinds.get(stat.S_IFMT(mode), "a device")
        like = alike(path) if what == "absent" else None
        cure = f"did you mean {like}?" if like else f"name one that ends in {', '.join(OF_TEXTS)}"
        raise DataError(f"{path} must be a file, is {what}", fix=cure)
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path} must be below {LARGEST >> 30} GiB, has {path.stat().st_size}", fix="take fewer rows")


def _lines(path: Path, label: str | None) -> Table:
    return {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}[path.suffix](path, _decoded(path.read_bytes(), path), label)


def _labels_in(names: Iterable[str], label: str | None) -> str:
    """The column of labels in a file with these columns, if one was named."""
    return LABEL if label is None or label not in names else label


def _decoded(raw: bytes, path: Path | str) -> str:
    """The text of a file, or of what `path` names in messages."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} must be UTF-8, is UTF-16", fix="save the file as UTF-8")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: must be UTF-8, has byte 0x{raw[error.start]:02x}",
            fix="save the file as UTF-8",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: must be text, has a NUL character", fix="save the file as UTF-8")
    if "\r" in text and "\n" not in text:
        raise DataError(f"{path}: lines must end with a line feed, end with carriage returns", fix="convert them")
    return text


def _csv(path: Path, text: str, label: str | None) -> Table:
    text = text if text.endswith("\n") else text + "\n"
    header = text[: text.index("\n")]
    if "," not in header:
        _require_separator(path, header)
    rows, at, long = [], [], []  # long: fields that span several lines
    row, position, line, start = [], 0, 1, 1
    while position < len(text):
        field = _FIELD.match(text, position)
        if field is None:
            raise DataError(
                f"{path}, line {line}: {_fault(text, position)}",
                fix="put texts with quotes in quotes, their quotes doubled, or save it as .tsv or .jsonl",
            )
        quoted, bare, end = field.groups()
        row.append(bare if quoted is None else quoted.replace('""', '"'))
        if quoted is not None and "\n" in quoted:
            long.append((len(rows), len(row) - 1, line))
            line += quoted.count("\n")
        position = field.end()
        if end != ",":
            if row != [""] or quoted is not None:
                rows.append(row)
                at.append(f"line {start}" if line == start else f"lines {start} to {line}")
            line += 1
            row, start = [], line
    table = _headed(path, rows, at, "quote texts that hold commas, or save the file as .jsonl", label)
    long = [(i - 1, column, line) for i, column, line in long if i]
    if table.label in table.columns:
        _require_no_swallowed(table, long)
    elif long:
        many = f"{len(long):,} texts span" if len(long) > 1 else "a text spans"
        warnings.warn(
            f"{path}: {many} several lines, the first begins on line {long[0][2]}; if it begins with a quote that is "
            "not doubled, the rows after it are in it",
            SparsebertWarning,
            stacklevel=2,
        )
    return table


def _fault(text: str, position: int) -> str:
    """Why no CSV field begins at `position`."""
    if text[position] != '"':
        return "a field outside quotes has a carriage return"
    field = re.compile(r'"[^"]*+(?:""[^"]*+)*+"').match(text, position)
    if field is None:
        return "a quote is opened and never closed"
    return f"a quoted field is followed by {shown(text[field.end() : field.end() + 20])}, not by a comma"


def _tsv(path: Path, text: str, label: str | None) -> Table:
    lines = text.replace("\r\n", "\n").split("\n")
    kept = [(line.split("\t"), i) for i, line in enumerate(lines, start=1) if line]
    for row, i in kept[1:]:
        if '""' in lines[i - 1] and any(map(_is_quoted, row)):
            raise DataError(
                f"{path}, line {i}: is quoted as in .csv, and .tsv is read without quoting: {shown(lines[i - 1])}",
                fix="save the file as .csv, or write it without quoting",
            )
    rows, at = [row for row, _ in kept], [f"line {i}" for _, i in kept]
    cure = "replace tabs and line ends within texts by spaces, or save the file as .jsonl"
    return _headed(path, rows, at, cure, label)


def _is_quoted(field: str) -> bool:
    """Whether a field is in quotes and has further quotes, all of them doubled."""
    inner = field[1:-1]
    return len(field) > 3 and field[0] == field[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def _headed(path: Path, rows: list[list[str]], at: list[str], cure: str, label: str | None) -> Table:
    """The table of the rows, whose first one names the columns. cure: the fix for a row of another width."""
    if not rows:
        raise DataError(f"{path} must begin with a line of column names, is empty", fix="add it")
    names = [name.strip() for name in rows[0]]
    if names[0].startswith("sep=") or (names[0].startswith("#") and len(names) == 1):  # of spreadsheets, a comment
        raise DataError(
            f"{path} must begin with a line of column names, begins with {shown(','.join(names))}",
            fix="remove the line",
        )
    if len(names) == 1:
        _require_separator(path, names[0])
    _require_names(path, names)
    for row, place in zip(rows[1:], at[1:], strict=True):
        if len(row) != len(names):
            raise DataError(
                f"{path}, {place}: must have {len(names)} fields ({shown(', '.join(names))}), has {len(row)}", fix=cure
            )
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}
    return Table(path, columns, at[1:], tuple(names), _labels_in(names, label))


def _require_separator(path: Path, header: str) -> None:
    """DataError for the only column name of a file if it looks like several."""
    if re.search("[,;\t|]", header):
        wanted = "commas" if path.suffix == ".csv" else "tabs"
        raise DataError(
            f"{path} must have its columns separated by {wanted}, begins with {shown(header.strip())}",
            fix="separate them so, or save the file as .jsonl",
        )


def _require_names(where: Path | str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where} must name every column once, has {shown(twice[0])} twice", fix="rename one of them")


def _require_no_swallowed(table: Table, long: list[tuple[int, int, int]]) -> None:
    """Raises DataError if one line of a field that spans several looks like a row, or like the rest of one, with a
    label in the label column: then the field's opening quote was not meant as one. long: row and column of such fields,
    and their first line in the file.
    """
    place, labels = table.names.index(table.label), set(table.columns[table.label])
    numbers = any(map(NUMBER.fullmatch, labels))
    for row, column, first in long:
        lines = table.columns[table.names[column]][row].split("\n")
        for i, line in enumerate(lines):
            fields = line.rstrip("\r").split(",")
            before = 0 if i else column  # fields of the same row before this line, and after it
            behind = 0 if i < len(lines) - 1 else len(table.names) - 1 - column
            if len(fields) != len(table.names) - before - behind or not 0 <= place - before < len(fields):
                continue
            found = fields[place - before]
            if found in labels or (numbers and NUMBER.fullmatch(found)):
                raise DataError(
                    f"{table.path}, line {first + i}: {shown(line)} looks like a row, but is inside a text that begins "
                    f"with a quote on line {first}",
                    fix="double that quote, or save the file as .tsv or .jsonl",
                )


def _jsonl(path: Path, text: str, label: str | None) -> Table:
    rows, at, number = [], [], 0

    def unique(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            _require_names(f"{path}, line {number}:", [name for name, _ in pairs])
        return found

    if text.lstrip()[:1] == "[":
        raise DataError(f"{path} must have a JSON object on each line, is one array", fix="write one object per line")
    decode = json.JSONDecoder(object_pairs_hook=unique).decode
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
            raise DataError(
                f"{path}, line {number}: must be one JSON object: {reason}", fix="write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: must be one JSON object, is {type(row).__name__}",
                fix="write one object per line",
            )
        rows.append(row)
        at.append(f"line {number}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(path, columns, at, tuple(names), _labels_in(names, label))


def _parquet(path: Path, also: tuple[str, ...], label: str | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    known = {LABEL, label, *also, *(name for names in _TEXT_COLUMNS for name in names)}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # unlike read_table, takes no columns from the path
            names = file.schema_arrow.names
            _require_names(path, names)
            found = file.read(columns=[name for name in names if name in known])
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} must be readable parquet: {first_line(error)}", fix="repair or replace it") from error
    columns = {name: [] for name in found.column_names}
    for name, values in columns.items():
        for row, value in enumerate(found[name], start=1):
            try:
                value = value.as_py()
                values.append(float(value) if isinstance(value, decimal.Decimal) else value)
            except ValueError as error:  # such as UnicodeDecodeError
                raise DataError(f"{path}, row {row}: {name} must be UTF-8: {error}", fix="save it as UTF-8") from error
    for name in {LABEL, label, *also} & columns.keys():
        columns[name] = _named_classes(columns[name], found.schema.metadata or {}, name)
    at = [f"row {i}" for i in range(1, found.num_rows + 1)]
    return Table(path, columns, at, tuple(names), _labels_in(names, label))


def _named_classes(labels: list, metadata: dict[bytes, bytes], column: str) -> list:
    """Replaces class ids by the names that `datasets` stores for a ClassLabel; its -1, for unknown, becomes None."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        names = feature.get("names") or feature["feature"]["names"]
    except (KeyError, TypeError, AttributeError, ValueError):  # written by another program, or not a ClassLabel
        return labels

    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return labels

    def named(value):
        if isinstance(value, list):
            return [named(part) for part in value]
        if isinstance(value, bool) or not isinstance(value, int):
            return value  # the column was changed after its classes were named
        return names[value] if 0 <= value < len(names) else None if value == -1 else value

    return [named(value) for value in labels]


def require_columns(named: tuple[str, ...], label: str | None = None) -> None:
    """InputError for named columns that are more than a pair of texts and a label, or one column twice."""
    if len(named) > 2:
        raise InputError(
            f"a row has one text or two, got {len(named)} columns: {', '.join(map(shown, named))}",
            fix="give --text-column once, or twice for pairs",
        )
    twice = [name for name, count in Counter([*named, label]).items() if count > 1]
    if twice:
        raise InputError(f"column {shown(twice[0])} is named twice", fix="name each column once")


def text_columns(table: Table, named: tuple[str, ...] = (), must: bool = False) -> tuple[str, ...]:
    """The names of the one or two text columns: `named`, else `text` (and `text_b`), else names used by public data
    sets. must: whether the table is the one that `named` is about; another one may lack these columns. DataError if it
    must have them and does not, if there are none, or if the columns can be read in two ways.
    """
    if named and (must or set(named) <= table.columns.keys()):
        for name in named:
            table.column(name, TEXT_FLAG, named=True)
        return named
    found = [names for names in _TEXT_COLUMNS if set(names) <= table.columns.keys()]
    found = [names for names in found if not any(set(names) < set(other) for other in found)]
    if len(found) > 1:
        raise DataError(
            f"{table.path} may be read as {' or as '.join(' with '.join(names) for names in found)}",
            fix=f"name the columns, such as {_flags(found[0])}"
            if must
            else "keep the columns of one reading, or rename the others",
        )
    if not found:
        table.column("text", TEXT_FLAG if must else None)  # raises the error, which lists the columns
    usual = {_folded(name) for names in _TEXT_COLUMNS for name in names}
    if more := [name for name in table.names if name not in found[0] and _folded(name) in usual]:
        raise DataError(
            f"{table.path} has texts in {' and '.join(found[0])}, and perhaps in {shown(more[0])}",
            fix=f"name the columns: {_flags([*found[0], more[0]])}, or {_flags(found[0])} alone"
            if must
            else "name the two columns of pairs text and text_b, or rename the others",
        )
    return found[0]


def _flags(columns: Iterable[str], flag: str = TEXT_FLAG) -> str:
    return " ".join(f"{flag} {quoted(column)}" for column in columns)


def _folded(column: str) -> str:
    """A column's name without case, separators and differences of how its accents are composed."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", column)).casefold()


def texts_of(table: Table, name: str) -> list[str]:
    """A column of texts. DataError, naming file and row, unless each is a non-empty string that UTF-8 can hold, without
    NUL.
    """
    texts = table.column(name)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            cure = "remove or fill the row" if text is None or isinstance(text, str) else "write it as a string"
            raise DataError(f"{table.where(row)}: {name} must be a non-empty string, got {shown(text)}", fix=cure)
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError(f"{table.where(row)}: {name} has half a surrogate pair", fix="remove it")
        if "\0" in text:
            raise DataError(f"{table.where(row)}: {name} has a NUL character", fix="remove it")
    return texts


_SURROGATE = re.compile("[\ud800-\udfff]")
