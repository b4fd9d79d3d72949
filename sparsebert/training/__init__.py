"""Fine-tuning, and everything else that changes weights by gradients."""

from sparsebert.training.finetune import train
from sparsebert.training.recipe import train_recipe
from sparsebert.training.soup import soup

__all__ = ["soup", "train", "train_recipe"]
