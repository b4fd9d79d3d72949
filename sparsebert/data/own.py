"""The user's own tasks: a folder with `train` and `test`, or one file, which is split by a hash of its texts."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsebert.config import TaskConfig
from sparsebert.data.examples import Examples, sameness
from sparsebert.data.tables import (
    LABEL,
    LABEL_FLAG,
    NUMBER,
    SUFFIXES,
    Table,
    read,
    require_columns,
    text_columns,
    texts_of,
)
from sparsebert.data.tasks import TASKS, Task
from sparsebert.errors import DataError, InputError, alike, quoted, shown
from sparsebert.heads import fold

MAX_CLASSES = 1000  # a column with more values is not a label
LARGEST_VALUE = 1e15  # max |label|
_MISSING = ("nan", "nat", "<na>", "null", "n/a", "#n/a")  # how pandas, SQL and spreadsheets write a missing value
_MISSING_IN_R = "NA"  # "na" may be a name
TEST_SHARE = 0.2  # share of one file that becomes the test split
# File names of each split. The second names are used only if there is no file of the first name.
_SPLITS = {"train": [("train",)], "test": [("test",), ("validation", "valid", "dev")]}


def get_task(task: str | TaskConfig, *, labelled: bool = True, values: bool = False, beside: bool = False) -> Task:
    """The known task, or the user's own task in the folder or file of this name. labelled: whether labels are needed;
    if not, they are ignored. values: whether numbers in a file are values (regression), not class ids. beside: whether
    it is a set beside the task: all rows of a single file are its test split, and columns that were named need not be
    there. Raises InputError for an unknown name, and for columns of a known task; DataError for files that cannot be
    understood.
    """
    asked = TaskConfig.of(task)
    name = asked.task
    require_columns(asked.text_column, asked.label_column)
    if name in TASKS:
        if (asked.text_column or asked.label_column is not None) and not beside:
            raise InputError(
                f"the columns of the known task {name} are known, some are named",
                fix="leave --text-column and --label-column out",
            )
        return replace(TASKS[name], labelled=labelled)
    path = Path(name)
    try:
        if path.is_dir():
            return _of_tables(path, _in_folder(path, asked), asked, labelled, values, beside)
        wanted = os.path.lexists(path) or (path.suffix in SUFFIXES and not path.exists() and "\0" not in name)
    except (OSError, ValueError):  # not a valid path
        wanted = False
    if wanted:
        found = {"test" if beside else "": read(path, asked.text_column, asked.label_column)}
        return _of_tables(path, found, asked, labelled, values, beside)
    if like := alike(path) or next(iter(difflib.get_close_matches(name, TASKS, 1)), None):
        raise InputError(f"there is no file, folder or task {shown(name)}", fix=f"did you mean {like}?")
    raise InputError(
        f"task must be one of {', '.join(TASKS)}, a folder, or a file that ends in {', '.join(SUFFIXES)}, got "
        f"{shown(name)}",
        fix="choose one of these",
    )


def rows_read(task: Task) -> dict | None:
    """Number of rows per split of the user's own task, how it was split and by which columns it was read; None for a
    known task.
    """
    if task.own is None:
        return None
    rows = {split: len(examples) for split, examples in task.own.items()}
    return {**rows, "split": "hash of the texts" if task.by_hash else "files", "columns": list(task.columns)}


def _in_folder(folder: Path, asked: TaskConfig) -> dict[str, Table]:
    found = {}
    for split, choices in _SPLITS.items():
        for stems in choices:
            paths = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
            paths = [path for path in paths if os.path.lexists(path)]
            if len(paths) > 1:
                names = " and ".join(path.name for path in paths)
                raise DataError(f"{folder} has several files of its {split} split: {names}", fix="keep one of them")
            if paths:
                found[split] = read(paths[0], asked.text_column, asked.label_column)
                break
    if not found:
        if (folder / "config.json").exists():
            raise DataError(f"{folder} is a model directory, not a task", fix="name a file of texts and labels")
        others = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
        raise DataError(
            f"task folder {folder} must hold train and test as one of {', '.join(SUFFIXES)}, found neither",
            fix=f"name one file, which is split: --task {quoted(str(folder / others[0]))}" if others else "add them",
        )
    return found


def _of_tables(
    path: Path, found: dict[str, Table], asked: TaskConfig, labelled: bool, values: bool, beside: bool
) -> Task:
    """The task made of the tables of its splits. The key "" marks a table that is still to be split."""
    if not beside:
        label = [asked.label_column or LABEL] if labelled or asked.label_column is not None else []
        for name in (*asked.text_column, *label):
            _require_in_all(path, found.values(), name)
    columns = {split: text_columns(table, asked.text_column, not beside) for split, table in found.items()}
    if len(set(columns.values())) > 1:
        said = ", ".join(f"{found[split].path.name} has {' and '.join(names)}" for split, names in columns.items())
        alone = len({len(names) for names in columns.values()}) == 1
        rule = (
            "must name the columns of its texts alike" if alone else "must have single texts, or pairs, in both files"
        )
        raise DataError(f"{path} {rule}: {said}", fix="make them alike")
    problem, names, labels = "single_label", (), dict.fromkeys(found)
    if labelled or asked.label_column is not None:  # a name that is wrong is told even if labels are not needed
        cells = {split: _labels(table, columns[split], asked.label_column, beside) for split, table in found.items()}
    if labelled:
        problem, names, labels = _understood(path, found, cells, values)
    own = {}
    for split, table in found.items():
        texts = [texts_of(table, name) for name in columns[split]]
        examples = Examples(path.name, split, texts[0], texts[1] if len(texts) == 2 else None, labels[split])
        if split:
            own[split] = examples
        else:
            own = _by_hash(path, examples)
    _require_learnable(path, problem, names, own)
    last = [*found][-1]
    return Task(
        path.name, names, "train", "test", pair=own[next(iter(own))].texts_b is not None, max_length=None,
        problem=problem, folder=path.resolve(), own=own, labelled=labelled, by_hash="" in found,
        columns=(*columns[last], *([found[last].label] if labelled else [])), text_column=asked.text_column,
        label_column=asked.label_column,
    )  # fmt: skip


def _require_in_all(folder: Path, tables: Collection[Table], name: str) -> None:
    """DataError for a column that only some of a folder's files have: another name would not do for them all."""
    without = [table for table in tables if name not in table.columns]
    having = [table.path.name for table in tables if name in table.columns]
    if without and having:
        raise DataError(
            f"{folder} has a column {shown(name)} in {having[0]}, not in {without[0].path.name}, which has "
            f"{', '.join(map(shown, without[0].names[:20]))}",
            fix="name the columns alike in both files",
        )


