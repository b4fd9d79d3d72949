"""Mask training over frozen weights. [Liu et al. 2022, Alg. 2]"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsebert.patterns import Grouped, Pattern
from sparsebert.pruning.trained.method import LR, Floats, RisingConfig, Start, Trained, require_rising

# Steps of the paper's mask training on MNLI: 5 epochs of 392,702 examples in batches of 32, at learning rate LR. Scores
# walk at random over a distance of about lr √steps. There that is 0.012, close to their initial distance from the
# threshold, 0.01. Runs of other lengths keep lr √steps. With lr in proportion to 1 / steps instead, 600 steps on MNLI
# ended at chance.
STEPS = 61_360


class MaskConfig(RisingConfig):
    """The flags of mask training."""

    rewind: str | None = Field(
        None, description="put the zeros that were found into other weights: pretrained, or a DIR [default: do not]"
    )
    init: Literal["hard", "soft"] | None = Field(
        None,
        description="scores at the start: hard (one value for kept, one for pruned) or soft (by |w|) [default: hard; "
        "soft if the sparsity rises]",
    )


def _hook(start: Start):
    from sparsebert.training.masks import MaskTraining

    config = start.config
    fixed = config.gradual is None or config.gradual == start.sparsity
    init, head = config.init or ("hard" if fixed else "soft"), config.head == "masked"
    return MaskTraining(start.model, start.pattern, start.sparsity, init=init, head=head, **config.schedule)


def _by_pattern(pattern: Pattern) -> dict:
    # At a fixed sparsity, a 32x1 mask over frozen weights ended 14 points lower on MNLI (bench/results/srnets.md).
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
