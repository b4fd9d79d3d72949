"""What a prune would do, before it is done: the budget, the memory and the time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig
from sparsebert.encoders import encoder_linears
from sparsebert.machine import bf16_is_fast
from sparsebert.ops.admm_prune import PATH_ITERATIONS
from sparsebert.patterns import Grouped, Pattern, kept_in, parse, require_fits, sparsity_of
from sparsebert.pruning import allocate
from sparsebert.pruning.calibration import TOKENS_PER_BATCH
from sparsebert.pruning.cluster import QUICK, ROUNDS
from sparsebert.pruning.knowledge import DAMAGE_TOKENS, METRIC_TOKENS, steps_of
from sparsebert.pruning.recover import BATCH, SPARSE_BELOW, STEPS

# Share of the speed of a large float32 matrix product that the parts of a prune reach, fitted to MiniLM and BERT-base.
FORWARD, MOMENTS, SOLVE, COUPLED = 0.5, 0.6, 0.25, 0.6


@dataclass(frozen=True)
class Plan:
    """weights: prunable ones; zeros: of them. steps: of method knowledge. memory_mb: MiB at the peak, and its parts.
    seconds: a rough guess for this machine, and its parts.
    """

    method: str
    pattern: str
    linears: int
    weights: int
    zeros: int
    tokens: int
    steps: list[str]
    memory_mb: dict[str, float]
    seconds: dict[str, float]

    def as_json(self) -> dict:
        return asdict(self)


def plan(source: str | Path, task: str, config: PruneConfig) -> Plan:
    """The plan of `prune_checkpoint`; reads the model's configuration, not its weights. Raises InputError as `prune`
    would for a pattern that does not fit.
    """
    data.get_task(task)
    return plan_model(checkpoint.shapes(checkpoint.resolve(source)), config)


def plan_model(model, config: PruneConfig) -> Plan:
    """The plan of `prune`, from shapes alone; its guess of the time from the speed of one matrix product here."""
    from sparsebert.pruning import METHODS, check

    check(config)
    pattern = parse(config.pattern)
    sparsity = sparsity_of(pattern, config.sparsity)
    linears = encoder_linears(model)
    for name, module in linears.items():
        require_fits(pattern, *module.weight.shape, sparsity, name)
    weights = sum(m.weight.numel() for m in linears.values())
    kept = sum(kept_in(pattern, *m.weight.shape, sparsity) for m in linears.values())
    looks = METHODS[config.method].looks_at_data
    tokens = config.calibration_tokens if looks else 0
    steps = sorted(steps_of(config)) if config.method == "knowledge" else []
    return Plan(
        method=config.method,
        pattern=config.pattern,
        linears=len(linears),
        weights=weights,
        zeros=weights - kept,
        tokens=tokens,
        steps=steps,
        memory_mb=_memory(model, linears, tokens, steps),
        seconds=_seconds(linears, weights, tokens, steps, pattern, kept / weights),
    )


def _memory(model, linears, tokens: int, steps: list[str]) -> dict[str, float]:
    mib = 1 / 2**20
    parameters = 4 * sum(p.numel() for p in model.parameters()) * mib
    width = min(m.in_features for m in linears.values())
    widest = max(m.in_features for m in linears.values())
    parts = {"python_and_torch": 400.0, "model": parameters}
    if tokens:
        # Both runs hold a layer's input and its attention's output, the half-pruned one also its widest activation.
        # 1.3 and 15, of square float64 matrices: fitted to the peaks of MiniLM, RoBERTa-base and BERT-large.
        parts["activations"] = 1.3 * 4 * tokens * (4 * width + widest) * mib
        parts["moments"] = 15 * 8 * widest**2 * mib
    if "outputs" in steps:
        parts["row_metrics"] = 4 * sum(m.out_features**2 for m in linears.values()) * mib
    if {"outputs", "allocation", "distill"} & set(steps):
        # What a backward pass reads again: inputs and outputs of all linears, and half as much between them.
        parts["backward"] = (
            1.5 * 4 * TOKENS_PER_BATCH * sum(m.in_features + m.out_features for m in linears.values()) * mib
        )
    if "allocation" in steps:
        parts["tried_sparsities"] = 2 * len(allocate.LEVELS) * sum(m.weight.numel() for m in linears.values()) * mib
    if "distill" in steps:
        parts["distillation"] = 7 * parameters  # teacher, gradients, two moments, running mean, the best, a copy

    def at_once(*names: str) -> float:
        return 400.0 + parameters + sum(parts.get(name, 0.0) for name in names)

    peak = max(
        at_once("activations", "moments", "row_metrics"),
        at_once("row_metrics", "backward", "tried_sparsities"),
        at_once("backward", "distillation"),
    )
    return {"peak": peak, **parts}


def _seconds(
    linears, weights: int, tokens: int, steps: list[str], pattern: Pattern, density: float
) -> dict[str, float]:
    speed = _flops_a_second()
    if not tokens:
        return {"total": 1.0}
    gram = sum(m.in_features**2 + 2 * m.in_features * min(m.in_features, m.out_features) for m in linears.values())
    # Factorisations, and the iterations' products: of both sides where errors of outputs count together.
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
        # A round: eigenvectors, a short ADMM, and least squares of every row on the columns of every group.
        rounds = sum(
            10 * m.in_features**3
            + (2.5 * QUICK + density**2 * m.out_features / pattern.rows) * m.in_features**2 * m.out_features
            for m in linears.values()
        )
        parts["clustering"] = (2 if "allocation" in steps else 1) * ROUNDS * rounds / speed / SOLVE
    if "allocation" in steps:
        some = min(tokens, DAMAGE_TOKENS)
        parts["allocation"] = (6 + 2 * len(allocate.LEVELS)) * weights * some / speed / FORWARD
        # Eigenvectors, the climb of ADMM through all levels, and rows solved for what they keep or for what they lose,
        # the less of the two.
        solved = sum(min(level, 1 - level) ** 3 for level in allocate.LEVELS) / 3
        climb = 2.5 * PATH_ITERATIONS * len(allocate.LEVELS)
        tries = sum(
            10 * m.in_features**3 + (climb + solved * m.in_features) * m.in_features**2 * m.out_features
            for m in linears.values()
        )
        parts["tried_sparsities"] = tries / speed / SOLVE
    if "distill" in steps:
        quicker = 1.4 if density < SPARSE_BELOW and not bf16_is_fast() else 1.0  # as the products leave out the zeros
        parts["distillation"] = STEPS * BATCH * 30 * 8 * weights / speed / FORWARD / quicker
    return {"total": sum(parts.values()), **parts}


def _flops_a_second() -> float:
    a = torch.ones(1024, 1024)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        a @ a
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)
