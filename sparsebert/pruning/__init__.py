"""Pruning: `prune` prunes a model in memory, without training; `prune_checkpoint` prunes a model directory into another
directory, by any method.
"""

import importlib

# Public name -> module that defines it. Imported on first use, so that reading the flags of `trained` does not import
# torch.
_PUBLIC = {
    "METHODS": "entry",
    "Calibration": "calibration",
    "PruneResult": "entry",
    "SubnetConfig": "trained",
    "check": "entry",
    "draw": "calibration",
    "prune": "entry",
    "prune_checkpoint": "entry",
    "quantize_checkpoint": "entry",
}

__all__ = [
    "METHODS",
    "Calibration",
    "PruneResult",
    "SubnetConfig",
    "check",
    "draw",
    "prune",
    "prune_checkpoint",
    "quantize_checkpoint",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsebert.pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsebert.pruning.{_PUBLIC[name]}"), name)
