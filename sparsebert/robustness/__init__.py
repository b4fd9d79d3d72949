"""Measures how good a classifier is, in and out of distribution, and how far it is from the dense model."""

from sparsebert.robustness.attacks import Attacked, attack
from sparsebert.robustness.evaluation import Evaluation, compare
from sparsebert.robustness.ood import compare_ood
from sparsebert.robustness.run import evaluate, kept, misfit

__all__ = ["Attacked", "Evaluation", "attack", "compare", "compare_ood", "evaluate", "kept", "misfit"]
