"""Attacks on a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsebert import data, jobs
from sparsebert.config import AttackConfig, TaskConfig
from sparsebert.encoders import Progress, no_progress, task_for
from sparsebert.errors import OutputError
from sparsebert.robustness.attacks.plan import Victim, plans, require_used
from sparsebert.robustness.attacks.recipes import named
from sparsebert.robustness.attacks.run import figures, run

_KEY = b"sparsebert.attack"  # in the file's metadata


@dataclass(frozen=True)
class Attacked:
    """figures: of `run.figures`. rows: of `run.run`, one per example. rows_read: rows of the user's own files. key: of
    the victim, the attack and the examples.
    """

    figures: dict
    rows: list[dict]
    rows_read: dict | None
    key: str


def attack(
    model: str | Path,
    task: str | TaskConfig,
    name: str,
    config: AttackConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> Attacked:
    """Attacks the classifier in directory `model` on the reported split of `task`, or on a seeded random subset.

    name: an attack of RECIPES. Raises InputError for an unknown attack, DataError for texts or resources that are
    missing, and UnsupportedError for a model with other outputs than one label per text; all before any example is
    attacked.
    """
    config = config or AttackConfig()
    recipes = named([name])
    require_used(config, recipes)
    spec = task_for(task, model)
    examples = data.load(spec, spec.test, limit=config.n, seed=config.seed)
    victim, examples = Victim.load(model, config.device, spec, examples, config.max_length)
    (plan,) = plans(recipes, config, spec)
    rows = run(victim, plan, examples, progress)
    key = jobs.digest([victim.facts, plan.facts, examples.sha256])
    return Attacked(figures(plan.variant, rows), rows, data.rows_read(spec), key)


def require_output(path: Path, *, overwrite: bool = False) -> None:
    """Raises OutputError unless a parquet file can be written at `path`; before any work. A file there must hold rows
    of an attack, unless `overwrite` is set.
    """
    if path.suffix != ".parquet":
        raise OutputError(f"{path} must end in .parquet", fix="choose another -o")
    jobs.require_place(jobs.place(path).parent)
    if path.exists() and not overwrite and _key_of(path) is None:
        raise _taken(path)


def _key_of(path: Path) -> bytes | None:
    """The key of the attack whose rows a file holds; None for any other file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return (pyarrow.parquet.read_schema(path).metadata or {}).get(_KEY)
    except (OSError, pyarrow.ArrowException):
        return None


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path} exists and holds something else", fix="choose another -o, or give --overwrite")


def write_rows(path: Path, found: Attacked, *, overwrite: bool = False) -> None:
    """Writes the rows as a parquet file, whole or not at all. It takes the place of a file that holds rows of the same
    attack on the same examples. OutputError for any other file, unless `overwrite` is set.
    """
    import pyarrow
    import pyarrow.parquet

    key = found.key.encode()
    if path.exists() and not overwrite and _key_of(path) != key:
        raise _taken(path)
    kinds = {"id": "int64", "queries": "int64", "words_changed": "double", "score": "double", "seconds": "double"}
    columns = [(name, kinds.get(name, "string")) for name in found.rows[0]]
    table = pyarrow.Table.from_pylist(found.rows, pyarrow.schema(columns))
    with jobs.writing(path) as fresh:
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({_KEY: key, b"variant": found.figures["variant"]}), fresh
        )
