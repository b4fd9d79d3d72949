"""The tasks the package knows, and how their examples are read: local files first, then the `datasets` library.

`TASKS` is the one table: label names, single sentence or pair, metric, splits. A task may also be a folder of the
user's own, with `train` and `test` as .parquet, .csv, .tsv or .jsonl and the columns `text`[, `text_b`], `label`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from sparsebert import environment
from sparsebert.errors import DataError, InputError, first_line

SENTIMENT = ("negative", "positive")
NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
PARAPHRASE = ("different", "paraphrase")
FACT = ("SUPPORTS", "REFUTES")
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
MAX_CLASSES = 1000  # of a task folder: above it the column is no label


@dataclass(frozen=True)
class Hub:
    """Where `datasets` finds a task: path, configuration, text columns, and its name for each of our splits."""

    path: str
    name: str | None
    columns: tuple[str, ...]
    splits: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One classification task.

    labels: names, index = label. train, test: the split trained on (None where there is none) and the split reported
    on.
    metric: "accuracy", or "f1" where the field also reports F1 of class 1. three_way: a three-way NLI model may be
    evaluated here, its classes neutral and contradiction counting as class 1. max_length: tokens kept of a text,
    special ones included. ood: tasks that a model of this one is tested on out of distribution. ood_train: (task,
    split, times) of training examples for an upper bound there. bias: the bias model that debiased losses take by
    default (training.bias). groups: the column that names what kind of example each is, where figures are wanted by it.
    """

    name: str
    labels: tuple[str, ...]
    train: str | None
    test: str
    pair: bool = False
    metric: str = "accuracy"
    three_way: bool = False
    max_length: int = 128
    ood: tuple[str, ...] = ()
    ood_train: tuple[tuple[str, str, int], ...] = ()
    bias: str | None = None
    groups: str | None = None
    hub: Hub | None = None
    folder: Path | None = field(default=None, compare=False)


def _glue(name: str, columns: tuple[str, ...], test: str, hub_test: str = "validation") -> Hub:
    return Hub("nyu-mll/glue", name, columns, {"train": "train", test: hub_test})


# hans, paws_qqp, fever and fever_symm are on the hub as loading scripts or not at all; `datasets` reads neither.
# Overlaps to know: 702 of 2,000 mr/test sentences are in sst2/train; fever_symm v1 and v2 share rows; imdb train and
# test share 123 reviews. None of these pairs is an out-of-domain test of the other.
_TABLE = (
    Task("mr", SENTIMENT, "train", "test"),
    Task("sst2", SENTIMENT, "train", "dev", hub=_glue("sst2", ("sentence",), "dev")),
    Task("imdb", SENTIMENT, "train", "test", max_length=256,
         hub=Hub("stanfordnlp/imdb", None, ("text",), {"train": "train", "test": "test"})),
    Task("agnews", ("World", "Sports", "Business", "Sci/Tech"), "train", "test", max_length=256,
         hub=Hub("fancyzhx/ag_news", None, ("text",), {"train": "train", "test": "test"})),
    Task("mnli", NLI, "train", "dev_matched", pair=True, bias="overlap",
         ood=("hans",), ood_train=(("hans", "train", 1),),
         hub=_glue("mnli", ("premise", "hypothesis"), "dev_matched", "validation_matched")),
    Task("snli", NLI, "train", "dev", pair=True, bias="overlap",
         ood=("hans",), ood_train=(("hans", "train", 1),),
         hub=Hub("stanfordnlp/snli", None, ("premise", "hypothesis"), {"train": "train", "dev": "validation"})),
    Task("hans", ENTAILMENT, "train", "test", pair=True, three_way=True, groups="heuristic"),
    Task("rte", ENTAILMENT, "train", "dev", pair=True, three_way=True, bias="overlap",
         hub=_glue("rte", ("sentence1", "sentence2"), "dev")),
    Task("qnli", ENTAILMENT, "train", "dev", pair=True, hub=_glue("qnli", ("question", "sentence"), "dev")),
    # dev_heldout is cut from the official training rows; the official dev set is not it and has no name here.
    Task("qqp", PARAPHRASE, "train", "dev_heldout", pair=True, metric="f1", bias="overlap",
         ood=("paws_qqp", "paws_wiki"),
         ood_train=(("paws_wiki", "dev", 1),),  # the training splits of PAWS are not at hand
         hub=Hub("nyu-mll/glue", "qqp", ("question1", "question2"), {"train": "train"})),
    Task("mrpc", PARAPHRASE, "train", "dev", pair=True, metric="f1", bias="overlap",
         hub=_glue("mrpc", ("sentence1", "sentence2"), "dev")),
    Task("paws_qqp", PARAPHRASE, None, "dev_and_test", pair=True, metric="f1"),
    Task("paws_wiki", PARAPHRASE, "dev", "test", pair=True, metric="f1",
         hub=Hub("google-research-datasets/paws", "labeled_final", ("sentence1", "sentence2"),
                 {"dev": "validation", "test": "test"})),
    Task("fever", FACT, "train", "dev", pair=True, bias="claim", ood=("fever_symm_v1", "fever_symm_v2"),
         ood_train=(("fever_symm_v2", "dev", 10),)),
    Task("fever_symm_v1", FACT, None, "test", pair=True),
    Task("fever_symm_v2", FACT, "dev", "test", pair=True),
    Task("cola", ("unacceptable", "acceptable"), "train", "dev", hub=_glue("cola", ("sentence",), "dev")),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}


