"""RobusT: masks trained under attack, then the ticket trained from the pretrained weights. [Zheng et al. 2022]"""

from __future__ import annotations

from pydantic import Field

from sparsebert.config import Positive
from sparsebert.pruning.trained.method import (
    Floats,
    HeadConfig,
    RewoundTicketConfig,
    Start,
    Trained,
    passes_with_search,
    require_unstructured,
)

SEARCH = 0.5


class RobustTicketConfig(RewoundTicketConfig, HeadConfig):
    """The flags of robust tickets."""

    scores_lr: Positive | None = Field(None, description="peak learning rate of the scores [default: 0.1]")
    penalty: float | None = Field(
        None, ge=0, description="weight of the mean probability that a gate is not 0 in the loss [default: 0.5]"
    )


def _hook(start: Start):
    from sparsebert.training.tickets import RobustTicket

    config = start.config
    chosen = {name: value for name in ("scores_lr", "penalty") if (value := getattr(config, name)) is not None}
    return RobustTicket(
        start.model, start.sparsity, rewound=start.rewound, search=config.search or SEARCH,
        head=config.head == "masked", warmup=config.warmup, **chosen,
    )  # fmt: skip


METHOD = Trained(
    "robust-ticket",
    RobustTicketConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=0, learning=scores + parameters),
    check=require_unstructured,
    rewinds="during",
    rewinds_to="pretrained",
    passes=lambda config: passes_with_search(config, SEARCH),
)
