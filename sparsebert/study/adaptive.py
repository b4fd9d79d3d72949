"""The cells of "Towards Robust Pruning": pruning methods under attack, over several dense models. [Li et al. 2023]"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from sparsebert import checkpoint, data
from sparsebert.config import AttackConfig, Positive, PruneConfig, QuantizeConfig, Settings, TrainConfig
from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.errors import InputError
from sparsebert.jobs import code_of, digest, place
from sparsebert.patterns import parse, sparsity_of
from sparsebert.pruning import METHODS, check, prune_checkpoint, quantize_checkpoint
from sparsebert.pruning.plan import flops_a_second, mean_tokens, plan_model, training_speed
from sparsebert.pruning.subnets import own
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.pruning.trained.method import passes
from sparsebert.robustness import attack, evaluate
from sparsebert.robustness.distances import distances
from sparsebert.study.grid import chosen, config_of, expanded
from sparsebert.study.run import Outcome, Study, run_cells
from sparsebert.training import soup, train
from sparsebert.training.loop import step_count
from sparsebert.training.recipe import read_yaml

KIND = "adaptive cell"
CODE = code_of("sparsebert.pruning.entry")[:12]  # hash of the code that trains and prunes the cells
ATTACK, CONTROL = "textfooler", "random-synonym"
COMPARED = 200  # texts on which hidden states are compared


class Cell(Settings):
    """One model that is made, evaluated and attacked beside the dense model that it is made from.

    dense: name of the dense model. method: of `sparsebert prune`, or "dense" for that model itself. sparsity: None for
    what the pattern implies. adversarial: how a method with labels trains. int8: also round it to int8. controls: also
    attack it with its confidence matched to the dense model's, and with random synonyms. distances: also compare its
    hidden states with the dense model's.
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

    @field_validator("method")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name != "dense" and name not in METHODS:
            raise ValueError(f"must be dense or one of {', '.join(METHODS)}")
        return name

    @property
    def setting(self) -> dict:
        """What is done to the dense model: cells with the same setting are repetitions."""
        names = ("task", "method", "pattern", "sparsity", "adversarial")
        return {name: getattr(self, name) for name in names}

    @property
    def zeros(self) -> float:
        return 0.0 if self.method == "dense" else sparsity_of(parse(self.pattern), self.sparsity)

    @property
    def label(self) -> str:
        """The method as a text for people."""
        said = self.method + (" + FreeLB" if self.adversarial == "freelb" else "")
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


@dataclass(frozen=True)
class AdaptiveGrid:
    """The content of a grid file. cells: the most important first."""

    name: str
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
    tasks = {task: config_of(TaskSettings, fields, f"task {task}") for task, fields in content["tasks"].items()}
    grid = AdaptiveGrid(path.stem, content["model"], tasks, expanded(content["cells"], Cell, path))
    for task, settings in tasks.items():
        if data.get_task(task).pair:
            raise InputError(f"task {task} has pairs of texts, this study is of single texts", fix="leave it out")
        for dense in settings.dense:
            for member in grid.members(task, dense) or [dense]:
                if member not in settings.dense:
                    raise InputError(f"soup {dense} has a member {member}, which is not in dense", fix="correct it")
                if not grid.train_config(task, member).hold_out:
                    raise InputError(f"dense {member} needs hold_out: soups are chosen on it", fix="add hold_out: 2000")
    for cell in grid.cells:
        _check(grid, cell)
    return grid


def _check(grid: AdaptiveGrid, cell: Cell) -> None:
    if cell.task not in grid.tasks or cell.dense not in grid.tasks[cell.task].dense:
        raise InputError(f"a cell has dense {cell.dense!r} of task {cell.task}, which is not in tasks", fix="add it")
    if cell.method == "dense":
        if cell.sparsity or cell.pattern != "unstructured" or cell.adversarial != "none" or cell.distances:
            raise InputError("a dense cell has no zeros and no distances from itself", fix="correct the grid")
        return
    if cell.method not in TRAINED and cell.adversarial != "none":
        raise InputError(f"{cell.method} does not train, got adversarial {cell.adversarial}", fix="leave it out")
    check(*grid.prune_configs(cell))


