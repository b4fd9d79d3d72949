"""Attacked examples that a ledger holds: as a table for SQL, and one of them attacked again."""

from __future__ import annotations

import math
from datetime import date, time
from decimal import Decimal
from pathlib import Path

import numpy as np

from sparsebert.config import AttackConfig
from sparsebert.data import Task
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError, shown
from sparsebert.jobs import Ledger
from sparsebert.robustness.attacks.plan import Victim, plans, traced
from sparsebert.robustness.attacks.recipes import named
from sparsebert.robustness.attacks.run import ID, KIND, default_ledger

LEAST = 4  # of them that `find` takes
_RENAMED = {"order": "outputs"}  # a word of SQL
_FLAGS = {
    "neighbours": "--neighbours",
    "encoder": "--sentence-encoder",
    "masked_lm": "--masked-lm",
    "stored": "--stored",
}
_SAME = ("outcome", "perturbed", "queries", "words_changed", "score", "capped")


def stored(ledger: str | Path | None = None) -> list[dict]:
    """The attacked examples of a ledger, by default the one in the cache, in the order in which they were finished: the
    fields of `Ledger.units`. InputError if there is none, OutputError if it cannot be read.
    """
    path = default_ledger() if ledger is None else Path(ledger)
    if not path.is_file():
        raise InputError(
            f"ledger {path} is not there", fix="attack a model first (sparsebert attack), or name one: --ledger FILE"
        )
    book = Ledger(path, read_only=True)
    try:
        return book.units(KIND)
    finally:
        book.close()


def query(sql: str, ledger: str | Path | None = None) -> tuple[list[str], list[list]]:
    """(names of the columns, rows) that a SELECT of DuckDB finds in the table `attacks` of a ledger: a row per attacked
    example. It has everything in the example's key, with `id`, the first ID digits of that, and everything that came
    out. Values are as JSON has them; what JSON lacks, such as NaN and dates, is text.

    Nothing is written, and no file but the ledger is read. InputError for anything but one SELECT, and for one that
    DuckDB refuses.
    """
    import duckdb

    units = stored(ledger)
    # Python's variables would else be tables, too.
    safe = {"enable_external_access": "false", "python_enable_replacements": "false", "lock_configuration": "true"}
    with duckdb.connect(":memory:", config=safe) as base:
        try:
            base.register("attacks", _table(units))
            statements = base.extract_statements(sql)
            kinds = [statement.type for statement in statements]
            if kinds != [duckdb.StatementType.SELECT]:
                said = ", ".join(kind.name for kind in kinds) or "nothing"
                raise InputError(
                    f"query must be one SELECT, got {said}", fix="for the columns: sparsebert query 'describe attacks'"
                )
            found = base.execute(statements[0])
            columns = [column[0] for column in found.description]
            return columns, [[_plain(value) for value in row] for row in found.fetchall()]
        except (duckdb.Error, UnicodeError) as error:
            raise InputError(
                f"query cannot be answered: {_problem(error)}",
                fix="correct it; for the columns: sparsebert query 'describe attacks'",
            ) from error


def _problem(error: Exception) -> str:
    """What DuckDB says is wrong, without its drawing of where."""
    return str(error).partition("\n\n")[0]


def find(prefix: str, ledger: str | Path | None = None) -> dict:
    """The attacked example whose key begins with `prefix`, as in `stored`. InputError unless there is exactly one."""
    wanted = prefix.strip().lower()
    if len(wanted) < LEAST or set(wanted) - set("0123456789abcdef"):
        raise InputError(
            f"ID must be at least {LEAST} hexadecimal digits, got {shown(prefix)}",
            fix="take one from: sparsebert query 'select id, text from attacks'",
        )
    found = [unit for unit in stored(ledger) if unit["key"].startswith(wanted)]
    if len(found) != 1:
        whose = "the ledger in the cache" if ledger is None else f"ledger {ledger}"
        fix = "give more digits" if found else (
            "name the ledger of the attack, --ledger FILE, or take an id from: sparsebert query 'select id, text from "
            "attacks'"
        )  # fmt: skip
        raise InputError(f"ID must name one attacked example of {whose}, {wanted} names {len(found):,}", fix=fix)
    return found[0]


