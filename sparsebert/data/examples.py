"""Labelled texts of a task, and where they come from: local files first, then the `datasets` library."""

from __future__ import annotations

import functools
import hashlib
import lzma
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from sparsebert import environment, heads
from sparsebert.data import tables
from sparsebert.data.tasks import NLI, TASKS, Task
from sparsebert.errors import DataError, InputError, first_line, shown


@dataclass(frozen=True)
class Examples:
    """Texts in file order.

    texts_b: None for a task of single texts.
    labels: int64 [n]; for several labels per text float32 [n, labels] of 0 and 1; for one logit float32 [n]; None if no
        labels were requested.
    groups: the kind of each example, for a task that has kinds.
    left_out: how many examples were removed because figures are reported on them (`training`), or because they are in
        other sets (`apart`).
    """

    task: str
    split: str
    texts: list[str]
    texts_b: list[str] | None
    labels: np.ndarray | None
    groups: list[str] | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Content hash over texts and labels: the data part of every key."""
        digest = hashlib.sha256()
        for column in (self.texts, self.texts_b or []):
            for text in column:
                digest.update(text.encode() + b"\0")
            digest.update(b"\1")
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def take(self, rows) -> Examples:
        """The examples at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        texts_b, groups = (
            None if column is None else [column[i] for i in rows] for column in (self.texts_b, self.groups)
        )
        labels = None if self.labels is None else self.labels[rows]
        texts = [self.texts[i] for i in rows]
        return replace(self, texts=texts, texts_b=texts_b, labels=labels, groups=groups)

    def sample(self, n: int | None, seed: int) -> Examples:
        """A seeded random subset of n examples, in the present order; all of them if n is None or at least their
        number.
        """
        if n is None or n >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))


def load(task: Task, split: str, *, limit: int | None = None, seed: int = 0) -> Examples:
    """All examples of a split, or a seeded random subset of `limit` of them, in file order.

    Looks in the task's own examples, else in SPARSEBERT_DATA/<task>/<split>.parquet, else in the packaged files, else
    in `datasets`. Raises DataError for a missing or unreadable file, text that is empty or not UTF-8, and labels
    outside the task's.
    """
    if limit is not None and limit < 1:
        raise InputError(f"n must be at least 1, got {limit}", fix="ask for at least one example")
    if task.own is not None:
        examples = _own(task, split)
    else:
        path = _find(task, split)
        also = (task.groups,) if task.groups else ()
        examples = _check(task, split, tables.read(path, also) if path else _read_hub(task, split))
    return examples.sample(limit, seed)


def _own(task: Task, split: str) -> Examples:
    if split not in task.own:
        raise DataError(
            f"task {task.folder} has no {split} file",
            fix=f"add {split}.csv, .tsv, .jsonl or .parquet, or name one file as the task, which is then split",
        )
    return task.own[split]


def training(task: Task) -> Examples:
    """The training split without the examples that figures are reported on: those of the test split and of the
    out-of-distribution tests that are available here, compared by `sameness`. Everything that learns, calibrates or
    chooses on a task uses these examples. DataError if none is left; otherwise raises as `load` does.
    """
    left = _without(load(task, task.train), _reported(task))
    if not len(left):
        raise DataError(
            f"task {task.name!r}: every training example is also in its {task.test} split, none is left to learn from",
            fix="give other training examples",
        )
    return left


def unreported_texts(task: Task, texts: Sequence[str]) -> list[str]:
    """Single texts from another source, without those that the task reports on, alone or as one side of a pair."""
    reported = {text for key in _reported(task) for text in key} if texts else set()
    return [text for text in texts if normalised(text) not in reported]


def at_hand(task: Task, split: str) -> bool:
    """Whether a split is available without `datasets`: from the user's files, local files or the package."""
    return split in task.own if task.own is not None else _find(task, split) is not None


def apart(examples: Examples, *others: Examples) -> Examples:
    """The examples that are not the same as any of `others` (`sameness`); left_out counts those that are."""
    return _without(examples, {key for other in others for key in sameness(other)})


def sameness(examples: Examples) -> list[tuple[str, ...]]:
    """One key per example; two examples are the same if their keys are equal. The key is the normalised text, or both
    texts of a pair, sorted.
    """
    texts = map(normalised, examples.texts)
    if examples.texts_b is None:
        return [(text,) for text in texts]
    return [tuple(sorted(pair)) for pair in zip(texts, map(normalised, examples.texts_b), strict=True)]


