"""The cells of the study `adaptive`, read from one YAML file. [Li et al. 2023]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from sparsebert import data
from sparsebert.config import Positive, PruneConfig, Settings, TrainConfig
from sparsebert.errors import InputError
from sparsebert.patterns import parse, sparsity_of
from sparsebert.pruning import METHODS, check
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.robustness import attacks
from sparsebert.study.grid import chosen, config_of, expanded, tasks_of
from sparsebert.training.recipe import read_yaml

ATTACK, CONTROL = "textfooler", "random-synonym"


class Cell(Settings):
    """One model that is made, evaluated and attacked beside the dense model that it is made from.

    dense: name of the dense model. method: of `sparsebert prune`, or "dense" for that model itself. sparsity: None for
    what the pattern implies. adversarial: how a method with labels trains. int8: also round it to int8. controls: also
    attack it with its confidence matched to the dense model's, and with random synonyms. distances: also compare its
    hidden states with the dense model's. calibration: for a method without labels, what it looks at beside the task's
    texts (PruneConfig.calibration); None: the grid's. draw: seed of the choice of calibration texts; draws are
    repetitions. attacks: further ones, with commas. domains: also evaluate it on every other set with its labels.
    """

    task: str
    dense: str
    method: str = "dense"
    pattern: str = "unstructured"
    sparsity: float | None = Field(None, ge=0, lt=1)
    adversarial: Literal["none", "freelb"] = "none"
    int8: bool = False
    controls: bool = False
    distances: bool = False
    calibration: str | None = None
    draw: int = Field(0, ge=0)
    attacks: str = ""
    domains: bool = False

    @field_validator("method")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name != "dense" and name not in METHODS:
            raise ValueError(f"dense or one of {', '.join(METHODS)}")
        return name

    @property
    def setting(self) -> dict:
        """What is done to the dense model: cells with the same setting are repetitions."""
        names = ("task", "method", "pattern", "sparsity", "adversarial", "calibration")
        return {name: getattr(self, name) for name in names}

    @property
    def attacks_of(self) -> list[str]:
        """The attacks on it, TextFooler first."""
        more = [CONTROL] if self.controls else []
        return list(dict.fromkeys([ATTACK, *more, *filter(None, self.attacks.split(","))]))

    @property
    def zeros(self) -> float:
        return 0.0 if self.method == "dense" else sparsity_of(parse(self.pattern), self.sparsity)

    @property
    def label(self) -> str:
        """The method as a text for people."""
        said = self.method + (" + FreeLB" if self.adversarial == "freelb" else "")
        said += "" if self.calibration is None else f", calibration {self.calibration}"
        return said if self.pattern == "unstructured" else f"{said}, {self.pattern}"


class TaskSettings(Settings):
    """What a grid says of a task.

    n: reported examples that are evaluated and attacked, drawn with seed 0; None: all. attack_seconds: about how long
    one attack on them takes on this machine, for the plan. train: fields of TrainConfig for every dense model. dense:
    name -> further fields, or `members`, the models that a soup is made of, by accuracy under attack on held-out
    training examples. prune: fields of PruneConfig and SubnetConfig; under the name of a method those that differ.
    """

    n: int | None = Field(None, ge=1)
    attack_seconds: Positive
    train: dict = Field(default_factory=dict)
    dense: dict[str, dict]
    prune: dict = Field(default_factory=dict)

    @field_validator("dense")
    @classmethod
    def _has_lists_of_members(cls, dense: dict[str, dict]) -> dict[str, dict]:
        for name, fields in dense.items():
            members = fields.get("members", ["a"])
            if not isinstance(members, list) or not members or not all(isinstance(each, str) for each in members):
                raise ValueError(f"{name}: members must be a list of names")
        return dense

    @field_validator("prune")
    @classmethod
    def _nests_settings_of_methods(cls, prune: dict) -> dict:
        if wrong := [name for name, own in prune.items() if name in METHODS and not isinstance(own, dict)]:
            raise ValueError(f"{wrong[0]} must map flags to values")
        if any(each.get("int8") for each in (prune, *(prune[name] for name in prune if name in METHODS))):
            raise ValueError("int8 belongs to cells")
        return prune


@dataclass(frozen=True)
class AdaptiveGrid:
    """The content of a grid file. given: the file, or the name of a packaged one. cells: the most important first."""

    name: str
    given: str
    model: str
    tasks: dict[str, TaskSettings]
    cells: list[Cell]

    def train_config(self, task: str, name: str) -> TrainConfig:
        """The settings of a dense model that is no soup."""
        return config_of(TrainConfig, {**self.tasks[task].train, **self.tasks[task].dense[name]}, f"dense {name}")

    def members(self, task: str, name: str) -> list[str] | None:
        """The dense models that a soup is made of; None for a model that is trained."""
        return self.tasks[task].dense[name].get("members")

    def prune_configs(self, cell: Cell) -> tuple[PruneConfig, SubnetConfig]:
        """The settings of pruning."""
        fields = chosen(self.tasks[cell.task].prune, METHODS, cell.method)
        trained = TRAINED.get(cell.method)
        flags = set(PruneConfig.model_fields) - {name for each in METHODS.values() for name in each.flags}
        flags |= METHODS[cell.method].flags if trained is None else set()
        of_prune = {name: value for name, value in fields.items() if name in flags}
        of_prune |= {"method": cell.method, "pattern": cell.pattern, "sparsity": cell.sparsity}
        if trained is None:
            of_prune["seed"] = cell.draw
        if cell.calibration is not None:
            of_prune["calibration"] = cell.calibration.split(",")
        names = set() if trained is None else set(trained.config.model_fields) - set(of_prune)
        of_subnet = {name: value for name, value in fields.items() if name in names}
        if trained is not None:
            of_subnet["adversarial"] = cell.adversarial
            if not trained.selects:  # it goes back to the pretrained weights, and is then trained
                of_subnet |= {"select": "last", "start": "pretrained", "rewind": "pretrained"}
        where = f"prune of {cell.task}"
        return config_of(PruneConfig, of_prune, where), config_of(SubnetConfig, of_subnet, where)

    def retrain_config(self, cell: Cell) -> TrainConfig | None:
        """The settings of the training that a rewound subnetwork needs; None for other methods."""
        if cell.method not in TRAINED or TRAINED[cell.method].selects:
            return None
        fields = {name: value for name, value in self.tasks[cell.task].train.items() if name != "adversarial"}
        return config_of(TrainConfig, {**fields, "adversarial": cell.adversarial}, f"train of {cell.task}")


def read_adaptive(name: str) -> AdaptiveGrid:
    """The grid in a YAML file, or the packaged grid of that name, all cells checked. InputError for anything else."""
    path, content = read_yaml("grid", name)
    if not isinstance(content, dict) or not {"model", "tasks", "cells"} <= content.keys():
        raise InputError(f"grid {path} must have model, tasks and cells", fix="see the packaged grid adaptive")
    tasks = {task: config_of(TaskSettings, own, f"task {task}") for task, own in tasks_of(content, path).items()}
    grid = AdaptiveGrid(path.stem, name, content["model"], tasks, expanded(content["cells"], Cell, path))
    for task, settings in tasks.items():
        if data.get_task(task).pair:
            raise InputError(f"task {task} has pairs of texts, this study is of single texts", fix="leave it out")
        own_settings = [fields for name, fields in settings.prune.items() if name in METHODS]
        for name in {name for fields in (settings.prune, *own_settings) for name in fields}:
            if name not in {*METHODS, *PruneConfig.model_fields, *SubnetConfig.model_fields}:
                raise InputError(f"prune of {task} has {name!r}, which is no flag of prune", fix="correct the grid")
        for dense in settings.dense:
            for member in grid.members(task, dense) or [dense]:
                if member not in settings.dense:
                    raise InputError(f"soup {dense} has a member {member}, which is not in dense", fix="correct it")
                if not grid.train_config(task, member).hold_out:
                    raise InputError(f"dense {member} needs hold_out: soups are chosen on it", fix="add hold_out: 2000")
    for cell in grid.cells:
        _check(grid, cell)
        attacks.named(cell.attacks_of)
    return grid


def _check(grid: AdaptiveGrid, cell: Cell) -> None:
    if cell.task not in grid.tasks or cell.dense not in grid.tasks[cell.task].dense:
        raise InputError(f"a cell has dense {cell.dense!r} of task {cell.task}, which is not in tasks", fix="add it")
    if cell.method == "dense":
        own_fields = {"task", "dense", "int8", "controls", "attacks", "domains"}
        if others := [name for name in cell.model_fields_set - own_fields - {"method"} if getattr(cell, name)]:
            raise InputError(f"a dense cell is not pruned, got {', '.join(sorted(others))}", fix="correct the grid")
        return
    if cell.method in TRAINED and (cell.draw or cell.calibration is not None):
        raise InputError(f"{cell.method} has no calibration texts, got a draw or calibration", fix="leave it out")
    if cell.method not in TRAINED and cell.adversarial != "none":
        raise InputError(f"{cell.method} does not train, got adversarial {cell.adversarial}", fix="leave it out")
    check(*grid.prune_configs(cell))
