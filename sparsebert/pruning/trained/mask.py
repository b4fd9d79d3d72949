"""Mask training over frozen weights. [Liu et al. 2022, Alg. 2]"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsebert.patterns import Grouped, Pattern
from sparsebert.pruning.trained.method import LR, Floats, RisingConfig, Start, Trained, require_rising

# The paper's mask training on MNLI: 5 epochs of 392,702 examples in batches of 32 at this learning rate. Scores walk at
# random as far as lr √steps, there .012, about the distance 0.01 that they begin from the threshold; runs of other
# lengths keep that. In proportion to the steps instead, 600 steps on MNLI ended at chance.
STEPS = 61_360


class MaskConfig(RisingConfig):
    """The flags of mask training."""

    rewind: str | None = Field(
        None, description="afterwards put the found zeros into these weights instead: pretrained, or a DIR"
    )
    init: Literal["hard", "soft"] | None = Field(
        None,
        description="scores begin as kept or not, or as |w| [default: hard; soft where the sparsity rises]",
    )


def _hook(start: Start):
    from sparsebert.training.masks import MaskTraining

    config = start.config
    fixed = config.gradual is None or config.gradual == start.sparsity
    init, head = config.init or ("hard" if fixed else "soft"), config.head == "masked"
    return MaskTraining(start.model, start.pattern, start.sparsity, init=init, head=head, **config.schedule)


def _by_pattern(pattern: Pattern) -> dict:
    # Fixed, a mask of 32x1 over frozen weights ended 14 points lower on MNLI (bench/results/srnets.md).
    return {"gradual": 0.0} if isinstance(pattern, Grouped) else {}


METHOD = Trained(
    "mask",
    MaskConfig,
    _hook,
    floats=lambda scores, parameters: Floats(beside=scores, learning=scores),
    check=require_rising,
    by_pattern=_by_pattern,
    lr=lambda steps: LR * (STEPS / steps) ** 0.5,
    rewinds="after",
)