def same_groups(examples: Examples) -> np.ndarray:
    """int64 [examples], numbers from 0 on: two examples have the same number if they are the same (`sameness`)."""
    numbers: dict[tuple[str, ...], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in sameness(examples)], dtype=np.int64)


def hold_out(examples: Examples, n: int) -> tuple[Examples, Examples]:
    """(the rest, `n` examples held out for choices), both in file order. The n examples are the same for every seed.
    The rest has no example that is the same as one of them (`sameness`). InputError if nothing would be left.
    """
    if n >= len(examples):
        raise InputError(f"hold_out must be below the {len(examples)} training examples, got {n}", fix="hold out fewer")
    order = np.random.default_rng(0x5EED).permutation(len(examples))
    held = examples.take(np.sort(order[:n]))
    rest = examples.take(np.sort(order[n:]))
    if n:
        kept = set(sameness(held))
        rest = rest.take([row for row, key in enumerate(sameness(rest)) if key not in kept])
    if not len(rest):
        raise InputError(
            f"hold_out must leave examples: all of the {len(examples)} are the same as one of the {n} held out",
            fix="hold out fewer",
        )
    return rest, held


def mix_ood(task: Task, examples: Examples) -> Examples:
    """The examples, followed by those of `task.ood_train` that are not reported on. In a three-way task, not_entailment
    becomes contradiction. [Liu et al. 2022, App. C.3]
    """
    if not task.ood_train:
        raise InputError(f"task {task.name!r} has no out-of-distribution training examples", fix="leave --mix-ood out")
    texts, texts_b, labels = list(examples.texts), list(examples.texts_b), [examples.labels]
    reported, left_out = _reported(task), examples.left_out
    for name, split, times in task.ood_train:
        other = _without(load(TASKS[name], split), reported)
        left_out += other.left_out
        texts += other.texts * times
        texts_b += other.texts_b * times
        labels += [_in_labels_of(task, TASKS[name])[other.labels]] * times
    return Examples(examples.task, examples.split, texts, texts_b, np.concatenate(labels), left_out=left_out)


def among(task: Task, examples: Examples, names: Sequence[str]) -> tuple[Task, Examples]:
    """The task and examples, renumbered for a model with the labels `names`. The user's own file may have only some of
    these labels. For a file with other labels, nothing changes.
    """
    if task.own is None or task.problem == "one_logit" or len(task.labels) >= len(names):
        return task, examples
    if heads.are_anonymous(task.labels):
        labels, at = tuple(f"LABEL_{i}" for i in range(len(names))), list(range(len(task.labels)))
    else:
        folded = [heads.fold(name) for name in names]
        if not {heads.fold(name) for name in task.labels} <= set(folded):
            return task, examples
        labels, at = tuple(names), [folded.index(heads.fold(name)) for name in task.labels]
    if task.problem == "single_label":
        found = np.array(at)[examples.labels]
    else:
        found = np.zeros((len(examples), len(names)), np.float32)
        found[:, at] = examples.labels
    return replace(task, labels=labels), replace(examples, labels=found)


def _in_labels_of(task: Task, other: Task) -> np.ndarray:
    """The label of `task` for each label of `other`; in a three-way task, not_entailment becomes contradiction."""
    by_name = {heads.fold(name): i for i, name in enumerate(task.labels)}
    if set(task.labels) == set(NLI):
        by_name[heads.fold("not_entailment")] = by_name[heads.fold("contradiction")]
    return np.array([by_name[heads.fold(name)] for name in other.labels])


@functools.cache
def word_neighbors() -> dict[str, list[str]]:
    """Lower-case word -> up to 8 words of similar meaning, nearest first (counter-fitted vectors; packaged)."""
    packed = resources.files("sparsebert") / "assets" / "attack" / "counterfitted_neighbors.txt.xz"
    return word_table(packed.read_bytes())


def word_table(packed: bytes) -> dict[str, list[str]]:
    """Word -> words, of a packaged table: lines of words, separated by one space, compressed by xz."""
    lines = lzma.decompress(packed).decode().split("\n")
    return {word: others for word, *others in (line.split(" ") for line in lines)}


UNSEEN = 500  # packaged general texts that nothing calibrates on


@functools.cache
def general_texts(*, unseen: bool = False) -> tuple[str, ...]:
    """The packaged general texts: sentences of a dictionary, in an arbitrary order. unseen: True for the last UNSEEN of
    them, which nothing calibrates on, so that reports can measure on them; False for the others.
    """
    packed = resources.files("sparsebert") / "assets" / "general" / "texts.txt.xz"
    texts = tuple(lzma.decompress(packed.read_bytes()).decode().splitlines())
    return texts[-UNSEEN:] if unseen else texts[:-UNSEEN]