def _by_hash(path: Path, examples: Examples) -> dict[str, Examples]:
    """Splits one file's examples in two by a hash of their `sameness`. So equal examples stay together, and a new row
    does not move any other.
    """
    keys = [hashlib.sha256("\0".join(key).encode()).digest() for key in sameness(examples)]
    test = np.array([int.from_bytes(key[:8]) < TEST_SHARE * 2**64 for key in keys])
    if test.all() or not test.any():
        raise DataError(
            f"{path} has too few different texts to be split into train and test, {len(set(keys))}",
            fix="add rows, or make a folder with train and test",
        )
    train, test = (examples.take(np.flatnonzero(part)) for part in (~test, test))
    return {"train": replace(train, split="train"), "test": replace(test, split="test")}


def _require_learnable(path: Path, problem: str, names: tuple[str, ...], own: dict[str, Examples]) -> None:
    """Raises DataError if a class is in the test split but not in the training split."""
    if not names or len(own) < 2:
        return
    # Single labels: their numbers. Several labels: the columns that have a 1.
    seen = {split: examples.labels if problem == "single_label" else np.nonzero(examples.labels)[1]
            for split, examples in own.items()}  # fmt: skip
    missing = sorted(set(seen["test"].tolist()) - set(seen["train"].tolist()))
    if missing:
        raise DataError(
            f"{path}: label {names[missing[0]]!r} is in the test split only, no model can learn it",
            fix="add training rows of it, or remove its rows",
        )


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(table: Table, texts: tuple[str, ...], named: str | None, beside: bool) -> list:
    """The values of the label column: the one that was named, else `label`."""
    name = table.label if named is None or beside else named
    if name in texts:
        raise DataError(f"{table.path} has its texts in the column {name!r}, not its labels", fix="name another column")
    return table.column(name, None if beside else LABEL_FLAG, named is not None)


