"""Runs the cells of "Towards Robust Pruning": methods under attack, over several dense models. [Li et al. 2023]"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsebert import checkpoint, data
from sparsebert.config import AttackConfig, QuantizeConfig
from sparsebert.encoders import Progress, no_progress
from sparsebert.errors import InputError
from sparsebert.jobs import code_of, digest, file_sha256, place
from sparsebert.pruning import METHODS, prune_checkpoint, quantize_checkpoint
from sparsebert.robustness import attack, domains, evaluate
from sparsebert.robustness.attacks import require_few_errors
from sparsebert.robustness.distances import distances
from sparsebert.study.adaptive_grid import ATTACK, AdaptiveGrid, Cell
from sparsebert.study.adaptive_plan import Guess
from sparsebert.study.grid import chosen, config_of
from sparsebert.study.run import Outcome, Study, run_cells
from sparsebert.training import soup, train

KIND = "adaptive cell"
CODE = code_of("sparsebert.pruning.entry")[:12]  # hash of the code that trains and prunes the cells
COMPARED = 200  # texts on which hidden states are compared


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
        return (*cell.setting.values(), cell.int8, cell.domains, *cell.attacks_of, *guess.made(cell))

    study = Study(
        KIND, inputs_of(grid), compute, CODE, group=lambda cell: (cell.task, cell.dense), alike=alike,
        guess=guess.seconds,
    )  # fmt: skip
    return run_cells(
        study, output, hours=hours, shard=shard, only=only, others=others, overwrite=overwrite, progress=progress
    )


def inputs_of(grid: AdaptiveGrid) -> list[tuple[Cell, dict]]:
    """Every cell with everything that decides its result; of other domains, what they must share no text with."""
    source = checkpoint.source_sha256(checkpoint.resolve(grid.model))
    found = {}  # (task, whether other domains are evaluated) -> hashes of its data
    for task, settings in grid.tasks.items():
        spec = data.get_task(task)
        if spec.train is None:
            raise InputError(f"task {task!r} has no training split", fix="leave it out of the grid")
        reported = data.load(spec, spec.test, limit=settings.n)
        hashes = {"training": data.training(spec).sha256, "reported": reported.sha256}
        found[task, False] = hashes
        if any(cell.domains and cell.task == task for cell in grid.cells):
            found[task, True] = hashes | {"apart_from": [part.sha256 for part in domains.of_task(spec)]}

    def inputs(cell: Cell) -> dict:
        data_of = found[cell.task, cell.domains]
        return {"cell": cell.model_dump(), "model": source, "data": data_of, **_of_cell(grid, cell)}

    return [(cell, inputs(cell)) for cell in grid.cells]


def _of_cell(grid: AdaptiveGrid, cell: Cell) -> dict:
    """The settings of the grid that decide a cell."""
    settings = grid.tasks[cell.task]
    names = [cell.dense, *(grid.members(cell.task, cell.dense) or [])]
    return {
        "n": settings.n,
        "train": settings.train,
        "dense": {name: settings.dense[name] for name in names},
        "prune": {} if cell.method == "dense" else chosen(settings.prune, METHODS, cell.method),
        **({"calibration": own} if (own := _own_texts(grid, cell)) else {}),
    }


def _own_texts(grid: AdaptiveGrid, cell: Cell) -> dict[str, str]:
    """The hashes of the user's own files that a cell is calibrated on."""
    named = () if cell.method == "dense" else grid.prune_configs(cell)[0].calibration
    return {name: file_sha256(Path(name)) for name in named if Path(name).is_file()}


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
        path = models / f"cell-{digest([dense.name, CODE, cell.setting, cell.draw])[:12]}"
        result = prune_checkpoint(dense, cell.task, path, config, subnet, overwrite=overwrite, progress=part("prune"))
        made = {"sparsity": result.sparsity, "training": result.training}
        scratch.append(path)
        if (config := grid.retrain_config(cell)) is not None:
            source, path = path, path.with_name(f"{path.name}-tuned")
            train(source, cell.task, path, config, overwrite=overwrite, progress=part("train the ticket"))
            scratch.append(path)

    def figures(directory: Path, attacks: list[str], what: str, match: bool = False) -> dict:
        vs, others = None if directory == dense else dense, "all" if cell.domains and not match else None
        found = evaluate(
            directory,
            cell.task,
            vs=vs,
            domains=others,
            attacks=",".join(attacks),
            attack=_limits(output),
            match_confidence=match,
            n=settings.n,
            progress=part(what),
        ).figures("about")
        shown = {
            name: {key: value for key, value in require_few_errors(each).items() if key not in ("worst", "settings")}
            for name, each in found["attacks"].items()
        }
        return {**found, "attacks": shown}

    forms = {"fp32": figures(path, cell.attacks_of, "attack")}
    if cell.controls and path != dense:
        forms["matched"] = figures(path, [ATTACK], "attack, confidence matched,", match=True)
    if cell.int8 and forms["fp32"]["dtype"] != "int8":
        rounded = models / f"{path.name}-int8"
        settings8 = config_of(QuantizeConfig, _rounding(grid, cell), f"prune of {cell.task}")
        quantize_checkpoint(path, cell.task, rounded, settings8, overwrite=overwrite, progress=part("round to int8"))
        forms["int8"] = figures(rounded, cell.attacks_of, "attack int8")
        scratch.append(rounded)
    if cell.distances:
        made["distances"] = _distances(grid, cell, path, dense, output)
    for each in scratch:
        shutil.rmtree(each)
    return {"forms": forms, **made}


def _limits(output: Path, **settings) -> AttackConfig:
    """No limit on the time of an example: a slow model, or a busy machine, would pass for a robust one."""
    return AttackConfig(ledger=str(output / "attacks.sqlite"), max_seconds=None, **settings)


def _rounding(grid: AdaptiveGrid, cell: Cell) -> dict:
    """The settings of rounding to int8: those of the calibration texts that the cell was pruned with."""
    fields = {**grid.tasks[cell.task].prune, "seed": cell.draw}
    if cell.calibration is not None:
        fields["calibration"] = cell.calibration.split(",")
    return {name: value for name, value in fields.items() if name in QuantizeConfig.model_fields}


def _distances(grid: AdaptiveGrid, cell: Cell, path: Path, dense: Path, output: Path) -> dict[str, list[float]]:
    """Distances from the dense model by layer, on reported texts and on those that an attack on it ended with."""
    limits = _limits(output, n=grid.tasks[cell.task].n)
    rows = [row for row in attack(dense, cell.task, ATTACK, limits).rows if row["outcome"] in ("succeeded", "failed")]
    rows, length = rows[:COMPARED], data.get_task(cell.task).max_length
    return {
        name: distances(path, dense, [row[column] for row in rows], length)
        for name, column in (("original", "original"), ("adversarial", "perturbed"))
    }
