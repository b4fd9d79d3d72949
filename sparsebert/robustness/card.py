"""The trade-off card: what models can do, under attack and elsewhere too, beside what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sparsebert import checkpoint
from sparsebert.engine.rivals import OURS
from sparsebert.errors import InputError, first_line, shown

POINT = 0.01  # how far below the dense model's accuracy under attack a model may be for the star of the card
WORDS = {"micro_f1": "micro F1", "spearman": "rank correlation"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def facts(directory: str | Path) -> dict:
    """What a model directory holds: directory, weights_sha256, content_sha256, method and pattern (None unless this
    package pruned it), dtype (int8 or that of the file), sparsity (share of zeros in the layers' linears), parameters,
    non_zeros, and bytes: what the tensors take without their zeros, each as non-zeros in its dtype and one bit per
    weight that says where they are, or whole if that is less.
    """
    files = checkpoint.read(directory)
    tensors = files.tensors
    made = files.config.get("sparsebert") or {}
    total = zeros = weights = size = 0
    for name, tensor in tensors.items():
        count, nnz, width = math.prod(tensor["shape"]), tensor["nnz"], _BYTES[tensor["dtype"]]
        if ".layer." in name and name.endswith(".weight") and len(tensor["shape"]) == 2:
            zeros, weights = zeros + count - nnz, weights + count
            width = 1 if files.scales is not None else width
        total += count
        size += min(count * width, nnz * width + -(-count // 8))
    return {
        "directory": str(directory), "weights_sha256": files.weights_sha256, "content_sha256": files.content_sha256,
        "method": made.get("method"), "pattern": made.get("pattern"),
        "dtype": "int8" if files.scales is not None else max(t["dtype"].lower() for t in tensors.values()),
        "sparsity": zeros / weights if weights else None, "parameters": total,
        "non_zeros": sum(tensor["nnz"] for tensor in tensors.values()), "bytes": size,
    }  # fmt: skip


class Measured(NamedTuple):
    """A figure with its 95 % interval, None if it has none. difference: from the dense model's, paired, with its own
    interval; None of the dense model itself and without one.
    """

    value: float
    interval: tuple[float, float] | None
    difference: tuple[float, float, float] | None = None


@dataclass
class Column:
    """A model of a card. figures: line of the card -> figure; near: likewise, how near it is to the dense model."""

    name: str
    facts: dict
    dense: bool
    figures: dict[str, Measured] = field(default_factory=dict)
    near: dict[str, str] = field(default_factory=dict)
    attacks: set[str] = field(default_factory=set)
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Card:
    """Columns: the dense model first, if there is one, then by sparsity. lines: of the figures. metric: the main
    figure. cheapest: the column that costs least of those within a point of the dense model, also under every
    attack; None if there is none, or nothing to compare. cost: how it costs least, "fastest" if all were timed, else
    "smallest".
    """

    task: str
    split: str
    n: int
    metric: str
    columns: list[Column]
    lines: list[str]
    documents: list[dict]
    cheapest: Column | None
    cost: str

    @property
    def attacks(self) -> set[str]:
        """The lines that are accuracies under attack."""
        return {line for column in self.columns for line in column.attacks}

    @property
    def timings(self) -> list[str]:
        """What was timed, in the order of the timings."""
        return list(dict.fromkeys(what for column in self.columns for what in column.milliseconds))


def read_documents(files: Sequence[Path], what: str) -> list[dict]:
    """The JSON document in each file, or on its last line. InputError, with what it must hold, for anything else."""
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8").strip()
            try:
                document = json.loads(text)
            except ValueError:
                document = json.loads(text.rpartition("\n")[2])
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} must hold {what}: {first_line(error)}", fix=f"make it: {what} > FILE") from error
        if not isinstance(document, dict):
            raise InputError(f"{path} must hold {what}, holds no object", fix=f"make it: {what} > FILE")
        found.append(document)
    return found


def card(documents: Sequence[dict], timings: Sequence[dict] = ()) -> Card:
    """The card of evaluations (Evaluation.as_json) of one task. timings: documents of `sparsebert bench`, of these
    models.

    Raises InputError unless the evaluations are of the same examples, dense model and variants of attacks, each of
    another model, and each timing of one of them.
    """
    with refusing_others():
        return _card(list(documents), list(timings))


@contextmanager
def refusing_others() -> Iterator[None]:
    """Raises InputError for a document that lacks what the block reads, or holds something else there."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            "evaluations must be what `sparsebert eval --json` prints, timings what `sparsebert bench --json` does: "
            f"{type(error).__name__} {first_line(error)}",
            fix="make them anew with this version",
        ) from error