def _understood(
    path: Path, found: dict[str, Table], labels: dict[str, list], values: bool
) -> tuple[str, tuple[str, ...], dict[str, np.ndarray]]:
    """(problem type, label names, labels by split) of the label columns, interpreted the same way in all splits."""
    cells = [(found[split], row, value) for split in found for row, value in enumerate(labels[split])]
    several = [isinstance(value, list) for _, _, value in cells]
    if any(several):
        if not all(several):
            _refuse(*cells[several.index(False)], "a list, as in other rows")
        problem, names, labels = _several(path, cells)
    else:
        problem, names, labels = _one(path, cells, values)
    ends = np.cumsum([0, *map(len, found.values())])
    parts = [labels[a:b] for a, b in itertools.pairwise(ends)]
    return problem, names, dict(zip(found, parts, strict=True))


def _one(path: Path, cells, values: bool) -> tuple[str, tuple[str, ...], np.ndarray]:
    """One label per text: integers, names, booleans, or numbers of a regression."""
    for cell in cells:
        if isinstance(cell[2], str) and (wanted := _meant(cell[2].strip())):
            _refuse(*cell, wanted)
    words = {value: _value(value) for value in {value for _, _, value in cells if isinstance(value, str)}}
    read_as = [words[value] if isinstance(value, str) else _value(value) for _, _, value in cells]
    kinds = Counter(type(value) for value in read_as)
    if type(None) in kinds:
        _refuse(*cells[[value is None for value in read_as].index(True)], "a class or a number")
    if bool in kinds and str in kinds:  # among names, the words true and false are names too
        read_as = [value.strip() if isinstance(value, str) else new
                   for (_, _, value), new in zip(cells, read_as, strict=True)]  # fmt: skip
        kinds = Counter(type(value) for value in read_as)
    if kinds.keys() <= {int, float}:
        if float in kinds or values:
            return "one_logit", (), np.array(read_as, dtype=np.float32)
        return "single_label", *_numbered(cells, read_as)
    if len(kinds) > 1:
        rare = min(kinds, key=kinds.get)
        usual = max(kinds, key=kinds.get)
        at = [type(value) for value in read_as].index(rare)
        what = {int: "a number", float: "a number", bool: "true or false", str: "a class name"}[usual]
        share = "most rows" if kinds[usual] > kinds[rare] else "other rows"
        _refuse(*cells[at], f"{what}, as in {share}")
    if bool in kinds:
        return "single_label", ("false", "true"), np.array(read_as, dtype=np.int64)
    names = sorted(set(read_as))
    if len(names) > MAX_CLASSES or (len(names) > 20 and len(names) > len(cells) / 2):
        raise DataError(
            f"{path}: its labels have {len(names)} different values in {len(cells)} rows, too many for classes",
            fix="name the column of the classes: --label-column COLUMN",
        )
    _require_different(path, names)
    at = {name: i for i, name in enumerate(names)}
    return "single_label", tuple(names), np.array([at[value] for value in read_as], dtype=np.int64)


def _require_different(path: Path, names: list[str]) -> None:
    """Raises DataError if two labels are different spellings of one name."""
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(fold(name), name)) != name:
            raise DataError(
                f"{path}: labels {other!r} and {name!r} are the same name",
                fix="write it alike in all rows, or rename one if they are two classes",
            )


def _meant(word: str) -> str:
    """What was expected in place of a word that cannot be a label; empty for a word that can."""
    if word[:1] + word[-1:] == "[]":
        return "one class or number (lists of labels: .jsonl or .parquet)"
    if re.fullmatch(r"[+-]?[0-9]+(,[0-9]+|(\.[0-9]+)?\s?%)", word):
        return "a number with a decimal point, or a class name"
    missing = word.lower() in _MISSING or word == _MISSING_IN_R
    return "a class or a number, not a missing value" if missing else ""


