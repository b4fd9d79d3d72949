"""Grids of experiments: `read_grid` reads the cells, `run_grid` runs them with a ledger, `publish` reports them."""

from sparsebert.study.grid import read_grid, read_shard
from sparsebert.study.report import publish
from sparsebert.study.srnets import run_grid

__all__ = ["publish", "read_grid", "read_shard", "run_grid"]
