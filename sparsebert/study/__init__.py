"""Grids of experiments: `read_grid` reads the cells, `run_grid` runs them with a ledger, `publish` reports them; of the
study `adaptive`, `read_adaptive`, `run_adaptive` and `publish_adaptive`, and `planned` says what a run would take.
"""

from sparsebert.study.adaptive import run_adaptive
from sparsebert.study.adaptive_grid import read_adaptive
from sparsebert.study.adaptive_plan import planned
from sparsebert.study.adaptive_report import publish_adaptive
from sparsebert.study.grid import read_grid, read_shard
from sparsebert.study.pages import path_told
from sparsebert.study.report import publish
from sparsebert.study.run import read_only
from sparsebert.study.srnets import run_grid

__all__ = [
    "path_told",
    "planned",
    "publish",
    "publish_adaptive",
    "read_adaptive",
    "read_grid",
    "read_only",
    "read_shard",
    "run_adaptive",
    "run_grid",
]
