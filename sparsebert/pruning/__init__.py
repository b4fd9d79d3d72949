"""Post-training pruning: `prune` a model in memory, or `prune_checkpoint` a directory into another."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsebert import checkpoint, data, encoders, ledger, patterns
from sparsebert.config import PruneConfig
from sparsebert.encoders import Progress, batches, encoder_linears, no_progress, token_limit, tokenize
from sparsebert.errors import InputError
from sparsebert.patterns import parse, require_unstructured
from sparsebert.pruning import calibrate, methods, solve
from sparsebert.pruning.methods import METHODS, Batches

__all__ = ["METHODS", "PruneResult", "prune", "prune_checkpoint"]


@dataclass(frozen=True)
class PruneResult:
    """density: share of non-zeros a linear, by full name. sparsity: share of zeros over all of them. peak_rss_mb: of
    the process so far, MiB.
    """

    method: str
    pattern: str
    sparsity: float
    density: dict[str, float]
    seconds: float
    peak_rss_mb: float

    def as_json(self) -> dict:
        fields = asdict(self)
        layers = [{"name": name, "density": density} for name, density in fields.pop("density").items()]
        return {**fields, "layers": layers}


def prune(
    model, calibration: Batches, config: PruneConfig | None = None, *, progress: Progress = no_progress
) -> PruneResult:
    """Prunes the encoder's linears of a stock `transformers` classifier in place; embeddings, pooler and classifier
    stay dense.

    calibration: padded token batches with attention_mask, int64 [sequences, length], as `calibration_batches` makes
    them. Each linear of n weights gets floor(sparsity * n) zeros exactly. Raises InputError for an unknown method or
    pattern and for a singular Hessian, UnsupportedError for a pattern the method cannot place.
    """
    config = config or PruneConfig()
    check(config)
    start = time.perf_counter()
    model.eval()
    METHODS[config.method].prune(model, calibration, config, progress)
    linears = encoder_linears(model)
    nnz = {name: int(module.weight.count_nonzero()) for name, module in linears.items()}
    size = {name: module.weight.numel() for name, module in linears.items()}
    return PruneResult(
        method=config.method,
        pattern=config.pattern,
        sparsity=1 - sum(nnz.values()) / sum(size.values()),
        density={name: nnz[name] / size[name] for name in linears},
        seconds=time.perf_counter() - start,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def prune_checkpoint(
    source: str | Path,
    task: str,
    output: str | Path,
    config: PruneConfig | None = None,
    *,
    progress: Progress = no_progress,
) -> PruneResult:
    """Prunes the classifier in the directory `source` on unlabelled training sentences of `task`, and saves it in
    `output`.

    The same call again returns at once where `output` is finished; it starts anew when weights, data, config or this
    code changed.
    """
    config = config or PruneConfig()
    check(config)
    spec = data.get_task(task)
    source = checkpoint.resolve(source)
    target = checkpoint.check_output(output, source=source)
    inputs = {"source": checkpoint.source_sha256(source), "config": config.model_dump(), "max_length": spec.max_length}
    examples = None
    if METHODS[config.method].looks_at_data:
        examples = calibration_examples(spec, config)
        inputs["data"] = examples.sha256
    key = ledger.unit_key("prune", inputs, sys.modules[__name__], methods, calibrate, solve, patterns, encoders)
    if (figures := checkpoint.finished(target, key)) is not None:
        figures.pop("weights_sha256")
        return PruneResult(**figures)

    model, tokenizer = checkpoint.load(source)
    calibration = [] if examples is None else calibration_batches(model, tokenizer, examples, spec.max_length)
    result = prune(model, calibration, config, progress=progress)
    recipe = {"command": "prune", "model": str(source), "task": task, **config.model_dump()}
    summary = {
        "method": result.method,
        "pattern": result.pattern,
        "sparsity": result.sparsity,
        "max_length": spec.max_length,
    }
    checkpoint.save(model, tokenizer, target, recipe=recipe, key=key, figures=asdict(result), summary=summary)
    return result


def calibration_examples(task: data.Task, config: PruneConfig) -> data.Examples:
    """`config.calibration` seeded random training examples of a task."""
    if task.train is None:
        raise InputError(f"task {task.name!r} has no training split to calibrate on", fix="choose another --task")
    return data.load(task, task.train, limit=config.calibration, seed=config.seed)


def calibration_batches(model, tokenizer, examples: data.Examples, max_length: int, batch_size: int = 64) -> Batches:
    """The examples without their labels, as batches of similar length. max_length: tokens kept of a text, at most the
    model's positions.
    """
    encoded = tokenize(tokenizer, examples, token_limit(model, max_length))
    return [batch for _, batch in batches(tokenizer, encoded, batch_size)]


def check(config: PruneConfig) -> None:
    """InputError or UnsupportedError for a config no method can carry out, before anything is read."""
    if config.method not in METHODS:
        raise InputError(
            f"method must be one of {', '.join(METHODS)}, got {config.method!r}", fix="choose one of these"
        )
    require_unstructured(parse(config.pattern), config.method)
