"""Pruning: `prune` a model in memory without training, or `prune_checkpoint` a directory into another by any method."""

import importlib

# Public name -> module that defines it. Resolved on first use, so that the flags of `trained` cost no import of torch.
_PUBLIC = {
    "METHODS": "entry",
    "Calibration": "calibration",
    "PruneResult": "entry",
    "SubnetConfig": "trained",
    "check": "entry",
    "draw": "calibration",
    "prune": "entry",
    "prune_checkpoint": "entry",
}

__all__ = ["METHODS", "Calibration", "PruneResult", "SubnetConfig", "check", "draw", "prune", "prune_checkpoint"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsebert.pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsebert.pruning.{_PUBLIC[name]}"), name)