def _card(documents: list[dict], timings: list[dict]) -> Card:
    first, known = documents[0], {}
    for document in documents:
        _require_same(known, document)
    beside = [document for document in documents if document["about"]["dense"] is not None]
    columns = [] if not beside else [_column(beside[0]["about"]["dense"], beside, dense=True)]
    for document in sorted(documents, key=lambda each: each["about"]["model"]["sparsity"] or 0.0):
        facts = document["about"]["model"]
        if any(facts["content_sha256"] == column.facts["content_sha256"] for column in columns):
            raise InputError(f"models must differ, {facts['directory']} is there twice", fix="leave it out once")
        columns.append(_column(facts, [document], dense=False))
    _name_apart(columns)
    for timing in timings:
        _add_timing(columns, timing)
    lines = list(dict.fromkeys(line for column in columns for line in column.figures))
    return Card(
        first["task"],
        first["split"],
        first["n"],
        first["metric"],
        columns,
        lines,
        documents,
        *_cheapest(columns, WORDS.get(first["metric"], first["metric"])),
    )


def _require_same(known: dict, document: dict) -> None:
    """known: the facts of the evaluations before this one, to which its own are added."""
    for name, value in _facts_of(document).items():
        if known.setdefault(name, value) != value:
            raise InputError(
                f"evaluations on one card must have the same {name}, got {shown(known[name])} and {shown(value)}",
                fix="evaluate the models by the same command",
            )


def _facts_of(document: dict) -> dict:
    """What must be the same in two evaluations on one card, wherever both have it."""
    about = document["about"]
    if about is None:
        raise InputError("evaluations must say what they are of, one does not", fix="run sparsebert eval again")
    facts = {name: document[name] for name in ("task", "split", "n")} | {"examples": about["data"]}
    facts["max_length"] = document["max_length"]
    if about["dense"] is not None:
        facts["dense model"] = about["dense"]["content_sha256"]
    for name, found in (document["attacks"] or {}).items():
        facts[f"attack {name}"] = found["variant"]
        facts[f"confidence under {name}"] = "its own" if divisor(found) == 1.0 else "the dense model's"
    for kind in ("ood", "domains", "outside"):
        for name, found in (document[kind] or {}).items():
            facts[f"examples of {name}"], facts[f"max_length of {name}"] = found["data"], found["max_length"]
    return facts


def divisor(attack: dict) -> float:
    """What the logits were divided by under an attack; 1, unless the model was given the dense one's confidence."""
    return attack.get("temperature", 1.0)


def _column(facts: dict, documents: Sequence[dict], *, dense: bool) -> Column:
    """The column of a model. documents: of its own evaluation; for the dense model, of those it was compared in."""
    column = Column(Path(facts["directory"]).name or facts["directory"], facts, dense)
    for document in documents:
        sets = {WORDS.get(document["metric"], document["metric"]): ("score", document)}
        for name, found in (document["attacks"] or {}).items():
            line = f"under {name}" if divisor(found) == 1.0 else f"under {name}, confidence matched"
            sets[line] = ("aua", found)
            column.attacks.add(line)
        sets |= {f"{name}, out of distribution": ("accuracy", found) for name, found in (document["ood"] or {}).items()}
        sets |= {f"{name}, other domain": ("score", found) for name, found in (document["domains"] or {}).items()}
        for line, (name, found) in sets.items():
            if dense:
                name = "dense_aua" if name == "aua" else "dense_score"
            if found.get(name) is None:
                continue
            interval, moved = found.get(f"{name}_ci"), None
            if not dense and found.get("difference") is not None and found.get("difference_ci") is not None:
                moved = (float(found["difference"]), *map(float, found["difference_ci"]))
            interval = None if interval is None else (float(interval[0]), float(interval[1]))
            column.figures.setdefault(line, Measured(float(found[name]), interval, moved))
        texts = {document["task"]: document} | (document["domains"] or {}) | (document["outside"] or {})
        for where, found in texts.items():
            if not dense and found.get("agreement") is not None:
                kl = found.get("kl_to_dense", found.get("kl"))
                form = ".4f" if document["metric"] == "spearman" else ".1%"
                column.near[where] = f"{found['agreement']:{form}}, KL {kl:.4f}"
    return column


