"""How good a classifier is, and how far from the dense one it came."""

from sparsebert.robustness.evaluation import Evaluation, compare, evaluate

__all__ = ["Evaluation", "compare", "evaluate"]
