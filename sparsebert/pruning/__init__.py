"""Pruning: `prune` a model in memory without training, or `prune_checkpoint` a directory into another by any method."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsebert import checkpoint, data, encoders, ledger, patterns
from sparsebert.config import PruneConfig, SubnetConfig
from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.errors import InputError
from sparsebert.ops import admm_prune, gram, masked_lstsq, obs_prune, sparse_matmul, topk_mask
from sparsebert.patterns import parse, require_fits, sparsity_of
from sparsebert.pruning import (
    allocate,
    calibrate,
    calibration,
    cluster,
    knowledge,
    methods,
    recover,
    scores,
    solve,
    subnets,
)
from sparsebert.pruning.calibration import Calibration, draw
from sparsebert.pruning.methods import METHODS
from sparsebert.pruning.run import Run
from sparsebert.pruning.subnets import TRAINED, Subnet

__all__ = ["METHODS", "TRAINED", "Calibration", "PruneResult", "draw", "prune", "prune_checkpoint"]

# What a pruned model depends on: a change in any of these starts a run anew.
CODE = (
    allocate, calibrate, calibration, cluster, encoders, knowledge, methods, patterns, recover, scores, solve,
)  # fmt: skip
OPS = (admm_prune, gram, masked_lstsq, obs_prune, sparse_matmul, topk_mask)


@dataclass(frozen=True)
class PruneResult:
    """density: share of non-zeros a linear, by full name. sparsity: share of zeros over all of them. tokens: calibrated
    on, padding not counted. peak_rss_mb: of the process so far, MiB. training: figures of `TrainResult`, where the
    method trains.
    """

    method: str
    pattern: str
    sparsity: float
    density: dict[str, float]
    tokens: int
    seconds: float
    peak_rss_mb: float
    training: dict | None = None

    def as_json(self) -> dict:
        fields = asdict(self)
        layers = [{"name": name, "density": density} for name, density in fields.pop("density").items()]
        return {**fields, "layers": layers}


def prune(
    model,
    calibration: Calibration | None,
    config: PruneConfig | None = None,
    *,
    progress: Progress = no_progress,
    run: Run | None = None,
) -> PruneResult:
    """Prunes the encoder's linears of a stock `transformers` classifier in place; embeddings stay as they are, and so
    do pooler and classifier but for the methods that solve for them again.

    calibration: texts to look at, from `draw`; None for a method that looks at none. A linear of n weights gets
    floor(sparsity * n) zeros exactly, or what its pattern or its allotment makes of that. run: where finished layers
    are kept. Raises InputError for an unknown method or pattern, one that does not fit the model, too few calibration
    tokens, and moments that cannot be solved.
    """
    config = config or PruneConfig()
    check(config)
    start = time.perf_counter()
    checkpoint.require_model(model)
    model.eval()
    linears = encoder_linears(model)
    pattern = parse(config.pattern)
    for name, module in linears.items():
        require_fits(pattern, *module.weight.shape, sparsity_of(pattern, config.sparsity), name)
    tokens = 0
    if METHODS[config.method].looks_at_data:
        batches = calibration.padded_batches if config.as_published else calibration.batches
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        _require_tokens(tokens, linears)
    METHODS[config.method].prune(model, calibration, config, run or Run(progress))
    return _result(model, config, start, tokens)


def _result(model, config: PruneConfig, start: float, tokens: int, training: dict | None = None) -> PruneResult:
    linears = encoder_linears(model)
    nnz = {name: int(module.weight.count_nonzero()) for name, module in linears.items()}
    size = {name: module.weight.numel() for name, module in linears.items()}
    return PruneResult(
        method=config.method,
        pattern=config.pattern,
        sparsity=1 - sum(nnz.values()) / sum(size.values()),
        density={name: nnz[name] / size[name] for name in linears},
        tokens=tokens,
        seconds=time.perf_counter() - start,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        training=training,
    )


def prune_checkpoint(
    source: str | Path,
    task: str,
    output: str | Path,
    config: PruneConfig | None = None,
    subnet: SubnetConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> PruneResult:
    """Prunes the classifier in the directory `source` on training texts of `task`, and saves it in `output`. subnet:
    for the methods that train with labels (mask, imp, imp-rw, soft-movement); the seed is that of `config`.

    The same call again returns at once where `output` is finished, else goes on after the last finished layer, kept in
    `<output>.partial`, or the last snapshot, `<output>.partial.safetensors`; it starts anew when weights, data, config
    or this code changed, but a snapshot of other settings is refused.
    """
    config = config or PruneConfig()
    subnet = subnet or SubnetConfig()
    check(config, subnet)
    if config.method in TRAINED:
        return _train_subnet(source, task, output, config, subnet, progress)
    spec = data.get_task(task)
    source = checkpoint.resolve(source)
    target = checkpoint.check_output(output, source=source)
    inputs = {"source": checkpoint.source_sha256(source), "config": config.model_dump(), "max_length": spec.max_length}
    examples = None
    if METHODS[config.method].looks_at_data:
        if spec.train is None:
            raise InputError(f"task {spec.name!r} has no training split to calibrate on", fix="choose another --task")
        examples = data.load(spec, spec.train)
        inputs["data"] = examples.sha256
    key = ledger.unit_key("prune", inputs, sys.modules[__name__], *CODE, *OPS)
    if (figures := checkpoint.finished(target, key)) is not None:
        figures.pop("weights_sha256")
        return PruneResult(**figures)

    model, tokenizer = checkpoint.load(source)
    texts = None
    if examples is not None:
        texts = draw(model, tokenizer, examples, config.calibration_tokens, spec.max_length, config.seed)
    run = Run(progress, target.with_name(f"{target.name}.partial"), key)
    result = prune(model, texts, config, run=run)
    recipe = {"command": "prune", "model": str(source), "task": task, **config.model_dump()}
    summary = {
        "method": result.method,
        "pattern": result.pattern,
        "sparsity": result.sparsity,
        "max_length": spec.max_length,
    }
    checkpoint.save(model, tokenizer, target, recipe=recipe, key=key, figures=asdict(result), summary=summary)
    run.discard()
    return result


def _train_subnet(
    source: str | Path, task: str, output: str | Path, config: PruneConfig, settings: SubnetConfig, progress: Progress
) -> PruneResult:
    start = time.perf_counter()
    source = checkpoint.resolve(source)
    target = checkpoint.check_output(output, source=source)
    subnet = Subnet(source, task, target, config, settings, progress)
    key = subnet.key(sys.modules[__name__], subnets)
    if (figures := checkpoint.finished(target, key)) is not None:
        figures.pop("weights_sha256")
        return PruneResult(**figures)
    model, tokenizer, training, run = subnet.find(key)
    result = _result(model, config, start, 0, training)
    settings = subnet.lesson.config  # with the learning rate it was run at
    recipe = {"command": "prune", "model": str(source), "task": task, **settings.model_dump(), **config.model_dump()}
    summary = {"method": result.method, "pattern": result.pattern, "sparsity": result.sparsity}
    summary["max_length"] = subnet.spec.max_length
    checkpoint.save(model, tokenizer, target, recipe=recipe, key=key, figures=asdict(result), summary=summary)
    run.discard()
    return result


def check(config: PruneConfig, subnet: SubnetConfig | None = None) -> None:
    """InputError or UnsupportedError for a config no method can carry out, before anything is read. subnet: None where
    no method that trains will do.
    """
    known = (*METHODS, *(TRAINED if subnet is not None else ()))
    if config.method not in known:
        raise InputError(f"method must be one of {', '.join(known)}, got {config.method!r}", fix="choose one of these")
    if config.method in TRAINED:
        return subnets.check(config, subnet)
    if subnet is not None:
        others = [name for name, value in SubnetConfig() if getattr(subnet, name) != value and name != "seed"]
        if others:
            raise InputError(
                f"--{others[0].replace('_', '-')} belongs to methods {', '.join(TRAINED)}, got {config.method}",
                fix="leave it out",
            )
    for flag, method in (("tier", "knowledge"), ("without", "knowledge"), ("as_published", "adaptive")):
        if getattr(config, flag) not in (None, "", False) and config.method != method:
            raise InputError(
                f"--{flag.replace('_', '-')} belongs to method {method}, got method {config.method}", fix="leave it out"
            )
    if config.scope != "local" and config.method != "magnitude":
        raise InputError(f"--scope belongs to method magnitude, got method {config.method}", fix="leave it out")
    pattern = parse(config.pattern)
    sparsity_of(pattern, config.sparsity)
    if config.method == "knowledge":
        knowledge.steps_of(config)
    if not isinstance(pattern, patterns.Unstructured) and (config.scope == "global" or config.as_published):
        raise InputError(
            f"--scope global and --as-published prune unstructured only, got {pattern}", fix="leave it out"
        )


def _require_tokens(tokens: int, linears) -> None:
    name, widest = max(linears.items(), key=lambda item: item[1].in_features)
    if tokens < widest.in_features:
        raise InputError(
            f"calibration must have at least as many tokens as {name} has inputs, {widest.in_features}, got {tokens}",
            fix="raise --calibration-tokens",
        )
