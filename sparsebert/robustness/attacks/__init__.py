"""Adversarial attacks on classifiers, many examples at a time.

An attack is a `Recipe` (recipes.py): a transformation proposes words, constraints keep the candidates that still mean
the same, and a search goes from the original to a text that the classifier gets wrong. `lockstep` runs many attacks
together, so that each call of a model is a full batch; `run` keeps every attacked example in a ledger.
"""

from sparsebert.robustness.attacks.entry import Attacked, attack
from sparsebert.robustness.attacks.plan import Plan, Victim, plans, require_used
from sparsebert.robustness.attacks.recipes import RECIPES, named
from sparsebert.robustness.attacks.run import MOST_ERRORS, figures, require_few_errors, run, temperature, transferred

__all__ = [
    "MOST_ERRORS",
    "RECIPES",
    "Attacked",
    "Plan",
    "Victim",
    "attack",
    "figures",
    "named",
    "plans",
    "require_few_errors",
    "require_used",
    "run",
    "temperature",
    "transferred",
]
