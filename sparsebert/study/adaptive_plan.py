"""How long the cells of the study `adaptive` probably take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig, TrainConfig
from sparsebert.encoders import encoder_linears
from sparsebert.pruning.plan import flops_a_second, mean_tokens, plan_model, training_speed
from sparsebert.pruning.subnets import own
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.pruning.trained.method import passes
from sparsebert.study.adaptive_grid import AdaptiveGrid, Cell
from sparsebert.training.loop import step_count


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
        attacks = float(len(cell.attacks_of) + (cell.controls and cell.method != "dense"))
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
