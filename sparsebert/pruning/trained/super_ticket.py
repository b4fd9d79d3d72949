"""SuperTicket: heads and feed-forward layers by sensitivity, then trained from the pretrained weights. [Liang et al.
2021]
"""

from __future__ import annotations

from sparsebert.pruning.trained.method import Floats, RewoundTicketConfig, Start, Trained, require_unstructured


def _hook(start: Start):
    from sparsebert.training.structures import SensitiveTicket, removed

    config = start.config
    chosen = {} if config.search is None else {"search": config.search}
    gone = removed(start.model, start.sparsity, whole=True)
    return SensitiveTicket(start.model, gone, whole=True, rewound=start.rewound, warmup=config.warmup, **chosen)


def _zeros(model, config: RewoundTicketConfig, sparsity: float) -> int:
    from sparsebert.training.structures import removed

    return removed(model, sparsity, whole=True).zeros


METHOD = Trained(
    "super-ticket",
    RewoundTicketConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=scores, learning=parameters),
    check=require_unstructured,
    rewinds="during",
    rewinds_to="pretrained",
    zeros=_zeros,
)
