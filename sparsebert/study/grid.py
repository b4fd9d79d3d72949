"""A study's cells, read from one YAML file."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from sparsebert import data
from sparsebert.config import PruneConfig, Settings, TrainConfig, validated
from sparsebert.errors import InputError, first_line
from sparsebert.patterns import parse
from sparsebert.pruning import check
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.training.losses import LOSSES
from sparsebert.training.recipe import read_yaml


class Cell(Settings):
    """One trained and evaluated model.

    paradigm: "dense" only fine-tunes; "finetuned" prunes a fine-tuned model; "rewound" puts the zeros that were found
        into the pretrained weights and fine-tunes these; "pretrained" only trains a mask over the pretrained weights.
    dense_loss: loss of the fine-tuned model that the other paradigms start from.
    loss: loss of pruning (of the training, if there is no pruning).
    final_loss: loss of the fine-tuning after rewinding.
    start_at: share of the fine-tuning after which pruning begins, 1 for the finished model.
    gradual: None for a fixed sparsity; for soft movement, None means its own default.
    """

    task: str
    paradigm: Literal["dense", "finetuned", "rewound", "pretrained"] = "dense"
    method: str | None = None
    pattern: str = "unstructured"
    sparsity: float = Field(0.0, ge=0, lt=1)
    gradual: float | None = None
    init: Literal["hard", "soft"] | None = None
    dense_loss: str = "ce"
    loss: str = "ce"
    final_loss: str | None = None
    start_at: float = Field(1.0, gt=0, le=1)
    mix_ood: bool = False
    seed: int = Field(0, ge=0)

    @field_validator("method")
    @classmethod
    def _trains(cls, name: str | None) -> str | None:
        if name is not None and name not in TRAINED:
            raise ValueError(f"one of {', '.join(TRAINED)}")
        return name

    @property
    def setting(self) -> dict:
        """All fields except the seed: cells with the same setting are repetitions."""
        return self.model_dump(exclude={"seed"})

    @property
    def label(self) -> str:
        """The setting as a text for people."""
        if self.paradigm == "dense":
            return self.loss + (" + OOD examples" if self.mix_ood else "")
        parts = [self.method, self.loss]
        if self.gradual is not None:
            parts.append(f"gradual from {self.gradual:.0%}")
        if self.init is not None:
            parts.append(self.init)
        if self.pattern != "unstructured":
            parts.append(self.pattern)
        if self.paradigm == "finetuned":
            parts.append(f"of {self.dense_loss} model" + (f" at {self.start_at:.0%}" if self.start_at < 1 else ""))
        elif self.paradigm == "rewound":
            parts.append(f"rewound, then {self.final_loss}")
        else:
            parts.append("of pretrained")
        if self.mix_ood:
            parts.append("+ OOD examples")
        return ", ".join(parts)


class Comparison(Settings):
    """Two settings, compared by one of their figures and paired by seed. a, b: the fields that select each setting."""

    name: str
    figure: str
    a: dict
    b: dict


@dataclass(frozen=True)
class Grid:
    """The content of a grid file.

    given: the file, or the name of a packaged one.
    train, prune: task -> fields of TrainConfig and SubnetConfig; under the name of a loss or method, the fields that
        differ for it.
    cells: in the order in which they are run.
    least: rows, steps and seeds; a setting with fewer of any has its figures marked as smoke.
    """

    name: str
    given: str
    model: str
    ood: dict[str, list[str]]
    train: dict[str, dict]
    prune: dict[str, dict]
    cells: list[Cell]
    comparisons: list[Comparison]
    least: dict[str, int]

    def train_config(self, cell: Cell, loss: str, **changes) -> TrainConfig:
        """The settings for fine-tuning a dense model of this cell."""
        fields = {**chosen(self.train[cell.task], LOSSES, loss), "loss": loss, "seed": cell.seed, **changes}
        return config_of(TrainConfig, fields, f"train of {cell.task}")

    def prune_configs(self, cell: Cell) -> tuple[PruneConfig, SubnetConfig]:
        """The settings for pruning it."""
        first = config_of(
            PruneConfig,
            {"method": cell.method, "sparsity": cell.sparsity, "pattern": cell.pattern, "seed": cell.seed},
            cell.label,
        )
        method = TRAINED[cell.method]
        losses = [name for name in LOSSES if name != cell.method]  # rmc is both
        settings = chosen(chosen(self.prune[cell.task], losses, cell.loss), TRAINED, cell.method)
        others = SubnetConfig.model_fields.keys() - method.config.model_fields.keys()  # task settings cover all methods
        fields = {name: value for name, value in settings.items() if name not in others}
        fields |= {"loss": cell.loss, "mix_ood": cell.mix_ood}
        if not method.selects:
            fields["select"] = "last"
        fields |= {name: value for name in ("gradual", "init") if (value := getattr(cell, name)) is not None}
        if "gradual" in method.by_pattern(parse(cell.pattern)):
            fields.setdefault("gradual", cell.sparsity)  # if the cell sets none, the sparsity is fixed, for any pattern
        return first, config_of(SubnetConfig, fields, f"prune of {cell.task}")


def read_grid(name: str) -> Grid:
    """The grid in a YAML file, or the packaged grid of that name, all cells checked. InputError for anything else."""
    path, content = read_yaml("grid", name)
    if not isinstance(content, dict) or not {"model", "tasks", "cells"} <= content.keys():
        raise InputError(f"grid {path} must have model, tasks and cells", fix="see the packaged grid srnets-small")
    tasks = tasks_of(content, path)
    for task in tasks:
        data.get_task(task)
    cells = expanded(content["cells"], Cell, path)
    unknown = sorted({cell.task for cell in cells} - tasks.keys())
    if unknown:
        raise InputError(f"grid {path} has cells of {unknown[0]}, but no settings for it", fix="add it to tasks")
    grid = Grid(
        name=path.stem,
        given=name,
        model=content["model"],
        ood={task: _of(settings, "ood", list, path) for task, settings in tasks.items()},
        train={task: _of(settings, "train", dict, path) for task, settings in tasks.items()},
        prune={task: _of(settings, "prune", dict, path) for task, settings in tasks.items()},
        cells=cells,
        comparisons=[config_of(Comparison, entry, "comparison") for entry in _of(content, "comparisons", list, path)],
        least={"rows": 12_000, "steps": 600, "seeds": 3} | _of(content, "least", dict, path),
    )
    for comparison in grid.comparisons:
        for fields in (comparison.a, comparison.b):
            config_of(Cell, fields, f"comparison {comparison.name}")
    for cell in cells:
        _check(grid, cell)
    return grid


def _of(content: dict, name: str, kind: type, path: Path):
    """A part of a grid file; empty if the file has none. InputError for one of another type."""
    found = content.get(name)
    if found is not None and not isinstance(found, kind):
        said = {dict: "map names to settings", list: "be a list"}[kind]
        raise InputError(f"grid {path}: {name} must {said}, got {found!r}", fix="correct the grid")
    return kind() if found is None else found


def read_shard(text: str) -> tuple[int, int]:
    """`1/4` as (1, 4); InputError unless the first is below the second."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"shard must be I/N with 0 <= I < N, got {text!r}", fix="write 0/2 and 1/2")
    return int(index), int(count)


