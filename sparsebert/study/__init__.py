"""Grids of experiments: `read_grid` the cells of one, `run_grid` them from a ledger, `publish` what they say."""

from sparsebert.study.grid import read_grid, read_shard
from sparsebert.study.report import publish
from sparsebert.study.srnets import run_grid

__all__ = ["publish", "read_grid", "read_shard", "run_grid"]
