"""What a method that trains with labels says of itself. Imports no torch: the command line reads flags from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from sparsebert.config import LearnConfig, Positive, PruneConfig
from sparsebert.errors import InputError
from sparsebert.patterns import Pattern

if TYPE_CHECKING:
    import torch

    from sparsebert.training.loop import Hook

LR = 5e-5


class TrainedConfig(LearnConfig):
    """The flags of every such method. A method's own are the further fields of its own class."""

    epochs: Positive = Field(5.0, lt=1e6, description="passes over the training examples; may be a fraction")
    lr: Positive | None = Field(None, description="peak learning rate [default: 5e-5; mask 5e-5 sqrt(61360 / steps)]")
    start: str | None = Field(
        None,
        description="weights to start from: pretrained (the encoder that DIR was fine-tuned from, with a new head), or "
        "another DIR, such as one of `train --keep` [default: those of DIR]",
    )
    head: Literal["masked", "dense"] = Field(
        "masked", description="pooler and classifier (imp: pooler): pruned as the encoder's linears are, or left dense"
    )


class RisingConfig(TrainedConfig):
    """The flags of a method whose sparsity may rise while it trains."""

    gradual: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="sparsity to begin with, from where it rises to --sparsity by a cubic [default: mask --sparsity, "
        "of groups of rows 0; soft-movement 0]",
    )
    update_every: float = Field(0.016, gt=0, le=1, description="share of the run after which thresholds are set anew")
    settle: float = Field(
        0.7, ge=0, le=1, description="share of the run after which --gradual has arrived and `best` may be chosen"
    )

    @property
    def schedule(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("gradual", "update_every", "settle")}


def require_rising(config: RisingConfig, sparsity: float) -> None:
    """InputError where the sparsity would fall."""
    if config.gradual is not None and config.gradual > sparsity:
        raise InputError(
            f"a mask's sparsity must not fall, got --gradual {config.gradual:g} to --sparsity {sparsity:g}",
            fix="begin with a lower one",
        )


class Start(NamedTuple):
    """What a hook is made of. config: of the method's own class. rewound: the parameters, by name, to which a method
    goes back while it trains; for no other method.
    """

    model: Any
    pattern: Pattern
    sparsity: float
    config: Any
    rewound: Callable[[], dict[str, torch.Tensor]]


class Floats(NamedTuple):
    """What a run holds in memory. beside: beside the model; learning: of which there are gradients and moments."""

    beside: int
    learning: int


@dataclass(frozen=True)
class Trained:
    """One method that trains with labels.

    config: its flags. hook: what it does around the steps of the training loop; `fold` ends it. floats: of a model's
    prunable (scores) and all parameters. check: (config, sparsity), raises InputError for settings that no run can
    have, before anything is read. by_pattern: fields that it sets where the user has not. lr: the default peak learning
    rate for a number of steps. rewinds: whether --rewind is gone back to during the run, or the zeros found are put
    there afterwards, from the hook's `keeps`. selects: whether weights of before the end may be kept (--select best).
    """

    name: str
    config: type[TrainedConfig]
    hook: Callable[[Start], Hook]
    floats: Callable[[int, int], Floats]
    check: Callable[[Any, float], None] = lambda config, sparsity: None
    by_pattern: Callable[[Pattern], dict] = lambda pattern: {}
    lr: Callable[[int], float] = lambda steps: LR
    rewinds: Literal["during", "after"] | None = None
    selects: bool = True

    @property
    def flags(self) -> set[str]:
        """Those that a method without labels does not have."""
        return self.config.model_fields.keys() - PruneConfig.model_fields.keys()
