"""Writes a model directory, whole or not at all, with its manifest and recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sparsebert.checkpoint.classifier import quiet_transformers, require_model
from sparsebert.checkpoint.manifest import FORMAT_VERSION, MANIFEST
from sparsebert.checkpoint.reading import RECIPE, Files, read_manifest, read_weights
from sparsebert.checkpoint.scales import SCALES, Arrays, as_bytes
from sparsebert.checkpoint.sealing import manifest_of
from sparsebert.errors import CheckpointError, InputError, OutputError, UnsupportedError
from sparsebert.jobs import Job, place, replacing, require_place, require_writable


def save(
    model,
    tokenizer,
    directory: str | Path,
    *,
    recipe: dict,
    figures: dict,
    job: Job | None = None,
    summary: dict | None = None,
    overwrite: bool = False,
    scales: Arrays | None = None,
    int8_logits: Callable[[Files, list[list[int]], list[list[int]]], np.ndarray] | None = None,
) -> str:
    """Writes a model directory, whole or not at all, and returns the sha256 of its weights.

    recipe: the arguments that made it (recipe.yaml). job: the job that made it; figures: what that job measured;
    `finished` reads both. summary: method, pattern and sparsity, for config.json["sparsebert"]. scales: of the int8
    grids that the weights lie on; int8_logits gives the logits of token ids and types in int8. An older directory
    written by this package is replaced in one step. Anything else at that path is an OutputError, unless `overwrite` or
    `job.overwrite` is set.
    """
    import yaml

    require_model(model)
    target = check_output(directory, overwrite=overwrite or (job is not None and job.overwrite))
    _require_finite(model)
    was_training = model.training
    model.eval()
    try:
        with replacing(target) as staging, quiet_transformers():
            (staging / "sparsebert").mkdir()
            model.save_pretrained(staging, safe_serialization=True)
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                # Written here first: the tokenizer's own writer raises a bare Exception if the disk is full.
                (staging / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
            tokenizer.save_pretrained(staging)
            written = Files(staging)
            sha256 = written.weights_sha256
            model.config.sparsebert = {"format_version": FORMAT_VERSION, **(summary or {}), "weights_sha256": sha256}
            model.config.save_pretrained(staging)
            files = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(staging.iterdir())
                if path.is_file() and path.name not in written.weight_files
            }
            manifest = manifest_of(written, model, tokenizer, files, job=job, figures=figures)
            if scales is not None:
                (staging / SCALES).write_bytes(as_bytes(scales))
                whole = Files(staging)
                texts, most = manifest["golden"]["texts"], whole.facts.max_length
                texts = [text if isinstance(text, str) else tuple(text) for text in texts]
                logits = int8_logits(whole, *whole.tokenizer.encode(texts, max_length=most, truncate=True))
                manifest["int8"] = {"sha256": whole.scales.sha256, "logits": logits.tolist()}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            (staging / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    finally:
        model.train(was_training)
    return sha256


def check_output(directory: str | Path, *, sources: Iterable[Path] = (), overwrite: bool = False) -> Path:
    """Resolves the links of `directory` and checks, before any work is done, that a model may be written there;
    OutputError if not. Creates nothing.

    sources: inputs of the work, which its result may not replace. overwrite: whether a directory that this package did
    not write may be replaced.
    """
    target = place(directory)
    here = Path.cwd()
    if target == here or target in here.parents:
        raise OutputError(f"output {target} is or holds the working directory", fix="choose another -o")
    for source in sources:
        if target == source.resolve() or target in source.resolve().parents:
            raise OutputError(f"output {target} is or holds what it starts from, {source}", fix="choose another -o")
    if target.exists() and not target.is_dir():
        raise OutputError(f"output {target} must be a folder", fix="choose another -o")
    if target.exists() and not (target / MANIFEST).exists() and any(target.iterdir()) and not overwrite:
        raise OutputError(
            f"output {target} exists and is no model directory of this package",
            fix="choose another -o, or give --overwrite to replace it",
        )
    if target.exists():
        require_writable(target)
    require_place(target.parent, target.name)
    return target


def finished(job: Job, directory: Path | None = None) -> dict | None:
    """The figures saved with the job's output (or with `directory`, another output of the job), if that is finished and
    undamaged; None if it still has to be made. OutputError if another job's model or a damaged one is there and may not
    be replaced.
    """
    target = directory or job.output
    try:
        manifest = read_manifest(target) if target.is_dir() else None
        if manifest is None:
            return None
        if manifest["key"] == job.key:
            read_weights(target)  # verifies everything
            if directory is None:
                job.finish()
            return {**manifest["figures"], "weights_sha256": manifest["weights_sha256"]}
    except (CheckpointError, UnsupportedError) as error:
        if not job.overwrite:
            raise OutputError(error.problem, fix="choose another -o, or give --overwrite to make it anew") from error
        return None
    job.refuse(manifest.get("job"), f"{target} was made")
    return None


def _require_finite(model) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"the finished model's {name} has NaN or infinite values", fix="lower --lr, or train longer"
            )
