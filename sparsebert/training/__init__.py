"""Fine-tuning, and everything else that changes weights by gradients."""

from sparsebert.training.finetune import train

__all__ = ["train"]