def run_adaptive(
    grid: AdaptiveGrid,
    output: Path,
    *,
    hours: float | None = None,
    shard: tuple[int, int] = (0, 1),
    only: Callable[[Cell], bool] = lambda cell: True,
    others: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Runs the unfinished cells of the grid in the folder `output`, as `run_cells` does; attacked examples are kept in
    `output`/attacks.sqlite. A cell's key is made of its settings, those of its task, the data and the model that all
    start from. Cells of one dense model are in one shard.
    """
    output = place(output)

    def compute(cell: Cell, progress: Progress) -> dict:
        return run_cell(grid, cell, output, progress, overwrite=overwrite)

    guess = Guess(grid)

    def alike(cell: Cell) -> tuple:
        return (*cell.setting.values(), cell.int8, cell.controls, *guess.made(cell))

    study = Study(
        KIND, inputs_of(grid), compute, CODE, group=lambda cell: (cell.task, cell.dense), alike=alike,
        guess=guess.seconds,
    )  # fmt: skip
    return run_cells(
        study, output, hours=hours, shard=shard, only=only, others=others, overwrite=overwrite, progress=progress
    )


def inputs_of(grid: AdaptiveGrid) -> list[tuple[Cell, dict]]:
    """Every cell with everything that decides its result."""
    source = checkpoint.source_sha256(checkpoint.resolve(grid.model))
    found = {}
    for task, settings in grid.tasks.items():
        spec = data.get_task(task)
        if spec.train is None:
            raise InputError(f"task {task!r} has no training split", fix="leave it out of the grid")
        reported = data.load(spec, spec.test, limit=settings.n)
        found[task] = {"training": data.training(spec).sha256, "reported": reported.sha256}
    return [
        (cell, {"cell": cell.model_dump(), "model": source, "data": found[cell.task], **_of_cell(grid, cell)})
        for cell in grid.cells
    ]


def _of_cell(grid: AdaptiveGrid, cell: Cell) -> dict:
    """The settings of the grid that decide a cell."""
    settings = grid.tasks[cell.task]
    names = [cell.dense, *(grid.members(cell.task, cell.dense) or [])]
    return {
        "n": settings.n,
        "train": settings.train,
        "dense": {name: settings.dense[name] for name in names},
        "prune": {} if cell.method == "dense" else chosen(settings.prune, METHODS, cell.method),
    }


def dense_model(grid: AdaptiveGrid, task: str, name: str, models: Path, progress: Progress, overwrite: bool) -> Path:
    """The directory of a dense model, which is made first if it is not there."""

    def part(done: int, total: int, what: str = "") -> None:
        progress(done, total, f"{name} {what}".strip())

    start, members = checkpoint.source_sha256(checkpoint.resolve(grid.model)), grid.members(task, name)
    if members is None:
        config = grid.train_config(task, name)
        path = models / f"{task}-{name}-{digest([start, CODE, config.model_dump()])[:12]}"
        train(grid.model, task, path, config, overwrite=overwrite, progress=part)
        return path
    made = [dense_model(grid, task, member, models, progress, overwrite) for member in members]
    path = models / f"{task}-{name}-{digest([member.name for member in made])[:12]}"
    soup(made, task, path, score="attacked", overwrite=overwrite, progress=part)
    return path


def run_cell(grid: AdaptiveGrid, cell: Cell, output: Path, progress: Progress, *, overwrite: bool = False) -> dict:
    """Makes, evaluates and attacks one cell. Dense models stay in `output`/models for other cells.

    Returns the figures of `evaluate` for each form of the model ("fp32", "int8", and "matched": fp32 with the
    confidence of the dense model), the distances of hidden states on original and adversarial texts, the sparsity and
    the figures of the training.
    """

    def part(what: str) -> Callable:
        return lambda done, total, inner="": progress(done, total, f"{what} {inner}".strip())

    models, settings = output / "models", grid.tasks[cell.task]
    dense = dense_model(grid, cell.task, cell.dense, models, part("fine-tune"), overwrite)
    made: dict = {"sparsity": 0.0, "training": None}
    path, scratch = dense, []
    if cell.method != "dense":
        config, subnet = grid.prune_configs(cell)
        path = models / f"cell-{digest([dense.name, CODE, cell.setting])[:12]}"
        result = prune_checkpoint(dense, cell.task, path, config, subnet, overwrite=overwrite, progress=part("prune"))
        made = {"sparsity": result.sparsity, "training": result.training}
        scratch.append(path)
        if (config := grid.retrain_config(cell)) is not None:
            source, path = path, path.with_name(f"{path.name}-tuned")
            train(source, cell.task, path, config, overwrite=overwrite, progress=part("train the ticket"))
            scratch.append(path)

    def figures(directory: Path, attacks: str, what: str, match: bool = False) -> dict:
        limits = AttackConfig(ledger=str(output / "attacks.sqlite"), match_confidence=match)
        vs = None if directory == dense else dense
        found = evaluate(
            directory, cell.task, vs=vs, attacks=attacks, attack=limits, n=settings.n, progress=part(what)
        ).figures("about")
        shown = {
            name: {key: value for key, value in each.items() if key not in ("worst", "settings")}
            for name, each in found["attacks"].items()
        }
        return {**found, "attacks": shown}

    attacks = f"{ATTACK},{CONTROL}" if cell.controls else ATTACK
    forms = {"fp32": figures(path, attacks, "attack")}
    if cell.controls and path != dense:
        forms["matched"] = figures(path, ATTACK, "attack, confidence matched,", match=True)
    if cell.int8 and forms["fp32"]["dtype"] != "int8":
        rounded = models / f"{path.name}-int8"
        settings8 = config_of(QuantizeConfig, _calibration(settings.prune), f"prune of {cell.task}")
        quantize_checkpoint(path, cell.task, rounded, settings8, overwrite=overwrite, progress=part("round to int8"))
        forms["int8"] = figures(rounded, attacks, "attack int8")
        scratch.append(rounded)
    if cell.distances:
        made["distances"] = _distances(grid, cell, path, dense, output)
    for each in scratch:
        shutil.rmtree(each)
    return {"forms": forms, **made}


def _calibration(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name in QuantizeConfig.model_fields}


def _distances(grid: AdaptiveGrid, cell: Cell, path: Path, dense: Path, output: Path) -> dict[str, list[float]]:
    """Distances from the dense model by layer, on reported texts and on those that an attack on it ended with."""
    limits = AttackConfig(ledger=str(output / "attacks.sqlite"), n=grid.tasks[cell.task].n)
    rows = [row for row in attack(dense, cell.task, ATTACK, limits).rows if row["outcome"] in ("succeeded", "failed")]
    rows, length = rows[:COMPARED], data.get_task(cell.task).max_length
    return {
        name: distances(path, dense, [row[column] for row in rows], length)
        for name, column in (("original", "original"), ("adversarial", "perturbed"))
    }


class Guess:
    """How long cells probably take on this machine's CPU: from the speed of a matrix product, the shapes, the steps and
    the grid's `attack_seconds`. A dense model counts in the first cell that needs it.
    """

    def __init__(self, grid: AdaptiveGrid):
        self.grid, self._first = grid, {}
        for cell in grid.cells:
            for name in [cell.dense, *(grid.members(cell.task, cell.dense) or [])]:
                self._first.setdefault((cell.task, name), cell)

    def made(self, cell: Cell) -> list[str]:
        """The dense models that are made for a cell, unless only some of the cells are run."""
        return [name for name in self.grid.tasks[cell.task].dense if self._first.get((cell.task, name)) == cell]

    def seconds(self, cell: Cell) -> float:
        """Seconds that a cell probably takes."""
        grid, settings = self.grid, self.grid.tasks[cell.task]
        total = sum(self._dense(cell.task, name) for name in self.made(cell))
        if cell.method != "dense":
            config, subnet = grid.prune_configs(cell)
            if cell.method in TRAINED:
                share = TRAINED[cell.method].passes(own(cell.method, subnet))
                total += self._training(cell.task, subnet, share)
                if (config := grid.retrain_config(cell)) is not None:
                    total += self._training(cell.task, config, passes(config))
            else:
                total += plan_model(self._shapes, config, speed=self._speed).seconds["total"]
        attacks = 1.0
        if cell.controls:
            attacks += 1 + (cell.method != "dense")
        if cell.int8:
            attacks += 1
            rounding = PruneConfig(method="wanda", int8=True)
            total += plan_model(self._shapes, rounding, speed=self._speed).seconds["int8"]
        return total + attacks * settings.attack_seconds

    @cached_property
    def _shapes(self):
        return checkpoint.shapes(checkpoint.resolve(self.grid.model))

    @cached_property
    def _tokens(self) -> dict[str, tuple[int, float]]:
        """Training examples of each task, and mean tokens of one."""
        found = {}
        for task in self.grid.tasks:
            spec = data.get_task(task)
            examples = data.training(spec)
            mean, _ = mean_tokens(checkpoint.resolve(self.grid.model), examples, spec.max_length or 512)
            found[task] = len(examples), mean
        return found

    @cached_property
    def _speed(self) -> float:
        return flops_a_second()

    @cached_property
    def _training_speed(self) -> float:
        return training_speed(TrainConfig())

    def _training(self, task: str, config: TrainConfig | SubnetConfig, share: float) -> float:
        """Seconds of a run with `share` forward and backward passes per step."""
        examples, mean = self._tokens[task]
        examples = min(config.n or examples, examples - config.hold_out)
        tokens = step_count(examples, config) * min(config.batch_size, examples) * mean
        weights = sum(module.weight.numel() for module in encoder_linears(self._shapes).values())
        return share * 6 * weights * tokens / self._training_speed

    def _dense(self, task: str, name: str) -> float:
        members = self.grid.members(task, name)
        if members is not None:
            return (2 * len(members) - 1) * self.grid.tasks[task].attack_seconds
        config = self.grid.train_config(task, name)
        return self._training(task, config, passes(config))


def planned(
    grid: AdaptiveGrid, only: Callable[[Cell], bool] = lambda cell: True, hours: float | None = None
) -> list[dict]:
    """The plan of `run_adaptive` without running it: for each cell its fields, about how many seconds it takes, and
    whether it would be begun within `hours`.
    """
    guess, spent, rows = Guess(grid), 0.0, []
    for cell in filter(only, grid.cells):
        seconds = guess.seconds(cell)
        runs = hours is None or spent + seconds <= hours * 3600
        spent += seconds * runs
        rows.append({**cell.model_dump(), "label": cell.label, "zeros": cell.zeros, "seconds": seconds, "runs": runs})
    return rows