def _check(grid: Grid, cell: Cell) -> None:
    grid.train_config(cell, cell.loss if cell.paradigm == "dense" else cell.dense_loss)
    if cell.paradigm == "dense":
        if cell.method is not None or cell.sparsity:
            raise InputError(f"a dense cell has no method and no sparsity, got {cell.method}", fix="correct the grid")
        return
    if cell.method is None:
        raise InputError(f"a {cell.paradigm} cell needs a method, one of {cell.task} has none", fix="correct the grid")
    if (cell.paradigm == "rewound") != (cell.final_loss is not None):
        raise InputError(f"final_loss belongs to rewound cells, got {cell.label}", fix="correct the grid")
    rewinds = TRAINED[cell.method].rewinds
    if (rewinds == "during") > (cell.paradigm == "rewound"):
        raise InputError(f"{cell.method} belongs to rewound cells, got {cell.label}", fix="correct the grid")
    if rewinds is None and cell.paradigm == "rewound":
        raise InputError(f"{cell.method} rewinds nothing, got {cell.label}", fix="correct the grid")
    check(*grid.prune_configs(cell))


def tasks_of(content: dict, path: Path) -> dict[str, dict]:
    """The settings of each task in a grid file. InputError for anything else."""
    tasks = content["tasks"]
    if not isinstance(tasks, dict) or not all(isinstance(settings, dict) for settings in tasks.values()):
        raise InputError(f"grid {path}: tasks must map names to settings", fix="correct the grid")
    return tasks


def expanded(entries: list, cell_class: type[Settings], path: Path) -> list:
    """The cells of the entries of a grid file: of each, every combination of the fields that are lists. InputError for
    anything else, and for a cell that is there twice.
    """
    cells = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            raise InputError(f"grid {path}: a cell must map fields to values, got {entry!r}", fix="correct the grid")
        values = [value if isinstance(value, list) else [value] for value in entry.values()]
        for combination in itertools.product(*values):
            cells.append(config_of(cell_class, dict(zip(entry, combination, strict=True)), "cell"))
    if not cells:
        raise InputError(f"grid {path} has no cells", fix="add some")
    repeated = [cell for cell, count in Counter(cells).items() if count > 1]
    if repeated:
        raise InputError(f"grid {path} has a cell twice: {repeated[0].label}", fix="write it once")
    return cells


def chosen(settings: dict, names: Iterable[str], name: str) -> dict:
    """The settings without those nested under `names`; the ones under `name` are merged in and override others."""
    return {**{key: value for key, value in settings.items() if key not in names}, **settings.get(name, {})}


def config_of(config_class: type[Settings], fields: dict, where: str):
    """`config_class(**fields)`; InputError for what it refuses. where: the part of the grid that they are from."""
    try:
        return validated(config_class, fields, f"{where}: ", "correct the grid")
    except TypeError as error:
        raise InputError(f"{where}: {first_line(error)}", fix="correct the grid") from error