def in_pairs(texts: Sequence[str], paired: bool) -> tuple[list[str], list[str] | None]:
    """Single texts as (texts, texts_b) of a task. If `paired`, the first half is paired with the second half, and an
    odd text is dropped; otherwise texts_b is None.
    """
    if not paired:
        return list(texts), None
    half = len(texts) // 2
    return list(texts[:half]), list(texts[half : 2 * half])


def normalised(text: str) -> str:
    """The text without case, spacing and punctuation, in Unicode form NFKC. Two texts are the same if this is equal,
    such as "It's good ." and "it 's good". A text of nothing but spacing and punctuation is only case-folded and
    stripped.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_DROPPED) or folded.strip()


class _Dropped(dict):
    """For str.translate: maps the characters that `normalised` drops to None. Filled as characters occur."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category[0] in "PZ" or category in ("Cc", "Cf", "Sk") else code
        return self[code]


_DROPPED = _Dropped()


def _reported(task: Task) -> set[tuple[str, ...]]:
    tests = [task, *(TASKS[name] for name in task.ood)]
    unlabelled = [replace(of, labelled=False) for of in tests if _at_hand(task, of)]
    return {key for of in unlabelled for key in sameness(load(of, of.test))}


def _at_hand(task: Task, of: Task) -> bool:
    """Whether the test split of `of` is available: from the user's files or local files. The hub counts only for the
    task itself, if its training split is not local.
    """
    if at_hand(of, of.test):
        return True
    return of is task and not at_hand(task, task.train) and of.hub is not None and of.test in of.hub.splits


def _without(examples: Examples, reported: set[tuple[str, ...]]) -> Examples:
    kept = [row for row, key in enumerate(sameness(examples)) if key not in reported]
    return replace(examples.take(kept), left_out=examples.left_out + len(examples) - len(kept))


def _find(task: Task, split: str) -> Path | None:
    root = environment.data_dir()
    candidates = [root / task.name / f"{split}.parquet"] if root else []
    candidates.append(Path(str(resources.files("sparsebert"))) / "assets" / task.name / f"{split}.parquet")
    return next((path for path in candidates if path.is_file()), None)


def _read_hub(task: Task, split: str) -> tables.Table:
    root = environment.data_dir()
    where = (
        f"task {task.name!r}: {root / task.name / split}.parquet is absent"
        if root
        else f"task {task.name!r}: no local file"
    )
    mend = f"set SPARSEBERT_DATA to a folder with {task.name}/{split}.parquet"
    if task.hub is None or split not in task.hub.splits:
        raise DataError(f"{where}, and `datasets` has no such split", fix=mend)
    try:
        import datasets
    except ImportError as error:
        raise DataError(where, fix=f"{mend}, or pip install 'sparsebert[hub]'") from error
    try:
        table = datasets.load_dataset(task.hub.path, task.hub.name, split=task.hub.splits[split])
    except (OSError, ValueError, RuntimeError) as error:  # no network, offline mode, or a data set that moved
        raise DataError(f"{where}, and datasets said: {first_line(error)}", fix=mend) from error
    labels = list(table["label"])
    keep = [i for i, label in enumerate(labels) if label >= 0]  # SNLI marks pairs without a gold label by -1
    columns = {"label": [labels[i] for i in keep]}
    for ours, theirs in zip(("text", "text_b"), task.hub.columns, strict=False):
        column = list(table[theirs])
        columns[ours] = [column[i] for i in keep]
    return tables.Table(Path(f"datasets:{task.hub.path}"), columns, [f"row {i + 1}" for i in keep], tuple(columns))


def _check(task: Task, split: str, table: tables.Table) -> Examples:
    """The examples of a table, after a check that its columns and labels are the task's."""
    texts = [tables.texts_of(table, name) for name in (("text", "text_b") if task.pair else ("text",))]
    groups = tables.texts_of(table, task.groups) if task.groups else None
    labels = None
    if task.labelled:
        by_name = {heads.fold(name): i for i, name in enumerate(task.labels)}
        labels = [by_name.get(heads.fold(x), x) if isinstance(x, str) else x for x in table.column("label")]
        for row, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < len(task.labels):
                raise DataError(
                    f"{table.where(row)}: label must be 0 to {len(task.labels) - 1}, got {shown(label)}",
                    fix="correct the label",
                )
        labels = np.asarray(labels, dtype=np.int64)
    return Examples(task.name, split, texts[0], texts[1] if task.pair else None, labels, groups)
