"""Seals model directories: new ones, stock ones, and ones whose label names were corrected."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import sparsebert
from sparsebert import heads
from sparsebert.checkpoint.classifier import build, logits_function
from sparsebert.checkpoint.classifier import golden as golden_of
from sparsebert.checkpoint.manifest import FORMAT_VERSION, MANIFEST
from sparsebert.checkpoint.missing import resolve
from sparsebert.checkpoint.reading import INDEX, RECIPE, Files
from sparsebert.checkpoint.scales import SCALES
from sparsebert.errors import CheckpointError, InputError, shown
from sparsebert.jobs import Job, write


def manifest_of(files: Files, model, tokenizer, hashes: dict[str, str], *, job: Job | None, figures: dict) -> dict:
    """The manifest of a directory that holds this model. hashes: sha256 of its other files. job: the job that made it.
    figures: what that job measured.
    """
    import torch
    import transformers

    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "sparsebert": sparsebert.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "key": "" if job is None else job.key,
        "job": None if job is None else job.record,
        "figures": figures,
        "weights_sha256": files.weights_sha256,
        "facts": _meaning(files),
        "tensors": files.tensors,
        "files": hashes,
        "golden": golden_of(files, model, tokenizer),
    }


def seal(directory: str | Path) -> dict:
    """Writes a manifest and a recipe into a stock directory; from then on every load compares it with the manifest. No
    other file is changed. A sealed directory that has lost its manifest gets a new one if its weights still have the
    hash in config.json. Returns directory, weights_sha256, and the number of tensors.
    """
    files = Files(resolve(directory).absolute())
    files.require_head()
    if files.manifest is not None:
        raise InputError(
            f"{files.directory} is sealed already",
            fix=f"if label names in config.json were changed: sparsebert reseal {shlex.quote(str(files.directory))}",
        )
    if files.scales is not None:
        raise InputError(
            f"{files.directory} holds {SCALES}, whose golden logits are lost with its manifest",
            fix="remove that file and seal again, or make the model again with sparsebert quantize",
        )
    said = (files.config.get("sparsebert") or {}).get("weights_sha256")
    if said is not None and said != files.weights_sha256:
        raise CheckpointError(
            f"{files.directory}: weights must have the sha256 in config.json, {shown(said)}, have "
            f"{files.weights_sha256}",
            fix="copy the directory again, or, if they were changed on purpose, remove the field sparsebert from "
            "config.json",
        )
    model, tokenizer = build(files)
    names = [name for name, data in files.contents.items() if data is not None]
    hashes = {name: hashlib.sha256(files.contents[name]).hexdigest() for name in names}
    if INDEX in files.folder.names() and len(files.weight_files) > 1:
        hashes[INDEX] = hashlib.sha256((files.directory / INDEX).read_bytes()).hexdigest()
    manifest = manifest_of(files, model, tokenizer, hashes, job=None, figures={})
    files.require_same()
    write(files.directory / RECIPE, "command: seal\n")
    write(files.directory / MANIFEST, json.dumps(manifest, indent=1))
    return {
        "directory": str(files.directory), "weights_sha256": files.weights_sha256, "tensors": len(files.tensors),
    }  # fmt: skip


def reseal(directory: str | Path, *, labels: Sequence[str] | None = None) -> dict:
    """Accepts a config.json with corrected label names, or with changes in fields that do not affect the logits;
    weights and tokenizer must be the sealed ones. labels: first writes these names into config.json.

    Returns directory, labels, and whether anything changed. Raises InputError for names that do not fit, and
    CheckpointError, naming it, for any other difference.
    """
    files = Files(resolve(directory).absolute(), changed="config.json")
    if files.manifest is None:
        place = shlex.quote(str(files.directory))
        raise InputError(f"{files.directory} is not sealed", fix=f"seal it: sparsebert seal {place}")
    config, data = dict(files.config), files.contents["config.json"]
    if labels is not None:
        _require_names(labels, files)
        config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        config["label2id"] = {name: i for i, name in enumerate(labels)}
        data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    sealed, now = files.manifest.get("facts", {}), _meaning(files)
    for field in sorted(sealed.keys() & now.keys()):
        if sealed[field] != now[field]:
            raise CheckpointError(
                f"{files.directory / 'config.json'}: {field} was {shown(sealed[field])} when it was sealed, is "
                f"{shown(now[field])}",
                fix="restore that field; only names of labels may differ",
            )
    _ = files.scales  # compared with the manifest, and so are weights and tokenizer
    model, _ = build(files)
    files.verify_golden(logits_function(files, model))
    old = files.manifest["files"].get("config.json")
    files.manifest["files"]["config.json"] = hashlib.sha256(data).hexdigest()
    files.require_same()
    if data != files.contents["config.json"]:
        write(files.directory / "config.json", data)
    # If killed between the two writes, the directory is refused on load, and the same command repairs it.
    write(files.directory / MANIFEST, json.dumps(files.manifest, indent=1))
    found = list(heads.label_names(config))
    changed = old != files.manifest["files"]["config.json"]
    return {"directory": str(files.directory), "labels": found, "changed": changed}


def _require_names(labels: Sequence[str], files: Files) -> None:
    if len(labels) != files.facts.labels:
        raise InputError(
            f"--labels must name {files.facts.labels} labels, names {len(labels)}", fix="name one per output, in order"
        )
    if not all(isinstance(name, str) and name.strip() for name in labels) or len(set(map(heads.fold, labels))) < len(
        labels
    ):
        raise InputError(f"--labels must be different names, got {shown(list(labels))}", fix="name each output once")


def _meaning(files: Files) -> dict:
    """The fields of config.json that decide the logits or what the logits mean."""
    facts = asdict(files.facts)
    facts["architecture"] = files.facts.architecture.kind
    declared = files.config.get("dtype") or files.config.get("torch_dtype")  # decides the precision of "auto"
    return facts | {"problem_type": files.config.get("problem_type"), "dtype": declared}
