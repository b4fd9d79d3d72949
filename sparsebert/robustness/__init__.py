"""Measures how good a classifier is: in and out of distribution, in other domains and under attack; and how far it is
from the dense model.
"""

import importlib

# Public name -> module that defines it. Resolved on first use: `sparsebert.robustness.textattack` runs in an
# environment without what the others need.
_PUBLIC = {
    "Attacked": "sparsebert.robustness.attacks",
    "Evaluation": "sparsebert.robustness.evaluation",
    "attack": "sparsebert.robustness.attacks",
    "compare": "sparsebert.robustness.evaluation",
    "compare_ood": "sparsebert.robustness.ood",
    "evaluate": "sparsebert.robustness.run",
    "kept": "sparsebert.robustness.run",
    "misfit": "sparsebert.robustness.run",
}

__all__ = ["Attacked", "Evaluation", "attack", "compare", "compare_ood", "evaluate", "kept", "misfit"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsebert.robustness' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
