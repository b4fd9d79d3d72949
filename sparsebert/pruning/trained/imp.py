"""Iterative magnitude pruning, without and with rewinding. [Liu et al. 2022, Alg. 1; Frankle & Carbin 2019]"""

from __future__ import annotations

from pydantic import Field

from sparsebert.errors import InputError
from sparsebert.patterns import Pattern
from sparsebert.pruning.trained.method import Floats, HeadConfig, Start, Trained


class RewoundConfig(HeadConfig):
    """The flags of magnitude pruning with rewinding."""

    rewind: str | None = Field(None, description="to what it rewinds: pretrained, or a DIR [default: its start]")


def _hook(start: Start, rewound=None):
    from sparsebert.training.imp import MagnitudePruning

    head, warmup = start.config.head == "masked", start.config.warmup
    return MagnitudePruning(
        start.model, start.pattern, start.sparsity, rewind_to=rewound, head=head, warmup=warmup
    )  # fmt: skip


def _require_last(config: RewoundConfig, pattern: Pattern, sparsity: float) -> None:
    if config.select == "best":
        raise InputError("imp-rw ends with untrained weights, so there is nothing to select", fix="leave --select out")


METHOD = Trained("imp", HeadConfig, _hook, floats=lambda scores, parameters: Floats(beside=0, learning=parameters))
REWOUND = Trained(
    "imp-rw",
    RewoundConfig,
    lambda start: _hook(start, start.rewound()),
    floats=lambda scores, parameters: Floats(beside=parameters, learning=parameters),
    check=_require_last,
    rewinds="during",
    selects=False,
)
