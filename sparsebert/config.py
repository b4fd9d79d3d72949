"""The flags of the command line: a field of a class here is one flag, one help line and one default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsebert.errors import InputError

LARGE = 2**31  # above it a count is a slip of the finger
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=LARGE)]
MaxLength = Annotated[int | None, Field(ge=3, lt=LARGE)]
MAX_LENGTH = "tokens kept of a text [default: what the task needs, of own files as many as the model takes]"


class LearnConfig(BaseModel):
    """How anything is learnt from labelled examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: Literal["ce", "poe", "reweight", "reweight-mean", "confreg"] = Field(
        "ce",
        description="cross-entropy, or one that learns less from what a bias model knows: product of experts, "
        "reweighting (by the batch's weights, or reweight-mean by its size), confidence regularisation",
    )
    bias: str = Field(
        "auto",
        description="the bias model: auto (the task's own), overlap, claim, weak (2,000 examples, no features), the "
        "DIR of a classifier that saw none of the examples, or a .npy of log probabilities",
    )
    teacher: str | None = Field(
        None,
        description="confreg: DIR of a model trained by cross-entropy [default: trained first, into OUTPUT.teacher]",
    )
    epochs: Positive = Field(3.0, lt=1e6, description="passes over the training examples; may be a fraction")
    steps: int | None = Field(None, ge=1, lt=LARGE, description="optimizer steps, in place of --epochs")
    lr: Positive = Field(5e-5, description="peak learning rate; linear warm-up, then linear decay to 0")
    batch_size: Count = Field(32, description="examples a step, of similar length")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="weight decay, not on biases and layer norms"
    )
    clip: Positive = Field(1.0, description="largest gradient norm")
    n: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="train on a seeded subset of this many examples [default: all]",
        json_schema_extra={"flags": ["--n", "--limit"]},
    )
    mix_ood: bool = Field(
        False, description="add the training examples of the task's out-of-distribution tests: an upper bound"
    )
    hold_out: int = Field(
        0, ge=0, lt=LARGE, description="training examples left out, the same for every seed, to choose on"
    )
    select: Literal["last", "best"] = Field(
        "last", description="weights kept: the last ones, or those most accurate on the held-out examples"
    )
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    seed: Seed = Field(0, description="seed of the new head, the order and the dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast where it is fast, else fp32"
    )


class TrainConfig(LearnConfig):
    """How a classifier is fine-tuned."""

    keep: str = Field("", description="shares of the run, with commas, after which OUTPUT-at-SHARE is also saved")
    optimizer: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="adamw, adam (weight decay in the gradient) or sgd (no momentum)"
    )
    adversarial: Literal["none", "freelb", "last-layer"] = Field(
        "none", description="train on perturbed embeddings (freelb), or perturbed inputs of the last layer (cheap)"
    )
    ascent_steps: Count = Field(5, description="adversarial: gradient steps of the perturbation a batch")
    ascent_size: Positive = Field(0.03, description="adversarial: length of such a step at each token")


class PruneConfig(BaseModel):
    """How a classifier is pruned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(
        "knowledge",
        description="pruning method: knowledge, adaptive, obs, sparsegpt, wanda or magnitude, or one with labels",
    )
    tier: int | None = Field(
        None, ge=0, le=2, description="knowledge: 0 closed form, 1 gradients and allocation, 2 distillation [1]"
    )
    without: str = Field("", description="knowledge: steps to leave out, separated by commas")
    as_published: bool = Field(False, description="adaptive: what the authors' released code does, bugs included")
    scope: Literal["local", "global"] = Field("local", description="magnitude: compare within a linear, or all at once")
    sparsity: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of zeros in the encoder linears, 0 <= s < 1 [default: 0.875, or the pattern's]",
    )
    pattern: str = Field("unstructured", description="where zeros may be: unstructured, 2:4, 32x1, 32x1/32, 64:2:16, …")
    calibration: tuple[str, ...] = Field(
        (),
        description="texts to calibrate on beside the task's, so that the model is kept on others too: files (.txt, "
        ".csv, .tsv, .jsonl, .parquet; the flag may be repeated), general (packaged) or none [default: general]",
    )
    calibration_tokens: Count = Field(250_000, description="tokens of unlabelled texts to calibrate on")
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    damping: Positive | None = Field(
        None,
        description="ridge of the least squares, times the mean diagonal of the Gram matrix [default: the method's]",
    )
    seed: Seed = Field(0, description="seed of the choice of calibration texts, and of all else that is random")


class EvalConfig(BaseModel):
    """What an evaluation is run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    ood: str | None = Field(
        None, description="also evaluate on these out-of-distribution tests of the task, with commas, or all"
    )
    n: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="a seeded random subset of this many examples, of each OOD test too [default: all]",
    )
    seed: Seed = Field(0, description="seed of the subsets")


class BenchConfig(BaseModel):
    """How the engine is timed against its rivals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("mr", description="task whose test sentences give the mix of lengths")
    seq: str = Field("mix", pattern=r"^(mix|[1-9]\d{0,3})$", description="tokens of every text, or mix: the task's own")
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    n: Count = Field(128, description="texts a round")
    batch: Count = Field(1, description="texts a call")
    rounds: Count = Field(7, description="rounds, the engines in turn; an interval needs 6")
    threads: int | None = Field(None, ge=1, le=1024, description="threads of every engine [default: all cores]")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of our engine; auto: what the checkpoint declares"
    )
    rivals: str = Field("torch", description="engines to compare with, with commas: torch, torch-bf16, onnxruntime, …")
    deepsparse_python: str | None = Field(
        None, description="python of the environment that has deepsparse 1.8.0, for the rival deepsparse"
    )
    seed: Seed = Field(0, description="seed of the choice of texts")
    random: Literal["minilm", "bert-base", "bert-large", "roberta-base"] | None = Field(
        None, description="time random weights of this shape, in place of DIR"
    )
    pattern: str = Field("unstructured", description="of random weights: unstructured, 2:4, 16x1, 32x1, …")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="of random weights [default: the one the pattern implies, or 0.875]"
    )


class DemoConfig(BaseModel):
    """The demo's sizes; the defaults are the full demo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Positive = Field(2.0, lt=1e6, description="passes over the training sentences")
    train_n: int | None = Field(None, ge=1, lt=LARGE, description="training sentences [default: all]")
    test_n: int | None = Field(None, ge=1, lt=LARGE, description="test sentences [default: all]")
    calibration_tokens: int | None = Field(
        None, ge=1, lt=LARGE, description="tokens to calibrate on [default: as `prune`]"
    )
    bench_n: Count = Field(64, description="sentences in a timing round")
    rounds: int | None = Field(None, ge=1, lt=LARGE, description="timing rounds [default: as `bench`]")
    threads: int | None = Field(None, ge=1, le=1024, description="threads for the timing [default: all cores]")
    seed: Seed = Field(0, description="seed of everything random")


def validated(config_class: type[BaseModel], fields: dict, where: str = "", fix: str | None = None) -> BaseModel:
    """`config_class(**fields)`, pydantic's complaint turned into one line. where: of a file and its part, with a colon.
    fix: None for a flag's.
    """
    try:
        return config_class(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Input should be ")
        wrong = f"{name} must be {rule}" if rule != first["msg"] else f"{name}: {rule}"
        raise InputError(
            f"{where}{wrong}, got {first['input']!r}", fix=fix or f"correct --{name.replace('_', '-')}"
        ) from error
