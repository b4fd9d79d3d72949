"""The plan of a prune, made without pruning: the budget, the memory and the time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sparsebert import checkpoint, data
from sparsebert.config import LearnConfig, PruneConfig, TaskConfig
from sparsebert.encoders import encoder_linears, tokenize
from sparsebert.machine import bf16_is_fast
from sparsebert.ops.admm_prune import PATH_ITERATIONS
from sparsebert.patterns import Grouped, Pattern, kept_in, parse, require_fits, sparsity_of
from sparsebert.pruning import allocate, subnets
from sparsebert.pruning.calibration import NONE, SHARES, TOKENS_PER_BATCH
from sparsebert.pruning.cluster import QUICK, ROUNDS
from sparsebert.pruning.distillation import BATCH, SPARSE_BELOW, STEPS
from sparsebert.pruning.entry import check, device_of, run_of
from sparsebert.pruning.knowledge import DAMAGE_TOKENS, METRIC_TOKENS, steps_of
from sparsebert.pruning.methods import LABEL_FREE
from sparsebert.pruning.quantize import SWEEPS
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.training.loop import CHECKS, precision_of, step_count
from sparsebert.training.setup import TrainingSetup

# Speed of the parts of a prune, as a share of the speed of a large matrix product (in float32; for training in the
# type of the training). Fitted to MiniLM and BERT-base.
FORWARD, MOMENTS, SOLVE, COUPLED, TRAINING = 0.5, 0.6, 0.25, 0.6, 0.5
SAMPLE = 512  # max training examples whose tokens are counted


@dataclass(frozen=True)
class Plan:
    """The plan of a prune. weights: number of prunable weights; zeros: how many of them will be zero. tokens: about how
    many tokens are calibrated on, or trained on in all optimizer_steps. calibration: tokens in each part of the
    calibration set, if there are enough texts. steps: names of the steps of method knowledge. memory_mb: peak memory in
    MiB, and its parts; on a GPU most of it is there. seconds: a rough estimate for this machine, and its parts; empty
    for a GPU, where the speed is unmeasured. done: "finished", or the last result
    of an unfinished run of the same work; empty if it was not begun.
    """

    method: str
    pattern: str
    linears: int
    weights: int
    zeros: int
    tokens: int
    calibration: dict[str, int]
    optimizer_steps: int
    steps: list[str]
    memory_mb: dict[str, float]
    seconds: dict[str, float]
    done: str = ""

    def as_json(self) -> dict:
        return asdict(self)


def plan(
    source: str | Path,
    task: str | TaskConfig,
    output: str | Path,
    config: PruneConfig,
    subnet: SubnetConfig | None = None,
    *,
    overwrite: bool = False,
) -> Plan:
    """The plan of `prune_checkpoint`; leaves nothing behind. Raises the errors that `prune_checkpoint` would raise
    before its work begins.
    """
    subnet = subnet or SubnetConfig()
    check(config, subnet)
    directory = checkpoint.resolve(source)
    run, model = run_of(directory, task, output, config, subnet, overwrite), checkpoint.shapes(directory)
    done = run.job.unfinished() if checkpoint.finished(run.job) is None else "finished"
    if config.method in TRAINED:
        return replace(_plan_training(model, directory, run.setup, config, subnet), done=done)
    own = None
    if run.examples is not None:
        own = round(len(run.examples) * mean_tokens(directory, run.examples, run.max_length)[0])
    return replace(plan_model(model, config, own), done=done)


def plan_model(model, config: PruneConfig, own: int | None = None, speed: float | None = None) -> Plan:
    """The plan of `prune`, from the model's shapes. The time is estimated from the speed of a matrix product on this
    machine. own: number of tokens in the task's texts, None if not known. speed: of a matrix product in float32, FLOP
    per second; None: it is measured.
    """
    check(config)
    device = device_of(config)
    pattern, linears = parse(config.pattern), encoder_linears(model)
    budget = _budget(linears, pattern, config)
    weights = budget["weights"]
    looks = LABEL_FREE[config.method].looks_at_data
    shares = {"task": 1.0} if config.as_published or config.calibration == (NONE,) else SHARES
    parts = {part: round(share * config.calibration_tokens) for part, share in shares.items()} if looks else {}
    if parts and own is not None:  # joined texts are made anew and never run out
        parts["task"] = min(parts["task"], own)
    tokens = sum(parts.values())
    steps = sorted(steps_of(config)) if config.method == "knowledge" else []
    seconds = {}
    if device.type == "cpu":
        density = 1 - budget["zeros"] / weights
        seconds = _seconds(linears, weights, tokens, steps, pattern, density, config.int8, speed)
    return Plan(
        **budget,
        tokens=tokens,
        calibration=parts,
        optimizer_steps=0,
        steps=steps,
        memory_mb=_memory(model, linears, tokens, steps),
        seconds=seconds,
    )


def mean_tokens(directory: Path, examples: data.Examples, max_length: int) -> tuple[float, int]:
    """(mean, max) tokens per example after the cut, in a sample."""
    some = tokenize(checkpoint.load_tokenizer(directory), examples.sample(SAMPLE, 0), max_length)
    lengths = [len(row["input_ids"]) for row in some]
    return sum(lengths) / len(lengths), max(lengths)


def _plan_training(model, directory: Path, setup: TrainingSetup, config: PruneConfig, subnet: SubnetConfig) -> Plan:
    pattern, linears = parse(config.pattern), encoder_linears(model)
    budget = _budget(linears, pattern, config)
    weights = budget["weights"]
    method, flags = TRAINED[config.method], subnets.own(config.method, subnet)
    if method.zeros is not None:
        budget["zeros"] = method.zeros(model, flags, sparsity_of(pattern, config.sparsity))
    examples, held_out = setup.examples, setup.held_out
    mean, longest = mean_tokens(directory, examples, setup.spec.max_length)
    optimizer_steps = step_count(len(examples), subnet)
    tokens = round(optimizer_steps * min(subnet.batch_size, len(examples)) * mean)

    seconds = {}
    if setup.device.type == "cpu":
        speed = training_speed(subnet)
        seconds = {"training": method.passes(flags) * 6 * weights * tokens / speed}
        if subnet.select == "best":
            checks = CHECKS * (1 - subnet.settle) + 1
            seconds["held_out"] = checks * 2 * weights * len(held_out) * mean / speed
        seconds = {"total": sum(seconds.values()), **seconds}

    mib = 1 / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    scores = weights // (pattern.rows if isinstance(pattern, Grouped) else 1)
    beside, learning = method.floats(scores, parameters)
    widths = sum(m.in_features + m.out_features for m in linears.values())
    memory = {  # fitted to the peaks of MiniLM on MNLI
        "python_and_torch": 700.0,
        "examples": 170 * mean * len(examples) * mib,
        "model": 4 * (parameters + beside) * mib,
        "gradients_and_moments": 12 * learning * mib,
        "best": 4 * learning * mib if subnet.select == "best" else 0.0,
        # Tensors stored for the backward pass, as in _memory; autocast leaves many of them float32.
        "backward": 1.5 * 4 * subnet.batch_size * longest * widths * mib,
    }
    return Plan(
        **budget,
        tokens=tokens,
        calibration={},
        optimizer_steps=optimizer_steps,
        steps=[],
        memory_mb={"peak": sum(memory.values()), **memory},
        seconds=seconds,
    )


def _budget(linears, pattern: Pattern, config: PruneConfig) -> dict:
    """The fields of a plan that say what is pruned. InputError if the pattern does not fit."""
    sparsity = sparsity_of(pattern, config.sparsity)
    for name, module in linears.items():
        require_fits(pattern, *module.weight.shape, sparsity, name)
    weights = sum(m.weight.numel() for m in linears.values())
    method = LABEL_FREE.get(config.method)
    size = pattern.rows if isinstance(pattern, Grouped) else 1
    kept = 0
    for m in linears.values():
        shares = m.out_features // size if method is not None and method.per_row else 1  # parts with a budget each
        kept += shares * kept_in(pattern, m.out_features // shares, m.in_features, sparsity)
    return {
        "method": config.method,
        "pattern": config.pattern,
        "linears": len(linears),
        "weights": weights,
        "zeros": weights - kept,
    }


def _memory(model, linears, tokens: int, steps: list[str]) -> dict[str, float]:
    mib = 1 / 2**20
    parameters = 4 * sum(p.numel() for p in model.parameters()) * mib
    width = min(m.in_features for m in linears.values())
    widest = max(m.in_features for m in linears.values())
    parts = {"python_and_torch": 400.0, "model": parameters}
    if tokens:
        # Both passes hold a layer's input and its attention's output; the half-pruned one also holds the layer's widest
        # activation. The factor 1.3, and the number of square float64 matrices, 15, are fitted to the peaks of MiniLM,
        # RoBERTa-base and BERT-large.
        parts["activations"] = 1.3 * 4 * tokens * (4 * width + widest) * mib
        parts["moments"] = 15 * 8 * widest**2 * mib
    if "outputs" in steps:
        parts["row_metrics"] = 4 * sum(m.out_features**2 for m in linears.values()) * mib
    if {"outputs", "allocation", "distill"} & set(steps):
        # Tensors stored for a backward pass: inputs and outputs of all linears, and half as much between them.
        parts["backward"] = (
            1.5 * 4 * TOKENS_PER_BATCH * sum(m.in_features + m.out_features for m in linears.values()) * mib
        )
    if "allocation" in steps:
        parts["tried_sparsities"] = 2 * len(allocate.LEVELS) * sum(m.weight.numel() for m in linears.values()) * mib
    if "distill" in steps:
        parts["distillation"] = 7 * parameters  # teacher, gradients, two moments, running mean, best weights, a copy

    def at_once(*names: str) -> float:
        return 400.0 + parameters + sum(parts.get(name, 0.0) for name in names)

    peak = max(
        at_once("activations", "moments", "row_metrics"),
        at_once("row_metrics", "backward", "tried_sparsities"),
        at_once("backward", "distillation"),
    )
    return {"peak": peak, **parts}


def _seconds(
    linears,
    weights: int,
    tokens: int,
    steps: list[str],
    pattern: Pattern,
    density: float,
    int8: bool,
    speed: float | None,
) -> dict[str, float]:
    speed = speed or flops_a_second()
    if not tokens:
        return {"total": 1.0}
    gram = sum(m.in_features**2 + 2 * m.in_features * min(m.in_features, m.out_features) for m in linears.values())
    # Factorisations, and the products of the iterations; with step `outputs` there are products from both sides.
    coupled = "outputs" in steps
    solve = sum(
        10 * m.in_features**3
        + (520 * (m.in_features + m.out_features) if coupled else 300 * m.in_features) * m.in_features * m.out_features
        for m in linears.values()
    )
    parts = {
        "forward": 2 * 2 * weights * tokens / speed / FORWARD,
        "moments": gram * tokens / speed / MOMENTS,
        "solve": solve / speed / (COUPLED if coupled else SOLVE),
    }
    if coupled:
        parts["gradients"] = 4 * weights * min(tokens, METRIC_TOKENS) / speed / FORWARD
    if "cluster" in steps and isinstance(pattern, Grouped):
        # Per round: eigenvectors, a short ADMM, and least squares of every row on the columns of every group.
        rounds = sum(
            10 * m.in_features**3
            + (2.5 * QUICK + density**2 * m.out_features / pattern.rows) * m.in_features**2 * m.out_features
            for m in linears.values()
        )
        parts["clustering"] = (2 if "allocation" in steps else 1) * ROUNDS * rounds / speed / SOLVE
    if "allocation" in steps:
        some = min(tokens, DAMAGE_TOKENS)
        parts["allocation"] = (6 + 2 * len(allocate.LEVELS)) * weights * some / speed / FORWARD
        # Eigenvectors, the climb of ADMM through all levels, and least squares of each row for its kept or its removed
        # weights, whichever are fewer.
        solved = sum(min(level, 1 - level) ** 3 for level in allocate.LEVELS) / 3
        climb = 2.5 * PATH_ITERATIONS * len(allocate.LEVELS)
        tries = sum(
            10 * m.in_features**3 + (climb + solved * m.in_features) * m.in_features**2 * m.out_features
            for m in linears.values()
        )
        parts["tried_sparsities"] = tries / speed / SOLVE
    if "distill" in steps:
        quicker = 1.4 if density < SPARSE_BELOW and not bf16_is_fast() else 1.0  # as products skip the zeros
        parts["distillation"] = STEPS * BATCH * 30 * 8 * weights / speed / FORWARD / quicker
    if int8:  # a pass of its own; each sweep has two products of float64
        sweeps = SWEEPS * 8 * sum(m.in_features**2 * m.out_features for m in linears.values())
        parts["int8"] = parts["forward"] + parts["moments"] + sweeps / speed / SOLVE
    return {"total": sum(parts.values()), **parts}


def training_speed(config: LearnConfig) -> float:
    """FLOP per second of training on this machine's CPU: six per weight of the linears and token."""
    bf16 = precision_of(config, torch.device("cpu")) == "bf16"
    return TRAINING * flops_a_second(torch.bfloat16 if bf16 else torch.float32)


def flops_a_second(dtype: torch.dtype = torch.float32) -> float:
    """The speed of the fastest of several products: what the machine does when nothing else runs on it."""
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a
    end, fastest = time.perf_counter() + 0.3, float("inf")
    while (start := time.perf_counter()) < end:
        a @ a
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 1024**3 / fastest
