"""Every setting in one place: the environment variables, and the fields that are flags of the command line.

A field of a config class is one flag, one help line and one default (`sparsebert.cli` builds the flags from here).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sparsebert.errors import InputError

ISAS = ("scalar", "avx2", "avx512")  # slowest first; a cap allows everything up to it


def isa_cap() -> str | None:
    """SPARSEBERT_ISA: the best instruction set the kernels may use; None when unset."""
    value = os.environ.get("SPARSEBERT_ISA")
    if not value:
        return None
    if value not in ISAS:
        raise InputError(
            f"SPARSEBERT_ISA must be one of {', '.join(ISAS)}, got {value!r}", fix="unset it or use one of these"
        )
    return value


def data_dir() -> Path | None:
    """SPARSEBERT_DATA: a folder with one sub-folder a task, one parquet file a split; None when unset."""
    value = os.environ.get("SPARSEBERT_DATA")
    return Path(value) if value else None


def cache_dir() -> Path:
    """SPARSEBERT_CACHE, else the user cache directory: derived files that are safe to delete."""
    value = os.environ.get("SPARSEBERT_CACHE")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebert"


class TrainConfig(BaseModel):
    """How a classifier is fine-tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(3.0, gt=0, description="passes over the training examples; may be a fraction")
    lr: float = Field(5e-5, gt=0, description="peak learning rate of AdamW; linear warm-up, then linear decay to 0")
    batch_size: int = Field(32, ge=1, description="examples a step, of similar length")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay, not on biases and layer norms")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    n: int | None = Field(None, ge=1, description="train on a seeded subset of this many examples [default: all]")
    seed: int = Field(0, ge=0, description="seed of the new head, the order and the dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast where the CPU multiplies bf16, else fp32"
    )


class PruneConfig(BaseModel):
    """How a classifier is pruned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field("adaptive", description="pruning method: adaptive or magnitude")
    sparsity: float = Field(0.875, ge=0, lt=1, description="share of zeros in every encoder linear, 0 <= s < 1")
    pattern: str = Field("unstructured", description="where zeros may be: unstructured")
    calibration: int = Field(2048, ge=1, description="unlabelled training sentences the method may look at")
    damping: float = Field(
        1e-2, gt=0, description="ridge of the least squares, times the mean diagonal of the Gram matrix"
    )
    seed: int = Field(0, ge=0, description="seed of the choice of calibration sentences")


class EvalConfig(BaseModel):
    """What an evaluation is run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int | None = Field(None, ge=1, description="a seeded random subset of this many examples [default: all]")
    seed: int = Field(0, ge=0, description="seed of the subset")


class BenchConfig(BaseModel):
    """How the engine is timed against its rivals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("mr", description="task whose test sentences give the mix of lengths")
    n: int = Field(128, ge=1, description="sentences a round")
    batch: int = Field(1, ge=1, description="sentences a call")
    rounds: int = Field(7, ge=1, description="rounds; the candidates run in turn within each")
    threads: int | None = Field(None, ge=1, description="threads of every candidate [default: all cores]")
    seed: int = Field(0, ge=0, description="seed of the choice of sentences")


class DemoConfig(BaseModel):
    """The demo's sizes; the defaults are the full demo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(2.0, gt=0, description="passes over the training sentences")
    train_n: int | None = Field(None, ge=1, description="training sentences [default: all]")
    test_n: int | None = Field(None, ge=1, description="test sentences [default: all]")
    calibration: int = Field(2048, ge=1, description="unlabelled sentences the adaptive method may look at")
    sparsity: float = Field(0.875, ge=0, lt=1, description="share of zeros in every encoder linear")
    bench_n: int = Field(64, ge=1, description="sentences in a timing round")
    rounds: int = Field(7, ge=1, description="timing rounds")
    threads: int | None = Field(None, ge=1, description="threads for the timing [default: all cores]")
    seed: int = Field(0, ge=0, description="seed of everything random")
