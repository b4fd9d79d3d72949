"""Sparse BERT-family classifiers that stay accurate and robust, and really run faster."""

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import sparsebert` costs nothing.
_PUBLIC = {
    "Engine": "sparsebert.engine",
    "evaluate": "sparsebert.robustness",
    "pipeline": "sparsebert.engine.pipeline",
    "prune": "sparsebert.pruning",
    "soup": "sparsebert.training",
    "train": "sparsebert.training",
}

__all__ = ["Engine", "__version__", "evaluate", "pipeline", "prune", "soup", "train"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsebert' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        from sparsebert.errors import without_extra

        if (told := without_extra(f"sparsebert.{name}", error)) is None:
            raise
        raise told from error