def _name_apart(columns: list[Column]) -> None:
    """Gives columns of one name their whole paths."""
    names = [column.name for column in columns]
    for column in columns:
        if names.count(column.name) > 1:
            column.name = column.facts["directory"]


def _add_timing(columns: list[Column], timing: dict) -> None:
    by_content = {column.facts["content_sha256"]: column for column in columns}
    matched = False
    for row in timing["rows"]:
        column = by_content.get(row.get("content_sha256"))
        if column is None or row["engine"].partition(",")[0] != OURS:
            continue
        matched = True
        texts = "1 text" if row["batch"] == 1 else f"{row['batch']} texts"
        length = "mixed lengths" if row["seq"] == "mix" else f"{row['seq']} tokens"
        what = f"{texts}, {length}, {row['threads']} threads, {timing['machine']['cpu']}"
        column.milliseconds[what] = float(row["p50_ms"])
    if not matched:
        raise InputError(
            "timings must be of models on the card, one is of none",
            fix="time the model that was evaluated: sparsebert bench DIR --vs DENSE --json",
        )


def _cheapest(columns: list[Column], main: str) -> tuple[Column | None, str]:
    lines = {line for column in columns for line in column.attacks}

    def holds(column: Column) -> bool:
        moved = [column.figures[line].difference for line in (main, *lines) if line in column.figures]
        return len(moved) == 1 + len(lines) and all(each is not None and each[0] >= -POINT for each in moved)

    within = [column for column in columns[1:] if lines and columns[0].dense and holds(column)]
    timed = next((what for what in columns[0].milliseconds if all(what in c.milliseconds for c in columns)), None)
    if timed is None:
        return min(within, key=lambda column: column.facts["bytes"], default=None), "smallest"
    return min(within, key=lambda column: column.milliseconds[timed], default=None), "fastest"


def table_of(card: Card) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the card, in words and units."""
    columns = card.columns
    zeros = [column.facts["sparsity"] for column in columns]
    rows = [["share of zeros", *("" if share is None else f"{share:.1%}" for share in zeros)]]
    for line in card.lines:
        rows.append([line, *(_told(column.figures.get(line), card.metric, line) for column in columns)])
    for where in dict.fromkeys(where for column in columns for where in column.near):
        what = "rank correlation with dense" if card.metric == "spearman" else "same label as dense"
        rows.append([f"{what}, {where}", *(column.near.get(where, "") for column in columns)])
    rows.append(["MB without zeros", *(f"{column.facts['bytes'] / 1e6:.1f}" for column in columns)])
    for what in card.timings:
        cells = (column.milliseconds.get(what) for column in columns)
        rows.append([f"ms per call: {what}", *("" if value is None else f"{value:.2f}" for value in cells)])
    return ["", *(heading(card, column) for column in columns)], rows


def heading(card: Card, column: Column) -> str:
    """The name of a column, and what is special about it."""
    return column.name + (" (dense)" if column.dense else "") + (" ★" if column is card.cheapest else "")


def verdict(card: Card) -> str:
    """What the star of the table means, or why there is none."""
    if card.cheapest is not None:
        return (
            f"★ the {card.cost} model whose accuracy, also under every attack, is within 1 point of the dense model's "
            f"on these {card.n:,} examples."
        )
    if card.attacks and card.columns[0].dense:
        return "No model is within 1 point of the dense model both as it is and under every attack."
    return ""


def _told(measured: Measured | None, metric: str, line: str) -> str:
    if measured is None:
        return ""
    ranks = metric == "spearman" and "out of distribution" not in line
    scale, form = (1, ".4f") if ranks else (100, ".1f")
    unit = "" if ranks else " %"
    said = f"{scale * measured.value:{form}}{unit}"
    if measured.interval is not None:
        said += f" [{scale * measured.interval[0]:{form}}, {scale * measured.interval[1]:{form}}]"
    if measured.difference is not None:
        moved, low, high = (scale * value for value in measured.difference)
        said += f"; {moved:+{form}} [{low:+{form}}, {high:+{form}}]"
    return said
