"""Tasks of the user's own: a folder with `train` and `test`, or one file, which is split by a hash of its texts."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsebert.data.examples import Examples, sameness
from sparsebert.data.tables import SUFFIXES, Table, read, text_columns, texts_of
from sparsebert.data.tasks import TASKS, Task
from sparsebert.errors import DataError, InputError
from sparsebert.heads import fold

MAX_CLASSES = 1000  # above it the column is no label
TEST_SHARE = 0.2  # of one file
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "dev")}  # names of files, the first the usual


def get_task(name: str, max_length: int | None = None) -> Task:
    """The task called `name`, or the folder or file `name` as a task of the user's own. max_length: tokens kept of a
    text, in place of what the task needs.
    """
    task = TASKS[name] if name in TASKS else _of_users(name)
    return task if max_length is None else replace(task, max_length=max_length)


def _of_users(name: str) -> Task:
    path = Path(name)
    try:
        folder, there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # no path at all
        folder = there = False
    if folder:
        return _of_tables(path, _in_folder(path))
    if there or path.suffix in SUFFIXES:
        return _of_tables(path, {"": read(path)})
    raise InputError(
        f"task must be one of {', '.join(TASKS)}, a folder or a file, got {name[:200]!r}", fix="choose one of these"
    )


def rows_read(task: Task) -> dict | None:
    """Rows by split of a task of the user's own, and how they were split; None for a known one."""
    if task.own is None:
        return None
    rows = {split: len(examples) for split, examples in task.own.items()}
    return {**rows, "split": "hash of the texts" if task.by_hash else "files"}


def _in_folder(folder: Path) -> dict[str, Table]:
    found = {}
    for split, stems in _SPLITS.items():
        paths = [p for stem in stems for suffix in SUFFIXES if (p := folder / f"{stem}{suffix}").exists()]
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise DataError(f"{folder} has several files of its {split} split: {names}", fix="keep one of them")
        if paths:
            found[split] = read(paths[0])
    if not found:
        raise DataError(
            f"task folder {folder} must hold train and test as one of {', '.join(SUFFIXES)}, found neither",
            fix="add them",
        )
    return found


def _of_tables(path: Path, found: dict[str, Table]) -> Task:
    """The task that the tables of its splits are; "" for one that is still to be split."""
    columns = {split: text_columns(table) for split, table in found.items()}
    if len({len(names) for names in columns.values()}) > 1:
        said = ", ".join(f"{found[split].path.name} has {' and '.join(names)}" for split, names in columns.items())
        raise DataError(f"{path}: all splits must be of single texts, or all of pairs: {said}", fix="make them alike")
    labelled = {split: "label" in table.columns for split, table in found.items()}
    if any(labelled.values()) and not all(labelled.values()):
        without = next(split for split, has in labelled.items() if not has)
        found[without].column("label")
    problem, names, labels = "single_label", (), dict.fromkeys(found)
    if all(labelled.values()):
        problem, names, labels = _understood(path, found)
    own = {}
    for split, table in found.items():
        texts = [texts_of(table, name) for name in columns[split]]
        examples = Examples(path.name, split, texts[0], texts[1] if len(texts) == 2 else None, labels[split])
        if split:
            own[split] = examples
        else:
            own = _by_hash(path, examples)
    _require_learnable(path, problem, names, own)
    return Task(
        path.name, names, "train", "test", pair=own[next(iter(own))].texts_b is not None, max_length=None,
        problem=problem, folder=path.resolve(), own=own, labelled=all(labelled.values()), by_hash="" in found,
    )  # fmt: skip


