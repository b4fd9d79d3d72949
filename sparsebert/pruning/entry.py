"""The two public functions of pruning, and the table of all methods."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, data, encoders, patterns
from sparsebert.config import PruneConfig, QuantizeConfig, TaskConfig
from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.errors import InputError
from sparsebert.jobs import Job, code_of, digest
from sparsebert.kernels import cuda_core, require_full_float32
from sparsebert.machine import at_work_on, bf16_is_fast, device_for, kind_of
from sparsebert.patterns import parse, require_fits, sparsity_of
from sparsebert.pruning import knowledge
from sparsebert.pruning.calibration import Calibration, draw, held_out_of, others
from sparsebert.pruning.methods import LABEL_FREE, LabelFree
from sparsebert.pruning.quantize import quantize
from sparsebert.pruning.run import Run
from sparsebert.pruning.subnets import Subnet, own
from sparsebert.pruning.trained import TRAINED, SubnetConfig
from sparsebert.pruning.trained.method import Trained
from sparsebert.training.setup import read_by, task_recipe

METHODS: dict[str, LabelFree | Trained] = {**LABEL_FREE, **TRAINED}
CUT_SAMPLE = 4096  # max training texts on which the share of cut texts is measured


@dataclass(frozen=True)
class PruneResult:
    """Figures of a prune. density: share of non-zeros per linear, by full name. sparsity: share of zeros over all of
    these linears. tokens: number of tokens calibrated on, without padding. peak_rss_mb: peak memory of the process so
    far, MiB. training: figures of `TrainResult`, if the method trains. max_length: max tokens per calibration text;
    cut: the share of the task's training texts that have more. rows: rows read from the user's own files
    (data.rows_read). left_out: number of training examples, and of texts of --calibration, that are also in a reported
    split (data.training). calibration: tokens in each part of the calibration set. reused: whether the output was
    finished before. dtype: int8 if weights and inputs were rounded to it. resumed: the last result of an earlier run
    that this one continued; empty if it began anew.
    """

    method: str
    pattern: str
    sparsity: float
    density: dict[str, float]
    tokens: int
    seconds: float
    peak_rss_mb: float
    training: dict | None = None
    max_length: int | None = None
    cut: float | None = None
    rows: dict | None = None
    left_out: int = 0
    calibration: dict[str, int] | None = None
    dtype: str = "fp32"
    reused: bool = False
    resumed: str = ""

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
    """Prunes the encoder's linears of a stock `transformers` classifier in place. The embeddings do not change; pooler
    and classifier change only if the method solves for them again or trains them.

    calibration: texts from `draw`; None for a method that looks at no texts. A linear of n weights gets exactly
    floor(sparsity * n) zeros, unless its pattern, its allotment or --scope global gives another number. wanda and
    adaptive round down in each row instead: floor(sparsity * n_in) zeros of n_in (--as-published: about one fewer).
    run: keeps the finished layers. All is done on the config's device; at the end the model is on the one that it was
    on.
    Raises InputError for an unknown method or pattern, a pattern that does not fit the model, too few calibration
    tokens, and moments that cannot be solved. Raises UnsupportedError for a GPU that cannot be used or has too little
    memory.
    """
    config = config or PruneConfig()
    check(config)
    device = device_of(config)
    start = time.perf_counter()
    checkpoint.require_model(model)
    model.eval()
    linears = encoder_linears(model)
    pattern = parse(config.pattern)
    for name, module in linears.items():
        require_fits(pattern, *module.weight.shape, sparsity_of(pattern, config.sparsity), name)
    tokens = 0
    if LABEL_FREE[config.method].looks_at_data:
        batches = calibration.padded_batches if config.as_published else calibration.batches
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        _require_tokens(min(tokens, config.calibration_tokens), linears)  # one joined text may exceed the number
        _require_held_out(config, len(calibration.held_out))
    before = model.device
    with at_work_on(device):
        try:
            LABEL_FREE[config.method].prune(model.to(device), calibration, config, run or Run(progress))
        finally:
            model.to(before)
    return _result(model, config, start, tokens)


def device_of(config: PruneConfig) -> torch.device:
    """The device that a config means, for a method without labels. Raises UnsupportedError if it names one that cannot
    be used.
    """
    device = device_for(config.device)
    if device.type == "cuda":
        if LABEL_FREE[config.method].solves:
            cuda_core()
        require_full_float32("pruning on device cuda", instead="pass device='cpu'")
    return device


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
    task: str | TaskConfig,
    output: str | Path,
    config: PruneConfig | None = None,
    subnet: SubnetConfig | None = None,
    *,
    hold_out: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> PruneResult:
    """Prunes the classifier in the directory `source` on training texts of `task`, and saves it in `output`. subnet:
    settings of the methods that train with labels; their seed is the seed of `config`. hold_out: so many training
    examples (data.hold_out) are not among the calibration texts of a method without labels.

    A repeated call returns at once if `output` is finished. Otherwise it continues after the last finished layer, or
    from the last snapshot, in `<output>.partial`. Files in either place that come from other weights, data, settings or
    code are refused, unless `overwrite`.
    """
    config, subnet = config or PruneConfig(), subnet or SubnetConfig()
    check(config, subnet)
    source = checkpoint.resolve(source)
    run = run_of(source, task, output, config, subnet, overwrite, hold_out)
    return _carried_out(run, source, config, progress)


def quantize_checkpoint(
    source: str | Path,
    task: str | TaskConfig,
    output: str | Path,
    config: QuantizeConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> PruneResult:
    """Rounds the classifier in the directory `source`, pruned or dense, to int8 on texts of `task`, and saves it in
    `output`; the zeros stay. A repeated call returns at once if `output` is finished.
    """
    config = config or QuantizeConfig()
    source = checkpoint.resolve(source)
    if checkpoint.read(source).scales is not None:
        raise InputError(f"{source} is in int8 already", fix="quantize the model that it was made from")
    spec = encoders.task_for(task, source, labelled=False)
    target = checkpoint.check_output(output, sources=read_by(spec, source), overwrite=overwrite)
    run = _Calibrated(source, spec, target, config, overwrite)
    return _carried_out(run, source, config, progress)


def _carried_out(
    run: _Trained | _Calibrated, source: Path, config: PruneConfig | QuantizeConfig, progress: Progress
) -> PruneResult:
    """The result of a run: read from its output if that is finished, else computed and saved there."""
    if (figures := checkpoint.finished(run.job)) is not None:
        figures.pop("weights_sha256")
        return PruneResult(**figures | run.read | {"reused": True})
    with run.job:
        model, tokenizer, result = run.find(progress)
        recipe = {"command": run.job.record["kind"], **checkpoint.made_from(source, checkpoint.source_sha256(source))}
        recipe |= {**task_recipe(run.spec), **run.recipe, **config.model_dump()}
        summary = {name: getattr(result, name) for name in ("method", "pattern", "sparsity")}
        summary["max_length"] = run.spec.max_length
        checkpoint.save(
            model, tokenizer, run.job.output, recipe=recipe, job=run.job, figures=asdict(result), summary=summary,
            scales=run.scales, int8_logits=int8_logits,
        )  # fmt: skip
        run.job.finish()
    return replace(result, resumed=run.job.resumed)


def run_of(
    source: Path,
    task: str | TaskConfig,
    output: str | Path,
    config: PruneConfig,
    subnet: SubnetConfig,
    overwrite: bool,
    hold_out: int = 0,
):
    """The run of `prune_checkpoint` for a config that was checked, before its work begins. Everything that can be
    refused this early is refused here.
    """
    spec = encoders.task_for(task, source, labelled=config.method in TRAINED)
    read = read_by(spec, source, subnet.start, subnet.rewind, subnet.bias, subnet.teacher)
    target = checkpoint.check_output(output, sources=read, overwrite=overwrite)
    if config.method in TRAINED:
        return _Trained(source, spec, target, config, subnet, overwrite)
    return _Calibrated(source, spec, target, config, overwrite, hold_out)


class _Trained:
    """One run of a method that trains. job: its key is made of all that decides the result. recipe: the part of that
    which is saved in the recipe. read: figures of the user's files. scales: of int8; None for float32.
    """

    def __init__(
        self, source: Path, spec: data.Task, target: Path, config: PruneConfig, subnet: SubnetConfig, overwrite
    ):
        self.config, self.subnet, self.scales = config, Subnet(source, spec, target, config, subnet, overwrite), None
        setup = self.setup = self.subnet.setup
        self.job, self.spec = self.subnet.job, setup.spec
        # The config of the setup has the learning rate of the run, even if it is a default.
        self.recipe = {"data_sha256": setup.inputs["data"], **setup.config.model_dump()}
        self.read = {"rows": data.rows_read(setup.spec), "left_out": setup.examples.left_out}

    def find(self, progress: Progress):
        """(model, tokenizer, result)."""
        start = time.perf_counter()
        model, tokenizer, training, self.scales = self.subnet.find(progress)
        result = _result(model, self.config, start, 0, training)
        told = {"max_length": training["max_length"], "cut": training["cut"], **self.read}
        if self.scales is not None:
            told["dtype"] = "int8"
        return model, tokenizer, replace(result, **told)


class _Calibrated:
    """One run of a method without labels, or of rounding to int8 alone; job, recipe, read and scales as in _Trained.
    examples: the task's training texts, None for a method that looks at no texts. others: the other calibration texts.
    """

    def __init__(
        self,
        source: Path,
        spec: data.Task,
        target: Path,
        config: PruneConfig | QuantizeConfig,
        overwrite: bool,
        hold_out: int = 0,
    ):
        device = device_of(config) if isinstance(config, PruneConfig) else torch.device("cpu")
        model = checkpoint.shapes(source)
        stock = model.config
        self.source, self.config, self.scales = source, config, None
        self.spec = encoders.limited(spec, stock, config.max_length)
        self.max_length, self.examples, self.recipe, self.read = self.spec.max_length, None, {}, {}
        settings = config.model_dump(exclude={"max_length"})
        self.method = LABEL_FREE[config.method] if isinstance(config, PruneConfig) else None
        if self.method is not None:
            # A default that is written out is the same work.
            settings["sparsity"] = sparsity_of(parse(config.pattern), config.sparsity)
            settings["device"] = kind_of(device)
            if config.method == "knowledge":
                settings["tier"] = knowledge.tier_of(config)
        if self.method is None or self.method.looks_at_data:
            if spec.train is None:
                raise InputError(
                    f"task {spec.name!r} has no training split to calibrate on", fix="choose another --task"
                )
            self.examples = data.training(spec)
            if hold_out:
                self.examples = data.hold_out(self.examples, hold_out)[0]
            _require_tokens(config.calibration_tokens, encoder_linears(model))
            if self.method is not None:
                _require_held_out(config, held_out_of(len(self.examples)))
            given = () if settings.get("as_published") else others(config.calibration, spec.text_column)
            self.others = data.unreported_texts(spec, given)
            left_out = self.examples.left_out + len(given) - len(self.others)
            self.read = {"rows": data.rows_read(spec), "left_out": left_out}
            # The content of the files, instead of their paths.
            settings["calibration"] = f"{len(self.others)} texts, sha256 {digest(self.others)}"
            if self.others:  # some of them are long
                self.max_length = encoders.token_limit(stock, config.max_length)
            self.recipe = {"data_sha256": self.examples.sha256}
        inputs = {
            "model": checkpoint.source_sha256(source),
            "max_length": self.max_length,
            "settings": settings,
            "precision": "bf16" if bf16_is_fast(device) else "fp32",
            "data": self.recipe.get("data_sha256"),
        }
        space = 2 * checkpoint.saved_bytes(source)  # finished layers, and the saved model
        kind, code = "prune", self.method.prune if self.method is not None else quantize
        if self.method is None:
            kind = "quantize"
        elif settings["int8"]:
            inputs["quantize"] = code_of(quantize.__module__)
        self.job = Job(kind, inputs, code.__module__, target, overwrite=overwrite, space=space)

    def find(self, progress: Progress):
        """(model, tokenizer, result); sets `scales` if the model was rounded to int8."""
        start = time.perf_counter()
        model, tokenizer = checkpoint.load(self.source)
        run = Run(progress, self.job)
        if self.examples is None:
            return model, tokenizer, prune(model, None, self.config, run=run)
        tokens, seed = self.config.calibration_tokens, self.config.seed
        texts = draw(model, tokenizer, self.examples, tokens, self.max_length, seed, others=self.others)
        if self.method is not None:
            result = prune(model, texts, self.config, run=run)
        else:
            _require_tokens(min(texts.tokens, tokens), encoder_linears(model))
        if self.method is None or self.config.int8:
            self.scales = quantize(model, texts.batches, run.part("round to int8"))
        if self.method is None:
            made = getattr(model.config, "sparsebert", None) or {}  # how the model was pruned, if it was
            kept = {name: made.get(name, before) for name, before in (("method", "none"), ("pattern", "unstructured"))}
            result = replace(_result(model, PruneConfig(), start, texts.tokens), **kept)
        some = self.examples.sample(CUT_SAMPLE, 0)  # only the task's: joined texts are cut on purpose
        encoded = encoders.tokenize(tokenizer, some, texts.max_length)
        told = {
            "seconds": time.perf_counter() - start,
            "dtype": "fp32" if self.scales is None else "int8",
            "max_length": texts.max_length,
            "cut": encoders.cut_share(tokenizer, some, encoded, texts.max_length),
            "calibration": texts.parts,
            **self.read,
        }
        return model, tokenizer, replace(result, **told)


def int8_logits(files: checkpoint.Files, ids: list[list[int]], types: list[list[int]]):
    """The logits of token ids and types in int8, of a directory that is being made."""
    from sparsebert.engine import Engine

    return Engine.unverified(files, "int8").forward(ids, types)


def save_stand_in(
    model, tokenizer, directory: Path, pattern: str, sparsity: float | None, *, int8: bool, command: str
) -> None:
    """Saves a model to be timed: pruned in place by magnitude, and rounded to int8 on random tokens. It is as fast as
    one that was pruned and rounded with care, and made in seconds. Raises InputError if the pattern does not fit.
    """
    if sparsity != 0:
        prune(model, None, PruneConfig(method="magnitude", pattern=pattern, sparsity=sparsity))
    scales = None
    if int8:
        vocabulary, shape = model.config.vocab_size, (64, 64)
        ids = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, shape)
        scales = quantize(model, [{"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(shape)}])
    checkpoint.save(
        model, tokenizer, directory, recipe={"command": command}, figures={}, scales=scales, int8_logits=int8_logits,
        overwrite=True,
    )  # fmt: skip


def check(config: PruneConfig, subnet: SubnetConfig | None = None) -> None:
    """InputError or UnsupportedError for a config that no method can carry out, before anything is read. subnet: None
    if methods that train are not allowed.
    """
    known = METHODS if subnet is not None else LABEL_FREE
    if config.method not in known:
        raise InputError(f"method must be one of {', '.join(known)}, got {config.method!r}", fix="choose one of these")
    for given in (config, subnet) if subnet is not None else (config,):
        _require_own_flags(given, config.method)
    pattern = parse(config.pattern)
    sparsity = sparsity_of(pattern, config.sparsity)
    if config.method in TRAINED:
        method = TRAINED[config.method]
        if method.loss is not None and subnet.loss not in ("ce", method.loss):
            raise InputError(f"{method.name} learns by loss {method.loss}, got {subnet.loss}", fix="leave --loss out")
        method.check(own(config.method, subnet), pattern, sparsity)
    if config.method == "knowledge":
        knowledge.steps_of(config)
    if config.as_published and config.calibration:
        raise InputError("--as-published calibrates on the task's texts only, got --calibration", fix="leave it out")
    if not isinstance(pattern, patterns.Unstructured) and (config.scope == "global" or config.as_published):
        raise InputError(
            f"--scope global and --as-published prune unstructured only, got {pattern}", fix="leave it out"
        )


def _require_own_flags(given: PruneConfig | SubnetConfig, method: str) -> None:
    """InputError for a flag that is set but belongs to other methods."""
    for name, field in type(given).model_fields.items():
        owners = [other for other in METHODS if name in METHODS[other].flags]
        if owners and method not in owners and getattr(given, name) != field.default:
            flag, them = name.replace("_", "-"), f"method{'s'[: len(owners) > 1]} {', '.join(owners)}"
            raise InputError(f"--{flag} belongs to {them}, got {method}", fix="leave it out")


def _require_held_out(config: PruneConfig, held_out: int) -> None:
    """InputError if distillation would have no held-out text to choose on."""
    if config.method == "knowledge" and "distill" in knowledge.steps_of(config) and not held_out:
        raise InputError(
            "step distill needs a held-out text, one of every ten training texts, got none",
            fix="give at least ten texts, or take --tier 1",
        )


def _require_tokens(tokens: int, linears) -> None:
    """InputError for fewer tokens than the widest linear has inputs: their moments would not have full rank."""
    name, widest = max(linears.items(), key=lambda item: item[1].in_features)
    if tokens < widest.in_features:
        raise InputError(
            f"calibration must have at least as many tokens as {name} has inputs, {widest.in_features}, got {tokens}",
            fix="raise --calibration-tokens",
        )
