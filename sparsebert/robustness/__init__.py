"""How good a classifier is, in and out of distribution, and how far from the dense one it came."""

from sparsebert.robustness.evaluation import Evaluation, compare
from sparsebert.robustness.ood import compare_ood
from sparsebert.robustness.run import evaluate, kept

__all__ = ["Evaluation", "compare", "compare_ood", "evaluate", "kept"]