def _by_hash(path: Path, examples: Examples) -> dict[str, Examples]:
    """One file's examples in two: by what makes them the same, so that equal ones stay together and a row that is added
    moves no other.
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
    """DataError for a class that is in the test split and not in the other."""
    if problem != "single_label" or not names or len(own) < 2:
        return
    missing = sorted(set(own["test"].labels.tolist()) - set(own["train"].labels.tolist()))
    if missing:
        raise DataError(
            f"{path}: label {names[missing[0]]!r} is in the test split only, no model can learn it",
            fix="add training rows of it, or remove its rows",
        )


# --- labels -----------------------------------------------------------------------------------------------------------


def _understood(path: Path, found: dict[str, Table]) -> tuple[str, tuple[str, ...], dict[str, np.ndarray]]:
    """(problem type, names of the labels, labels by split) of the label columns, read alike in all of them."""
    cells = [(table, row, value) for table in found.values() for row, value in enumerate(table.column("label"))]
    several = [isinstance(value, list | tuple) for _, _, value in cells]
    if any(several):
        if not all(several):
            _refuse(*cells[several.index(False)], "a list, as in other rows")
        problem, names, labels = _several(cells)
    else:
        problem, names, labels = _one(path, cells)
    ends = np.cumsum([0, *map(len, found.values())])
    parts = [labels[a:b] for a, b in itertools.pairwise(ends)]
    return problem, names, dict(zip(found, parts, strict=True))


def _one(path: Path, cells) -> tuple[str, tuple[str, ...], np.ndarray]:
    """One label per text: integers, names, booleans, or numbers of a regression."""
    read_as = [_value(value) for _, _, value in cells]
    kinds = Counter(type(value) for value in read_as)
    if type(None) in kinds:
        _refuse(*cells[[value is None for value in read_as].index(True)], "a class or a number")
    if kinds.keys() <= {int, float}:
        if float in kinds:
            return "one_logit", (), np.array(read_as, dtype=np.float32)
        return "single_label", _numbered(path, cells, read_as), np.array(read_as, dtype=np.int64)
    if len(kinds) > 1:
        rare = min(kinds, key=kinds.get)
        usual = max(kinds, key=kinds.get)
        at = [type(value) for value in read_as].index(rare)
        what = {int: "a number", float: "a number", bool: "true or false", str: "a class name"}[usual]
        _refuse(*cells[at], f"{what}, as in most rows")
    if bool in kinds:
        return "single_label", ("false", "true"), np.array(read_as, dtype=np.int64)
    names = sorted(set(read_as))
    if len(names) > MAX_CLASSES or (len(names) > 20 and len(names) > len(cells) / 2):
        raise DataError(
            f"{path}: column 'label' has {len(names)} different values in {len(cells)} rows, too many for classes",
            fix="name the column of the classes 'label'",
        )
    folded = Counter(map(fold, names))
    twice = [name for name in names if folded[fold(name)] > 1]
    if twice:
        raise DataError(f"{path}: labels {twice[0]!r} and {twice[1]!r} are one name", fix="write it alike in all rows")
    _require_two(path, names)
    return "single_label", tuple(names), np.array([names.index(value) for value in read_as], dtype=np.int64)


def _value(value):
    """A label as it is meant: int, float, bool, str, or None for none."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            value = float(text)
        except ValueError:
            return text or None
        if text.lstrip("+-")[:1].isalpha():  # "nan", "inf": names, if anything
            return text
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return int(value) if float(value).is_integer() else float(value)
    return None


def _numbered(path: Path, cells, values: list[int]) -> tuple[str, ...]:
    """Names LABEL_i for classes that a file numbers: they are the model's own ids."""
    for cell, value in zip(cells, values, strict=True):
        if not 0 <= value < MAX_CLASSES:
            _refuse(*cell, f"a class from 0 to {MAX_CLASSES - 1}")
    classes = sorted(set(values))
    if classes != list(range(len(classes))):
        raise DataError(
            f"{path}: labels must be 0, 1, … without gaps, found {', '.join(map(str, classes[:9]))}",
            fix="number the classes from 0, or write their names in place of numbers",
        )
    _require_two(path, classes)
    return tuple(f"LABEL_{i}" for i in classes)


def _require_two(path: Path, classes: list) -> None:
    if len(classes) < 2:
        raise DataError(f"{path}: labels must be of at least two classes, all are {classes[0]!r}", fix="add the others")


def _several(cells) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Several labels per text: lists of names, lists of ids, or rows of 0 and 1."""
    lengths = {len(value) for _, _, value in cells}
    flat = [part for _, _, value in cells for part in value]
    for cell in cells:
        if not all((isinstance(part, str) and part.strip()) or type(part) is int for part in cell[2]):
            _refuse(*cell, "a list of names, or of numbers")
    kinds = {type(part) for part in flat}
    if len(kinds) > 1 or not kinds:
        _refuse(*cells[0], "a list of names in all rows, or of numbers")
    if kinds == {int} and len(lengths) == 1 and set(flat) <= {0, 1} and lengths != {1}:
        rows = np.array([value for _, _, value in cells], dtype=np.float32)
        return "multi_label", tuple(f"LABEL_{i}" for i in range(rows.shape[1])), rows
    names = sorted(set(flat))
    if kinds == {int}:
        if names[0] < 0 or names[-1] >= MAX_CLASSES:
            bad = next(cell for cell in cells if any(not 0 <= part < MAX_CLASSES for part in cell[2]))
            _refuse(*bad, f"classes from 0 to {MAX_CLASSES - 1}")
        names = list(range(names[-1] + 1))
    rows = np.zeros((len(cells), len(names)), dtype=np.float32)
    at = {name: i for i, name in enumerate(names)}
    for row, (_, _, value) in enumerate(cells):
        rows[row, [at[part] for part in value]] = 1
    return "multi_label", tuple(n if isinstance(n, str) else f"LABEL_{n}" for n in names), rows


def _refuse(table: Table, row: int, value, wanted: str):
    raise DataError(f"{table.where(row)}: label must be {wanted}, got {str(value)[:60]!r}", fix="correct the label")
