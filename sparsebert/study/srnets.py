"""The cells of "A Win-win Deal": training, pruning, evaluation of sparse, robust subnetworks. [Liu et al. 2022]"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsebert import checkpoint, data
from sparsebert.encoders import Progress, no_progress
from sparsebert.errors import InputError
from sparsebert.jobs import code_of, digest, place
from sparsebert.pruning import prune_checkpoint
from sparsebert.pruning.trained import TRAINED
from sparsebert.robustness import evaluate
from sparsebert.study.grid import Cell, Grid
from sparsebert.study.run import Outcome, Study, run_cells
from sparsebert.training import train

KIND = "srnets cell"
CODE = code_of("sparsebert.pruning.subnets")[:12]  # hash of the code that trains and prunes the cells


def run_grid(
    grid: Grid,
    output: Path,
    *,
    hours: float | None = None,
    shard: tuple[int, int] = (0, 1),
    only: Callable[[Cell], bool] = lambda cell: True,
    others: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Runs the unfinished cells of the grid in the folder `output`, as `run_cells` does. A cell's key is made of its
    settings, the data and the weights that it starts from. Cells that share a task and a seed, and so their fine-tuned
    models, are in one shard.
    """

    def compute(cell: Cell, progress: Progress) -> dict:
        return run_cell(grid, cell, place(output) / "models", progress, overwrite=overwrite)

    study = Study(KIND, _inputs(grid), compute, CODE, group=lambda cell: (cell.task, cell.seed), alike=_kind)
    return run_cells(
        study, output, hours=hours, shard=shard, only=only, others=others, overwrite=overwrite, progress=progress
    )


def run_cell(grid: Grid, cell: Cell, models: Path, progress: Progress, *, overwrite: bool = False) -> dict:
    """Trains, prunes and evaluates one cell. Fine-tuned models stay in `models` for other cells to start from."""

    def part(what: str) -> Callable:
        return lambda done, total, inner="": progress(done, total, f"{what} {inner}".strip())

    start = checkpoint.source_sha256(checkpoint.resolve(grid.model))

    def dense(loss: str, **changes) -> Path:
        config = grid.train_config(cell, loss, **changes)
        if loss == "confreg" and config.teacher is None:
            config = config.model_copy(update={"teacher": str(dense("ce", **changes))})
        if cell.start_at < 1:
            config = config.model_copy(update={"keep": f"{cell.start_at:g}"})
        made_of = [start, CODE, config.model_dump(exclude={"teacher"})]
        path = models / f"{cell.task}-{loss}-{cell.seed}-{digest(made_of)[:12]}"
        train(grid.model, cell.task, path, config, overwrite=overwrite, progress=part("fine-tune"))
        return path.with_name(f"{path.name}-at-{cell.start_at:g}") if cell.start_at < 1 else path

    if cell.paradigm == "dense":
        path = dense(cell.loss, mix_ood=cell.mix_ood)
        training = checkpoint.read_manifest(path)["figures"]
    else:
        config, subnet = grid.prune_configs(cell)
        source = dense(cell.dense_loss)
        path = models / f"cell-{digest([source.name, CODE, cell.model_dump()])[:12]}"
        if cell.paradigm == "pretrained":
            subnet = subnet.model_copy(update={"start": "pretrained"})
        elif cell.paradigm == "rewound":
            subnet = subnet.model_copy(update={"rewind": "pretrained"})
            if TRAINED[cell.method].rewinds == "during":
                subnet = subnet.model_copy(update={"start": "pretrained"})
        training = prune_checkpoint(
            source, cell.task, path, config, subnet, overwrite=overwrite, progress=part("prune")
        ).training
        if cell.paradigm == "rewound":
            tuned = path.with_name(f"{path.name}-tuned")
            final = grid.train_config(cell, cell.final_loss, mix_ood=cell.mix_ood)
            train(path, cell.task, tuned, final, overwrite=overwrite, progress=part("fine-tune the subnetwork"))
            shutil.rmtree(path)
            path = tuned
    found = evaluate(path, cell.task, ood=",".join(grid.ood[cell.task]) or None, progress=part("evaluate"))
    if cell.paradigm != "dense":
        shutil.rmtree(path)
    figures = found.figures("about")
    settings = grid.train_config(cell, cell.loss) if cell.paradigm == "dense" else grid.prune_configs(cell)[1]
    examples = len(data.hold_out(data.training(data.get_task(cell.task)), settings.hold_out)[0])
    return {"evaluation": figures, "training": training, "rows": min(settings.n or examples, examples)}


def _inputs(grid: Grid) -> list[tuple[Cell, dict]]:
    """Every cell with everything that decides its result."""
    source = checkpoint.source_sha256(checkpoint.resolve(grid.model))
    shas = {}
    for task, mix_ood in {(cell.task, cell.mix_ood) for cell in grid.cells}:
        spec = data.get_task(task)
        if spec.train is None:
            raise InputError(f"task {task!r} has no training split", fix="leave it out of the grid")
        examples = data.training(spec)
        shas[task, mix_ood] = (data.mix_ood(spec, examples) if mix_ood else examples).sha256
    return [
        (
            cell,
            {
                "cell": cell.model_dump(), "model": source, "data": shas[cell.task, cell.mix_ood],
                "train": grid.train[cell.task], "prune": grid.prune[cell.task] if cell.method else {},
                "ood": grid.ood[cell.task],
            },
        )
        for cell in grid.cells
    ]  # fmt: skip


def _kind(cell: Cell) -> tuple:
    """The fields on which the time of a cell mainly depends."""
    return cell.task, cell.paradigm, cell.method, cell.loss if cell.paradigm == "dense" else ""