def _value(value):
    """The value of a label: int, float, bool or str; None if it is no label."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        # transformers calls class 3 LABEL_3 if a model does not name its classes.
        bare = text[6:] if text[:6].lower() == "label_" and text[6:].isdecimal() else text
        if not NUMBER.fullmatch(bare):
            return text or None
        value = float(bare)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) <= LARGEST_VALUE:  # false for NaN as well
        return int(value) if float(value).is_integer() else value
    return None


def _numbered(cells, ids: list[int]) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, labels) of classes that a file gives as numbers."""
    for cell, value in zip(cells, ids, strict=True):
        if not 0 <= value < MAX_CLASSES:
            _refuse(
                *cell, f"the id of a class, 0 to {MAX_CLASSES - 1}, or its name (a model of one logit takes any number)"
            )
    as_ids = any(isinstance(value, str) and "_" in value for _, _, value in cells)  # LABEL_1 is an id, whatever else is
    classes = _classes(set(ids), as_ids)
    at = {value: i for i, value in enumerate(classes)}
    return tuple(classes.values()), np.array([at[value] for value in ids], dtype=np.int64)


def _classes(ids: set[int], as_ids: bool = False) -> dict[int, str]:
    """The names of classes that a file gives as numbers, in the order of the labels. Numbers from 0 on are a model's
    own ids, LABEL_0 to the largest. Without a 0 they may count from 1, so each is a name of its own, which only a model
    with this name matches; as_ids: unless the file says that they are ids.
    """
    if 0 in ids or as_ids:
        return {i: f"LABEL_{i}" for i in range(max(ids) + 1)}
    return {i: str(i) for i in sorted(ids)}


def _several(path: Path, cells) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Several labels per text: lists of names, lists of ids, or a 0 or 1 per label, which may be floats or booleans."""
    as_ids = any(isinstance(part, str) and "_" in part for _, _, value in cells for part in value)
    cells = [(table, row, _numbers(value)) for table, row, value in cells]
    for cell in cells:
        if not all(isinstance(part, str | int | float) for part in cell[2]):
            _refuse(*cell, "a list of names or of ids")
    kinds: set[type] = set()
    width = Counter(len(value) for _, _, value in cells).most_common(1)[0][0]
    flags = [len(value) == width > 1 and all(part in (0, 1) for part in value) for _, _, value in cells]
    if all(flags):
        rows = np.array([value for _, _, value in cells], dtype=np.float32)
        return "multi_label", tuple(f"LABEL_{i}" for i in range(width)), rows
    # An id occurs once per row, and is neither true nor 1.0; other lists are meant to have a 0 or 1 per label.
    if any(len(set(value)) < len(value) or {bool, float} & set(map(type, value)) for _, _, value in cells):
        _refuse(
            *cells[flags.index(False)], f"a 0 or 1 for each of {width} labels, as in most rows, or each id or name once"
        )
    for cell in cells:
        kinds |= {type(part) for part in cell[2]}
        if kinds - {int} and (kinds - {str} or not all(part.strip() for part in cell[2])):
            _refuse(*cell, "a list of names or of ids, as in the rows before it")
    seen = {part for _, _, value in cells for part in value}
    if not seen:
        raise DataError(f"{path}: no row has a label, all lists are empty", fix="add labels")
    if kinds == {int}:
        bad = next((cell for cell in cells if any(not 0 <= part < MAX_CLASSES for part in cell[2])), None)
        if bad is not None:
            _refuse(*bad, f"classes from 0 to {MAX_CLASSES - 1}")
        classes = _classes(seen, as_ids)
    else:
        classes = {part: part for part in sorted(seen)}
    at = {part: i for i, part in enumerate(classes)}
    names = list(classes.values())
    _require_different(path, names)
    rows = np.zeros((len(cells), len(at)), dtype=np.float32)
    for row, (_, _, value) in enumerate(cells):
        rows[row, [at[part] for part in value]] = 1
    return "multi_label", tuple(names), rows


def _numbers(parts: list) -> list:
    """The list as integers if all its parts are strings of digits or, as transformers writes ids, LABEL_3; else
    unchanged.
    """
    if parts and all(isinstance(part, str) and re.fullmatch("(?:label_)?[0-9]+", part.strip(), re.I) for part in parts):
        return [int(part.rpartition("_")[2]) for part in parts]
    return parts


def _refuse(table: Table, row: int, value, wanted: str):
    raise DataError(f"{table.where(row)}: {table.label} must be {wanted}, got {shown(value)}", fix="correct the label")