@dataclass(frozen=True)
class Examples:
    """Labelled texts in file order. texts_b is None for a single-sentence task; labels: int64 [n]. groups: what kind
    each is, for a task that has such.
    """

    task: str
    split: str
    texts: list[str]
    texts_b: list[str] | None
    labels: np.ndarray
    groups: list[str] | None = None

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
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def take(self, rows) -> Examples:
        """The examples at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        texts_b, groups = (
            None if column is None else [column[i] for i in rows] for column in (self.texts_b, self.groups)
        )
        return Examples(self.task, self.split, [self.texts[i] for i in rows], texts_b, self.labels[rows], groups)

    def sample(self, n: int | None, seed: int) -> Examples:
        """A seeded random subset of n examples in this order; all of them where n is None or not less."""
        if n is None or n >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))


def get_task(name: str) -> Task:
    """The task called `name`, or the folder `name` as a task of the user's own."""
    if name in TASKS:
        return TASKS[name]
    folder = Path(name)
    if folder.is_dir():
        return _folder_task(folder)
    raise InputError(f"task must be one of {', '.join(TASKS)}, or a folder, got {name!r}", fix="choose one of these")


def load(task: Task, split: str, *, limit: int | None = None, seed: int = 0) -> Examples:
    """All examples of a split, or a seeded random subset of `limit` of them, in file order.

    Looks in the task's own folder, else SPARSEBERT_DATA/<task>/<split>.parquet, else among the packaged files, else
    asks `datasets`. Raises DataError for a missing or unreadable file, text that is empty or not UTF-8, and labels
    outside the task's.
    """
    if limit is not None and limit < 1:
        raise InputError(f"n must be at least 1, got {limit}", fix="ask for at least one example")
    path = _find(task, split)
    columns = _read_file(path) if path else _read_hub(task, split)
    examples = _check(task, split, columns, str(path or f"datasets:{task.hub.path}"))
    return examples.sample(limit, seed)


def hold_out(examples: Examples, n: int) -> tuple[Examples, Examples]:
    """(the rest, `n` examples kept for choices): the same n for every seed, both in file order. InputError where
    nothing would be left.
    """
    if n >= len(examples):
        raise InputError(f"hold_out must be below the {len(examples)} training examples, got {n}", fix="hold out fewer")
    order = np.random.default_rng(0x5EED).permutation(len(examples))
    return examples.take(np.sort(order[n:])), examples.take(np.sort(order[:n]))


def mix_ood(task: Task, examples: Examples) -> Examples:
    """The examples and, behind them, those of `task.ood_train`; what is not entailed there contradicts in three-way
    tasks. [Liu et al. 2022, App. C.3]
    """
    if not task.ood_train:
        raise InputError(f"task {task.name!r} has no out-of-distribution training examples", fix="leave --mix-ood out")
    texts, texts_b, labels = list(examples.texts), list(examples.texts_b), [examples.labels]
    for name, split, times in task.ood_train:
        other = load(TASKS[name], split)
        texts += other.texts * times
        texts_b += other.texts_b * times
        last = len(task.labels) - 1  # of three, contradiction
        labels += [np.where(other.labels == 1, last, other.labels)] * times
    return Examples(examples.task, examples.split, texts, texts_b, np.concatenate(labels))


def require_texts(texts: list[str]) -> None:
    """InputError unless every text is a non-empty string that UTF-8 can hold."""
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"text {row} must be a non-empty string, got {text!r}", fix="remove or fill it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text {row} must be valid Unicode: {error}", fix="decode the file as UTF-8") from error


@functools.cache
def word_neighbors() -> dict[str, list[str]]:
    """Lower-case word -> up to 8 words of similar meaning, nearest first (counter-fitted vectors; packaged)."""
    packed = resources.files("sparsebert") / "assets" / "attack" / "counterfitted_neighbors.json.gz"
    return {word: near for word, near in json.loads(gzip.decompress(packed.read_bytes())).items() if near}


