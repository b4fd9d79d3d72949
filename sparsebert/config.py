"""The flags of the command line: a field of a class here is one flag, one help line and one default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparsebert.errors import InputError

LARGE = 2**31  # a larger count is a typing error
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=LARGE)]
MaxLength = Annotated[int | None, Field(ge=3, lt=LARGE)]
MAX_LENGTH = "max tokens per text; the rest is cut [default: the task's, and for your own files the model's]"


CALIBRATION = Field(
    (),
    description="unlabelled texts beside the task's, so that the model stays close to the one it is made from on them "
    "too: FILE (.txt, .csv, .tsv, .jsonl, .parquet), general (packaged sentences) or none; may be repeated "
    "[default: general]",
)
CALIBRATION_TOKENS = Field(250_000, description="number of tokens to calibrate on; more is slower and a little better")


Device = Literal["auto", "cpu", "cuda"]
DEVICE = Field(
    "auto",
    description="what to run on: cpu; cuda, the current NVIDIA GPU; auto: cuda if a GPU can be used (see sparsebert "
    "doctor), else cpu",
)


class Settings(BaseModel):
    """Checked settings that do not change. heading: that of their flags in --help, beside those of another class.
    variables: what the names of environment variables begin with that stand for their flags; None: there are none.
    """

    heading: ClassVar[str] = ""
    variables: ClassVar[str | None] = None

    # defer_build: what checks them is built on first use; --help does not need it.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class TaskConfig(Settings):
    """A task and, if it is a file or folder of the user's own, its columns. Wherever a task is asked for, its name
    alone will do too.
    """

    task: str = Field(
        description="a file of your own (.csv, .tsv, .jsonl, .parquet), a folder with train and test files, or a task "
        "name"
    )
    text_column: tuple[str, ...] = Field(
        (),
        description="name of the column of texts in your own files; for pairs give the flag twice, the first text "
        "first [default: text, text_b, or usual other names]",
    )
    label_column: str | None = Field(None, description="name of the column of labels in them [default: label]")

    @field_validator("text_column", mode="before")
    @classmethod
    def _one_or_two(cls, named):
        return (named,) if isinstance(named, str) else named

    @classmethod
    def of(cls, task: str | Path | TaskConfig) -> TaskConfig:
        """The task that is called by its name, or that comes with its columns."""
        return task if isinstance(task, cls) else cls(task=str(task))


class LearnConfig(Settings):
    """Settings of all training with labels."""

    loss: Literal["ce", "poe", "reweight", "reweight-mean", "confreg", "distill", "rmc"] = Field(
        "ce",
        description="ce: cross-entropy. Debiased losses, which learn less from what a bias model already predicts: poe "
        "(product of experts), reweight (over the sum of the batch's weights), reweight-mean (over the batch size), "
        "confreg (confidence regularisation). Distillation: distill (from a teacher), rmc (from a teacher that is less "
        "sure where examples are easy)",
    )
    bias: str = Field(
        "auto",
        description="bias model for a debiased loss: auto (the task's), overlap (word overlap), claim (the claim "
        "alone), weak (this encoder trained on 2,000 examples), the DIR of a classifier that saw none of the examples, "
        "or a .npy file of log probabilities",
    )
    teacher: str | None = Field(
        None,
        description="for confreg, distill and rmc: DIR of a model trained with ce [default: one is trained first, into "
        "OUTPUT.teacher; of the methods rmc and bag-of-tricks the model that is pruned]",
    )
    difficulty_floor: float = Field(
        0.5,
        ge=0,
        le=1,
        description="for rmc: difficulty of the easiest example: 0, the teacher is flat there, to 1, all are equal",
    )
    epochs: Positive = Field(3.0, lt=1e6, description="passes over the training examples, such as 3 or 0.5")
    steps: int | None = Field(None, ge=1, lt=LARGE, description="number of optimizer steps, instead of --epochs")
    lr: Positive = Field(
        5e-5, description="peak learning rate; it rises linearly during warm-up, then falls linearly to 0"
    )
    batch_size: Count = Field(32, description="examples per step")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="weight decay; biases and layer norms have none"
    )
    clip: Positive = Field(1.0, description="max norm of the gradient; a longer one is scaled down")
    n: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="train on a random subset of this many examples, chosen by --seed [default: all]",
        json_schema_extra={"flags": ["--n", "--limit"]},
    )
    mix_ood: bool = Field(
        False,
        description="also train on examples like those of the task's out-of-distribution tests: an upper bound",
    )
    hold_out: int = Field(
        0, ge=0, lt=LARGE, description="training examples that are set aside to choose on, the same for every --seed"
    )
    select: Literal["last", "best"] = Field(
        "last",
        description="last: keep the last weights. best: keep those with the best score on the --hold-out examples",
    )
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    seed: Seed = Field(0, description="random seed: of a new head, the order of the examples, the dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: products in bfloat16 (autocast). auto: bf16 if it is fast on the device, else fp32",
    )
    adversarial: Literal["none", "freelb", "last-layer"] = Field(
        "none",
        description="adversarial training: freelb perturbs the embeddings, last-layer the last layer's input (cheaper)",
    )
    ascent_steps: Count = Field(5, description="for --adversarial: gradient ascent steps per batch")
    ascent_size: Positive | None = Field(
        None, description="for --adversarial: length of an ascent step [default: 0.03; in early-robust's search 0.01]"
    )
    ascent_norm: Literal["token", "text"] = Field(
        "token", description="for --adversarial: whether each token moves by --ascent-size, or each text as a whole"
    )
    ascent_start: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="for --adversarial: bound of the random perturbation that the ascent starts from; 0.05 in FreeLB "
        "as first published, with --ascent-norm text",
    )
    device: Device = DEVICE


class TrainConfig(LearnConfig):
    """Settings of fine-tuning."""

    keep: str = Field(
        "", description="also save the model after these shares of the steps, as OUTPUT-at-SHARE, for example 0.25,0.5"
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="adamw, adam (weight decay is part of the gradient) or sgd (without momentum)"
    )


class PruneConfig(Settings):
    """Settings of pruning."""

    method: str = Field(
        "knowledge",
        description="without labels: knowledge, adaptive, obs, sparsegpt, wanda, magnitude; by training with labels: "
        "mask, imp, imp-rw, soft-movement, robust-ticket, super-ticket, early-robust, rmc, bag-of-tricks",
    )
    tier: int | None = Field(
        None,
        ge=0,
        le=2,
        description="for knowledge: 0 is fastest, 1 takes about three times as long and stays nearer to the dense "
        "model, 2 adds distillation: about five times [default: 1]",
    )
    without: str = Field(
        "",
        description="for knowledge: steps to leave out, with commas: target, cluster, admm, refit, cls, heads; of tier "
        "1 also outputs, allocation; of tier 2 also distill, perturb",
    )
    as_published: bool = Field(
        False, description="for adaptive: do what the authors' released code does, its bugs included"
    )
    scope: Literal["local", "global"] = Field(
        "local", description="for magnitude: compare weights within each linear (local), or across all of them (global)"
    )
    sparsity: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of zeros in the encoder's linear layers, from 0 to below 1 [default: 0.875, or what the "
        "pattern implies]",
    )
    pattern: str = Field(
        "unstructured", description="where zeros may be: unstructured; N:M such as 2:4; groups of rows, such as 32x1"
    )
    int8: bool = Field(
        False, description="also round weights and activations to int8, for methods that calibrate on texts"
    )
    calibration: tuple[str, ...] = CALIBRATION
    calibration_tokens: Count = CALIBRATION_TOKENS
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    damping: Positive | None = Field(
        None,
        description="ridge of the least-squares problems, as a share of the mean diagonal of the Gram matrix "
        "[default: the method's]",
    )
    seed: Seed = Field(0, description="random seed: of the choice of calibration texts and all other random choices")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="what to run on: cpu; cuda, the current NVIDIA GPU, where pruning was not run or timed yet"
    )


class BudgetConfig(Settings):
    """A budget that pattern, sparsity and int8 are chosen by."""

    heading: ClassVar[str] = "Budget: instead of --pattern, --sparsity and --int8"

    min_speedup: Positive | None = Field(
        None,
        gt=1,
        description="how many times as fast as the dense model it must be on this machine, one text per call",
    )
    max_robust_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="points of accuracy under attack that it may lose, on training examples that pruning does not see",
    )
    budget_attack: str = Field("textfooler", description="the attack, of sparsebert attack")
    budget_n: int = Field(300, ge=20, lt=LARGE, description="examples that are attacked")


class QuantizeConfig(Settings):
    """Settings of rounding to int8."""

    calibration: tuple[str, ...] = CALIBRATION
    calibration_tokens: Count = CALIBRATION_TOKENS
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    seed: Seed = Field(0, description="random seed of the choice of calibration texts")


# Each has a recipe in robustness/attacks/recipes.py.
ATTACKS = (
    "textfooler", "textfooler-strict", "textbugger", "deepwordbug", "pwws", "pso", "bert-attack", "bae",
    "random-synonym", "transfer",
)  # fmt: skip


class EvalConfig(Settings):
    """Settings of an evaluation."""

    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    ood: str | None = Field(
        None, description="also evaluate on these out-of-distribution tests of the task (names with commas, or all)"
    )
    domains: str | None = Field(
        None,
        description="also evaluate on other sets of the same labels, without texts that the task has too: task names, "
        "files or folders of your own, with commas, or all (tasks whose data are on this machine)",
    )
    texts: tuple[str, ...] = Field(
        (),
        description="also compare with the dense model (--vs) on the unlabelled texts of a file (.txt, .csv, .tsv, "
        ".jsonl, .parquet); may be repeated",
    )
    attacks: str | None = Field(
        None, description=f"also attack it (names with commas: {', '.join(ATTACKS)}), with texts that mean the same"
    )
    match_confidence: bool = Field(
        False,
        description="with --attacks and --vs: divide the model's logits by the number that makes it as confident as "
        "the dense model, as a control: greedy attacks find their way by the confidence",
    )
    n: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="use a random subset of this many examples, of each other set too, chosen by --seed [default: all]",
    )
    seed: Seed = Field(0, description="random seed of the subsets")
    device: Device = DEVICE


class AttackConfig(Settings):
    """Settings of adversarial attacks."""

    heading: ClassVar[str] = "Options of attacks"

    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    n: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="attack a random subset of this many examples, chosen by --seed [default: all]",
    )
    seed: Seed = Field(0, description="random seed of the subset, and of the attacks that draw at random")
    device: Device = DEVICE
    field: Literal["text", "text_b"] | None = Field(
        None, description="which text of a pair is attacked; the other one stays [default: text_b]"
    )
    max_queries: int | None = Field(
        None,
        ge=1,
        lt=LARGE,
        description="texts that an attack may ask the model about, per example [default: no limit]",
    )
    # None or 0: no limit, so that a figure that decides something is the same on a slow or busy machine.
    max_seconds: NotNegative | None = Field(
        60.0,
        description="time that an attack may take per example; it then counts as failed, and is reported as capped; 0: "
        "no limit, as in published tables",
    )
    neighbours: str | None = Field(
        None,
        description="FILE of word vectors, such as counter-fitted-vectors.txt, or of neighbours (JSON, word -> words) "
        "[default: the packaged counter-fitted neighbours, up to 8 per word]",
    )
    sentence_encoder: str = Field(
        "minilm", description="DIR of the sentence encoder that says whether two texts mean the same, or none"
    )
    masked_lm: str | None = Field(
        None, description="DIR of a masked-language model, for the attacks bert-attack and bae"
    )
    stored: str | None = Field(
        None, description="for transfer: FILE.parquet of another model's adversarial texts, from sparsebert attack -o"
    )
    workers: int = Field(1, ge=1, le=256, description="number of processes that attack; they share the cores")
    ray: bool = Field(
        False,
        description="let the processes be actors on a Ray cluster: that of RAY_ADDRESS, else one on this machine; all "
        "nodes must have the model at the same path",
    )
    ledger: str | None = Field(
        None,
        description="FILE that keeps each attacked example, so that none is attacked twice [default: in the cache]",
    )

    @field_validator("max_seconds")
    @classmethod
    def _zero_is_no_limit(cls, seconds: float | None) -> float | None:
        return seconds or None


class BenchConfig(TaskConfig):
    """Settings of a timing."""

    task: str = Field("mr", description="task name, or file or folder of your own, whose test texts are timed")
    seq: str = Field(
        "mix",
        pattern=r"^(mix|[1-9]\d{0,3})$",
        description="tokens per text: a number (random words), or mix (the texts of --task)",
    )
    max_length: MaxLength = Field(None, description=MAX_LENGTH)
    n: Count = Field(128, description="texts per round")
    batch: Count = Field(1, description="texts per call")
    rounds: Count = Field(7, description="rounds; in each round every engine runs once. An interval needs at least 6")
    threads: int | None = Field(None, ge=1, le=1024, description="threads per engine [default: all cores]")
    dtype: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="number format of our engine; auto: the one that the checkpoint was made for"
    )
    rivals: str = Field(
        "torch",
        description="engines to compare with, with commas: none, or of torch, torch-bf16, torch-compile, "
        "torch-compile-bf16, onnxruntime, onnxruntime-int8, onnxruntime-int8-static, openvino, openvino-bf16, "
        "openvino-int8 (by NNCF), deepsparse",
    )
    deepsparse_python: str | None = Field(
        None, description="for the rival deepsparse: path of a python that has deepsparse 1.8.0"
    )
    seed: Seed = Field(0, description="random seed of the choice of texts")
    random: Literal["minilm", "bert-base", "bert-large", "roberta-base"] | None = Field(
        None, description="instead of DIR: time a model of this shape with random weights"
    )
    pattern: str = Field("unstructured", description="for --random: where zeros are: unstructured, 2:4, 16x1, 32x1, …")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="for --random: share of zeros [default: 0.875, or what the pattern implies]"
    )


class ServeConfig(Settings):
    """Settings of a server."""

    variables: ClassVar[str | None] = "SPARSEBERT_SERVE_"

    host: str = Field(
        "127.0.0.1", description="address to listen on; any but this machine's own needs an API key, or --insecure"
    )
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0: any free one")
    dtype: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="number format; auto: the one that the checkpoint was made for"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="threads of the engine [default: all cores]")
    api_key_file: str | None = Field(
        None, description="FILE with the key that clients must send; else SPARSEBERT_API_KEY, if it is set"
    )
    insecure: bool = Field(False, description="serve everybody who reaches the address, without a key")
    max_body_kb: Count = Field(2000, description="largest body of a request, in kB")
    max_items: Count = Field(32, description="most texts of a request")
    max_tokens: int | None = Field(
        None, ge=3, lt=LARGE, description="most tokens of a text [default: the model's positions]"
    )
    max_batch_tokens: Count = Field(16_384, description="most tokens that run together")
    max_in_flight: Count = Field(512, description="most requests without an answer; more get 429")
    max_wait_ms: Positive = Field(
        200.0, description="a request that would probably wait longer than this, in ms, gets 429 at once"
    )
    timeout: Positive = Field(30.0, description="seconds after which an answer is of no use: the request gets 503")
    shadow: str | None = Field(
        None,
        description="DIR of the dense model, which a share of the requests also runs on: how often both agree, and how "
        "long each takes, are metrics",
    )
    shadow_rate: float = Field(0.01, ge=0, le=1, description="that share")
    read_timeout: Positive = Field(10.0, description="seconds in which the head of a request, and its body, must come")
    stop_delay: float = Field(
        0.0,
        ge=0,
        lt=1e6,
        description="seconds for which a server that is told to stop still answers, while /health/ready says 503",
    )
    drain_timeout: Positive = Field(
        20.0, description="seconds after that for requests in flight; new ones are told that the server stops"
    )
    name: str | None = Field(
        None, pattern=r"^[\w.:-]{1,64}$", description="the model's name for clients [default: that of the directory]"
    )
    quiet: bool = Field(False, description="log only requests that were not answered")
    ray: bool = Field(False, description="serve on the Ray cluster of RAY_ADDRESS, or on one that is begun here")
    replicas: str = Field(
        "1",
        pattern=r"^[1-9]\d{0,3}(-[1-9]\d{0,3})?$",
        description="with --ray: how many engines; 1-8 for between one and eight, as load asks for",
    )

    @model_validator(mode="after")
    def _need_no_other(self):
        for name, needed in (("shadow_rate", "shadow"), ("replicas", "ray")):
            if name in self.model_fields_set and not getattr(self, needed):
                given, default = getattr(self, name), type(self).model_fields[name].default
                if given != default:
                    flags = [each.replace("_", "-") for each in (name, needed)]
                    raise ValueError(f"--{flags[0]} is of --{flags[1]}, which is not given")
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """(fewest, most) replicas."""
        parts = [int(part) for part in self.replicas.split("-")]
        return min(parts), max(parts)


class LoadtestConfig(Settings):
    """Settings of a load test."""

    rate: str = Field("10", description="requests per second; several with commas, one run each")
    seconds: Positive = Field(10.0, lt=1e6, description="length of a run, in seconds")
    batch: Count = Field(1, description="texts per request")
    arrivals: Literal["poisson", "constant"] = Field(
        "poisson", description="when requests are due: at random, as from many clients, or at equal distances"
    )
    timeout: Positive = Field(30.0, lt=1e6, description="seconds after which a request is given up")
    api_key_file: str | None = Field(
        None, description="FILE with the server's API key; else SPARSEBERT_API_KEY, if it is set"
    )
    seed: Seed = Field(0, description="random seed, of the order of the texts and of random arrivals")

    @field_validator("rate")
    @classmethod
    def _are_rates(cls, rate: str) -> str:
        try:
            rates = [float(part) for part in rate.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(0 < each <= 1e6 for each in rates):
            raise ValueError("numbers above 0 and up to 1,000,000, with commas between them")
        return rate

    @property
    def rates(self) -> list[float]:
        """In the order given."""
        return [float(part) for part in self.rate.split(",")]


class DemoConfig(Settings):
    """Sizes of the demo; with the defaults it is the full demo."""

    epochs: Positive = Field(2.0, lt=1e6, description="passes over the training sentences")
    train_n: int | None = Field(None, ge=1, lt=LARGE, description="training sentences [default: all]")
    test_n: int | None = Field(None, ge=1, lt=LARGE, description="test sentences [default: all]")
    calibration_tokens: int | None = Field(
        None, ge=1, lt=LARGE, description="tokens to calibrate on [default: as for prune]"
    )
    attack_n: Count = Field(100, description="test sentences that are attacked")
    bench_n: Count = Field(64, description="sentences per timing round")
    rounds: int | None = Field(None, ge=1, lt=LARGE, description="timing rounds [default: as for bench]")
    threads: int | None = Field(None, ge=1, le=1024, description="threads of the timing [default: all cores]")
    seed: Seed = Field(0, description="random seed")


def validated(config_class: type[Settings], fields: dict, where: str = "", fix: str | None = None) -> Settings:
    """`config_class(**fields)`. Raises InputError, in one line, for a value that pydantic refuses. where: file and part
    that the fields are from, with a colon, for the message. fix: None if they are flags.
    """
    try:
        return config_class(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        wrong = f"{name} must be {rule}" if rule != first["msg"] else f"{name}: {rule}"
        if fix is None and name == "sparsity" and isinstance(given := first["input"], float) and 1 < given < 100:
            fix = f"for {given:.12g} % write --sparsity {given / 100:.12g}"
        raise InputError(
            f"{where}{wrong}, got {first['input']!r}", fix=fix or f"correct --{name.replace('_', '-')}"
        ) from error
