"""Soft movement pruning: masks and weights trained together. [Sanh et al. 2020]"""

from __future__ import annotations

from pydantic import Field

from sparsebert.config import Positive
from sparsebert.pruning.trained.method import Floats, RisingConfig, Start, Trained, require_rising


class SoftMovementConfig(RisingConfig):
    """The flags of soft movement."""

    scores_lr: Positive | None = Field(None, description="peak learning rate of the scores [default: 0.01]")
    penalty: float | None = Field(
        None,
        ge=0,
        description="weight of the mean of sigmoid(scores) in the loss [default: 400]",
    )


def _hook(start: Start):
    from sparsebert.training.masks import SoftMovement

    config = start.config
    chosen = {name: value for name in ("scores_lr", "penalty") if (value := getattr(config, name)) is not None}
    head = config.head == "masked"
    return SoftMovement(start.model, start.pattern, start.sparsity, head=head, **config.schedule, **chosen)


METHOD = Trained(
    "soft-movement",
    SoftMovementConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=scores, learning=scores + parameters),
    check=require_rising,
)
