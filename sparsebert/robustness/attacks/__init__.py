"""Adversarial attacks on classifiers, many examples at a time."""
