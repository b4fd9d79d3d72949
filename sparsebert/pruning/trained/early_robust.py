"""EarlyRobust: heads and units that an adversarial training shows early, then trained from the pretrained weights. [Xi
et al. 2022]
"""

from __future__ import annotations

from pydantic import Field

from sparsebert.config import Positive
from sparsebert.pruning.trained.bag_of_tricks import StructuredConfig, gone
from sparsebert.pruning.trained.method import (
    Floats,
    RewoundTicketConfig,
    Start,
    Trained,
    passes_with_search,
    require_unstructured,
)

SEARCH = 0.2


class EarlyRobustConfig(RewoundTicketConfig, StructuredConfig):
    """The flags of early robust tickets."""

    mask_distance: Positive = Field(
        0.1, le=1, description="the search is over when a mask differs from the next five in less than this share"
    )


def _hook(start: Start):
    from sparsebert.training.structures import EarlyTicket

    config = start.config
    return EarlyTicket(
        start.model, gone(start.model, config, start.sparsity), rewound=start.rewound, search=config.search or SEARCH,
        distance=config.mask_distance, warmup=config.warmup,
    )  # fmt: skip


METHOD = Trained(
    "early-robust",
    EarlyRobustConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=scores, learning=parameters),
    check=require_unstructured,
    rewinds="during",
    rewinds_to="pretrained",
    passes=lambda config: passes_with_search(config, SEARCH),
    zeros=lambda model, config, sparsity: gone(model, config, sparsity).zeros,
)