def replay(
    unit: dict,
    model: str | Path,
    *,
    neighbours: str | None = None,
    sentence_encoder: str = "minilm",
    masked_lm: str | None = None,
    texts: str | None = None,
    device: str = "auto",
) -> dict:
    """Attacks a stored example (`find`) again. model: directory of the model that it was stored for. texts: `stored` of
    AttackConfig; the others are its fields.

    Returns label (its name), again (the row of `plan.attacked`), same (whether it is the stored one), differs (the
    fields that differ), elsewhere (what the model runs on that it did not run on then: {field: [then, now]}), and steps
    (of `plan.traced`). Raises InputError for a model or a resource of other content.
    """
    then = unit["inputs"]
    classifier = Classifier.load(model, device)
    order = then["order"]
    if max(order) >= len(classifier.names):
        raise InputError(f"{model} has {len(classifier.names)} labels, the stored one more", fix="name that model")
    labels = tuple(classifier.names[output] for output in order)
    pair = then["other"] is not None
    task = Task("stored", labels, None, "stored", pair=pair, max_length=then["max_length"])
    victim = Victim(classifier, task, np.array(order), then["temperature"])
    now = victim.facts
    if now["model"] != then["model"]:
        raise InputError(
            f"{model} is not the model that was attacked: its content hash is {now['model'][:ID]}, that one's was "
            f"{then['model'][:ID]}",
            fix="name the directory of that model",
        )
    config = AttackConfig(
        seed=then["seed"], field=then["field"] if pair else None, max_queries=then["max_queries"],
        max_seconds=then["max_seconds"], neighbours=neighbours, sentence_encoder=sentence_encoder, masked_lm=masked_lm,
        stored=texts,
    )  # fmt: skip
    (plan,) = plans(named(then["attack"]), config, task)
    for name, sha256 in then["resources"].items():
        if plan.facts["resources"].get(name) != sha256:
            raise InputError(
                f"{name.replace('_', ' ')} must be what the stored attack read, of sha256 {sha256[:ID] or 'none'}, "
                f"got {(plan.facts['resources'].get(name) or 'none')[:ID]}",
                fix=f"name it: {_FLAGS[name]}" if name in _FLAGS else "restore it",
            )
    row, steps = traced(victim, plan, (0, then["text"], then["other"], then["label"]))
    differs = [name for name in _SAME if row[name] != unit["result"][name]]
    elsewhere = {name: [then[name], now[name]] for name in ("engine", "dtype", "isa") if then[name] != now[name]}
    return {
        "label": labels[then["label"]], "again": row, "same": not differs, "differs": differs, "elsewhere": elsewhere,
        "steps": steps,
    }  # fmt: skip


def _table(units: list[dict]):
    """A pyarrow table of them, a row each. Its columns are there without rows, too."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    kinds = {
        "id": text, "attack": text, "outcome": text, "text": text, "perturbed": text, "other": text, "label": whole,
        "queries": whole, "words_changed": real, "score": real, "capped": text, "error": text, "seconds": real,
        "finished": text, "model": text, "engine": text, "dtype": text, "device": text, "isa": text, "core": text,
        "max_length": whole, "outputs": pa.list_(whole), "temperature": real, "resources": pa.map_(text, text),
        "stopwords": text, "seed": whole, "field": text, "max_queries": whole, "max_seconds": real, "code": text,
    }  # fmt: skip
    rows = []
    for unit in units:
        flat = unit["inputs"] | unit["result"] | {name: unit[name] for name in ("seconds", "finished", "code")}
        flat["resources"] = list(flat["resources"].items())
        rows.append({"id": unit["key"][:ID]} | {_RENAMED.get(name, name): value for name, value in flat.items()})
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in kinds} for row in rows], pa.schema(list(kinds.items()))
    )


def _plain(value):
    """A value of DuckDB as one of JSON."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, Decimal)):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return value.isoformat() if isinstance(value, (date, time)) else str(value)