def _folder_task(folder: Path) -> Task:
    task = Task(folder.name, (), "train", "test", folder=folder.resolve())
    paths = [path for split in ("train", "test") if (path := _find(task, split))]
    if not paths:
        raise DataError(
            f"task folder {folder} must hold train and test as one of {', '.join(SUFFIXES)}, found neither",
            fix="add them",
        )
    classes: set[int] = set()
    for path in paths:
        columns = _read_file(path)
        _require_columns(columns, ("text", "label"), str(path))
        if not all(type(label) is int and 0 <= label < MAX_CLASSES for label in columns["label"]):
            raise DataError(f"{path}: label must be an integer from 0 to {MAX_CLASSES - 1}", fix="number the classes")
        classes |= set(columns["label"])
    if classes != set(range(max(2, len(classes)))):
        raise DataError(
            f"{folder}: labels must be 0, 1, … without gaps and at least two, found {sorted(classes)[:9]}",
            fix="renumber the classes, or add the missing ones",
        )
    names = tuple(f"LABEL_{i}" for i in range(len(classes)))
    return Task(folder.name, names, "train", "test", pair="text_b" in columns, folder=task.folder)


def _require_columns(columns: dict[str, list], wanted: tuple[str, ...], where: str) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise DataError(f"{where} must have columns {', '.join(wanted)}, lacks {', '.join(missing)}", fix="add them")
    if not columns["label"]:
        raise DataError(f"{where} must hold at least one example, is empty", fix="add examples")


def _find(task: Task, split: str) -> Path | None:
    if task.folder is not None:
        candidates = [task.folder / f"{split}{suffix}" for suffix in SUFFIXES]
    else:
        root = environment.data_dir()
        candidates = [root / task.name / f"{split}.parquet"] if root else []
        candidates.append(Path(str(resources.files("sparsebert"))) / "assets" / task.name / f"{split}.parquet")
    return next((path for path in candidates if path.is_file()), None)


def _read_file(path: Path) -> dict[str, list]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        elif path.suffix == ".jsonl":
            table = pyarrow.json.read_json(path)
        else:
            comma = "\t" if path.suffix == ".tsv" else ","
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter=comma, newlines_in_values=True),
                # Named as strings, or bytes that are not UTF-8 would be inferred to be binary.
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(("text", "text_b"), pyarrow.string()), strings_can_be_null=False
                ),
            )
        return table.to_pydict()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} must be readable {path.suffix[1:]} in UTF-8: {first_line(error)}", fix="repair or replace it"
        ) from error


def _read_hub(task: Task, split: str) -> dict[str, list]:
    if task.folder is not None:
        raise DataError(
            f"task folder {task.folder} has no {split} file", fix=f"add {split}.csv, or any of the other kinds"
        )
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
        raise DataError(where, fix=f"{mend}, or pip install datasets") from error
    try:
        table = datasets.load_dataset(task.hub.path, task.hub.name, split=task.hub.splits[split])
    except (OSError, ValueError, RuntimeError) as error:  # no network, offline mode, or a set that moved
        raise DataError(f"{where}, and datasets said: {first_line(error)}", fix=mend) from error
    labels = list(table["label"])
    keep = [i for i, label in enumerate(labels) if label >= 0]  # SNLI marks pairs without a gold label by -1
    columns = {"label": [labels[i] for i in keep]}
    for ours, theirs in zip(("text", "text_b"), task.hub.columns, strict=False):
        column = list(table[theirs])
        columns[ours] = [column[i] for i in keep]
    return columns


def _check(task: Task, split: str, columns: dict[str, list], where: str) -> Examples:
    texts = ("text", "text_b") if task.pair else ("text",)
    grouped = () if task.groups is None else (task.groups,)
    _require_columns(columns, (*texts, *grouped, "label"), where)
    for name in (*texts, *grouped):
        for row, text in enumerate(columns[name]):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"{where}, row {row}: {name} must be a non-empty string, got {text!r}", fix="remove or fill the row"
                )
    for row, label in enumerate(columns["label"]):
        if not isinstance(label, int) or not 0 <= label < len(task.labels):
            raise DataError(
                f"{where}, row {row}: label must be 0 to {len(task.labels) - 1}, got {label!r}", fix="correct the label"
            )
    texts_b = columns["text_b"] if task.pair else None
    groups = columns[task.groups] if task.groups else None
    return Examples(task.name, split, columns["text"], texts_b, np.asarray(columns["label"], dtype=np.int64), groups)
