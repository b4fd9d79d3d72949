"""Bag of tricks: pruning of heads and units, distillation, and rounding to int8 after training. [Xu et al. 2021]"""

from __future__ import annotations

from pydantic import Field

from sparsebert.pruning.trained.method import Floats, Start, TicketConfig, Trained, require_unstructured


class StructuredConfig(TicketConfig):
    """The flags of a ticket of heads and units."""

    heads: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the attention heads that go; units make up the rest [default: --sparsity]",
    )


def gone(model, config: StructuredConfig, sparsity: float):
    """The `structures.Removed` of a model at a sparsity."""
    from sparsebert.training.structures import removed

    return removed(model, sparsity, heads=config.heads)


def _hook(start: Start):
    from sparsebert.training.structures import SensitiveTicket

    config = start.config
    chosen = {} if config.search is None else {"search": config.search}
    return SensitiveTicket(
        start.model, gone(start.model, config, start.sparsity), rewound=None, warmup=config.warmup, **chosen
    )


METHOD = Trained(
    "bag-of-tricks",
    StructuredConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=scores, learning=parameters),
    check=require_unstructured,
    zeros=lambda model, config, sparsity: gone(model, config, sparsity).zeros,
    loss="distill",
    rounds=True,
)
