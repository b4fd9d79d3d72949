"""The parts of a method that trains with labels. Imports no torch, because the command line reads flags from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from sparsebert.config import LearnConfig, Positive, PruneConfig
from sparsebert.errors import InputError
from sparsebert.patterns import Pattern, Unstructured

if TYPE_CHECKING:
    import torch

    from sparsebert.training.loop import Hook

LR = 5e-5


class TrainedConfig(LearnConfig):
    """The flags that all of these methods have. A method with more flags has a subclass with more fields."""

    heading: ClassVar[str] = "Options of the methods that train with labels"

    epochs: Positive = Field(5.0, lt=1e6, description="passes over the training examples, such as 3 or 0.5")
    lr: Positive | None = Field(
        None, description="peak learning rate [default: 5e-5; for mask 5e-5 × √(61360 / steps)]"
    )
    start: str | None = Field(
        None,
        description="weights to start from: pretrained (the encoder that DIR was fine-tuned from, with a new head), or "
        "another DIR, such as one that train --keep saved [default: the weights of DIR]",
    )


class HeadConfig(TrainedConfig):
    """The flags of a method that may prune the head too."""

    head: Literal["masked", "dense"] = Field(
        "masked",
        description="also prune the pooler and the classifier (masked; for imp, imp-rw, robust-ticket and rmc the "
        "pooler alone), or neither (dense)",
    )


class RisingConfig(HeadConfig):
    """The flags of a method whose sparsity may rise while it trains."""

    gradual: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="sparsity at the start; it rises from there to --sparsity, quickly at first (a cubic) [default: "
        "for mask --sparsity, but 0 if the pattern is groups of rows; for soft-movement 0]",
    )
    update_every: float = Field(
        0.016, gt=0, le=1, description="how often the mask is chosen again, as a share of all steps"
    )
    settle: float = Field(
        0.7,
        ge=0,
        le=1,
        description="share of all steps after which the sparsity is --sparsity, and --select best may choose",
    )

    @property
    def schedule(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("gradual", "update_every", "settle")}


class TicketConfig(TrainedConfig):
    """The flags of a method that searches for a ticket and then trains it."""

    search: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the steps that the search takes [default: for robust-ticket 0.5, super-ticket and "
        "bag-of-tricks 0.1; for early-robust, where it may end earlier, 0.2]",
    )


class RewoundTicketConfig(TicketConfig):
    """The flags of such a method that trains the ticket from earlier weights."""

    rewind: str | None = Field(
        None, description="weights that the ticket is trained from: pretrained, or a DIR [default: pretrained]"
    )


def require_rising(config: RisingConfig, pattern: Pattern, sparsity: float) -> None:
    """InputError if the sparsity would fall."""
    if config.gradual is not None and config.gradual > sparsity:
        raise InputError(
            f"a mask's sparsity must not fall, got --gradual {config.gradual:g} to --sparsity {sparsity:g}",
            fix="lower --gradual",
        )


class Start(NamedTuple):
    """What a hook is made from. config: of the method's config class. rewound: returns the parameters, by name, that a
    method goes back to while it trains; only for a method that rewinds "during" its run.
    """

    model: Any
    pattern: Pattern
    sparsity: float
    config: Any
    rewound: Callable[[], dict[str, torch.Tensor]]


def require_unstructured(config: TrainedConfig, pattern: Pattern, sparsity: float) -> None:
    """InputError for a pattern: tickets are unstructured, or whole heads and units."""
    if not isinstance(pattern, Unstructured):
        raise InputError(f"a ticket is unstructured or whole heads and units, got {pattern}", fix="leave --pattern out")


class Floats(NamedTuple):
    """Numbers of floats that a run holds in memory. beside: beside the model; learning: with gradients and moments."""

    beside: int
    learning: int


def passes(config: TrainedConfig) -> float:
    """Forward and backward passes per step of a run that learns as its flags say."""
    return config.ascent_steps if config.adversarial == "freelb" else 1.0


def passes_with_search(config: TicketConfig, search: float) -> float:
    """Likewise of a ticket whose search is under attack. search: the default share of the steps."""
    share = config.search or search
    return share * config.ascent_steps + (1 - share) * passes(config)


@dataclass(frozen=True)
class Trained:
    """One method that trains with labels.

    config: the class of its flags. hook: makes the hook around the steps of the training loop; the hook's `fold` ends
    the training. floats: from the number of scores (one per weight, or per group of weights) and of all parameters of a
    model. check: (config, pattern, sparsity), raises InputError for settings that no run can have, before anything is
    read. by_pattern: values of the fields that the user has not set. lr: the default peak learning rate, from the
    number of steps. rewinds: "during": the run goes back to the weights of --rewind; "after": the zeros of the hook's
    `keeps` are put into these weights at the end; None: no --rewind. rewinds_to: these weights, unless --rewind names
    others; None: those of the start. selects: whether weights from before the end may be kept (--select best). passes:
    forward and backward passes per step, mean over the run. loss: what it learns by in place of --loss, from the model
    that is pruned as teacher if --teacher names no other. rounds: whether it ends with rounding to int8. zeros: (model,
    config, sparsity), the number of zeros that are made; None: what the pattern gives.
    """

    name: str
    config: type[TrainedConfig]
    hook: Callable[[Start], Hook]
    floats: Callable[[int, int], Floats]
    check: Callable[[Any, Pattern, float], None] = lambda config, pattern, sparsity: None
    by_pattern: Callable[[Pattern], dict] = lambda pattern: {}
    lr: Callable[[int], float] = lambda steps: LR
    rewinds: Literal["during", "after"] | None = None
    rewinds_to: Literal["pretrained"] | None = None
    selects: bool = True
    passes: Callable[[Any], float] = passes
    zeros: Callable[[Any, Any, float], int] | None = None
    loss: str | None = None
    rounds: bool = False

    @property
    def flags(self) -> set[str]:
        """The flags that a method without labels does not have."""
        return self.config.model_fields.keys() - PruneConfig.model_fields.keys()
