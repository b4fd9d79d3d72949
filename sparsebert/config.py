"""The flags of the command line: a field of a class here is one flag, one help line and one default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGE = 2**31  # above it a count is a slip of the finger
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=LARGE)]


class TrainConfig(BaseModel):
    """How a classifier is fine-tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Positive = Field(3.0, lt=1e6, description="passes over the training examples; may be a fraction")
    lr: Positive = Field(5e-5, description="peak learning rate of AdamW; linear warm-up, then linear decay to 0")
    batch_size: Count = Field(32, description="examples a step, of similar length")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="AdamW weight decay, not on biases and layer norms"
    )
    clip: Positive = Field(1.0, description="largest gradient norm")
    n: int | None = Field(
        None, ge=1, lt=LARGE, description="train on a seeded subset of this many examples [default: all]"
    )
    seed: Seed = Field(0, description="seed of the new head, the order and the dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast where the CPU multiplies bf16, else fp32"
    )


class PruneConfig(BaseModel):
    """How a classifier is pruned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field("adaptive", description="pruning method: adaptive or magnitude")
    sparsity: float = Field(0.875, ge=0, lt=1, description="share of zeros in every encoder linear, 0 <= s < 1")
    pattern: str = Field("unstructured", description="where zeros may be: unstructured")
    calibration: Count = Field(4096, description="unlabelled training sentences the method may look at")
    damping: Positive = Field(
        1e-2, description="ridge of the least squares, times the mean diagonal of the Gram matrix"
    )
    seed: Seed = Field(0, description="seed of the choice of calibration sentences")


class EvalConfig(BaseModel):
    """What an evaluation is run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int | None = Field(
        None, ge=1, lt=LARGE, description="a seeded random subset of this many examples [default: all]"
    )
    seed: Seed = Field(0, description="seed of the subset")


class BenchConfig(BaseModel):
    """How the engine is timed against its rivals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("mr", description="task whose test sentences give the mix of lengths")
    n: Count = Field(128, description="sentences a round")
    batch: Count = Field(1, description="sentences a call")
    rounds: Count = Field(7, description="rounds, the candidates in turn; an interval needs 6")
    threads: int | None = Field(None, ge=1, le=1024, description="threads of every candidate [default: all cores]")
    seed: Seed = Field(0, description="seed of the choice of sentences")


class DemoConfig(BaseModel):
    """The demo's sizes; the defaults are the full demo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Positive = Field(2.0, lt=1e6, description="passes over the training sentences")
    train_n: int | None = Field(None, ge=1, lt=LARGE, description="training sentences [default: all]")
    test_n: int | None = Field(None, ge=1, lt=LARGE, description="test sentences [default: all]")
    calibration: int | None = Field(None, ge=1, lt=LARGE, description="calibration sentences [default: as `prune`]")
    bench_n: Count = Field(64, description="sentences in a timing round")
    rounds: int | None = Field(None, ge=1, lt=LARGE, description="timing rounds [default: as `bench`]")
    threads: int | None = Field(None, ge=1, le=1024, description="threads for the timing [default: all cores]")
    seed: Seed = Field(0, description="seed of everything random")
