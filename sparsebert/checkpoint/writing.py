"""Writing a model directory: whole or not at all, with its manifest and recipe."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from pathlib import Path

import sparsebert
from sparsebert.checkpoint.classifier import golden_logits, quiet_transformers
from sparsebert.checkpoint.reading import FORMAT_VERSION, MANIFEST, WEIGHTS, content_sha256, tensor_table
from sparsebert.errors import OutputError

RECIPE = "sparsebert/recipe.yaml"

GOLDEN_TEXTS = (
    "a gripping , quietly devastating film .",
    "the plot makes no sense and the jokes land with a thud .",
    "stocks fell on tuesday as traders weighed the bank's warning about slower growth .",
    "ok",
)
# Largest |logit difference| a correct fp32 kernel may show. Another order of sums moves a MiniLM's logits by 2e-6;
# deeper models and lower ISAs get two orders of magnitude of room. tests/test_checkpoint.py shows a fault is far above.
GOLDEN_TOLERANCE = 5e-4


def save(
    model, tokenizer, directory: str | Path, *, recipe: dict, key: str, figures: dict, summary: dict | None = None
) -> str:
    """Writes a model directory, whole or not at all, and returns the sha256 of its weights.

    recipe: the arguments that made it (recipe.yaml). key: the ledger key of that work, and figures: what it measured,
    both for `finished`.
    summary: method, pattern and sparsity, for config.json["sparsebert"]. An older directory written by this package is
    replaced in one step; anything else at that place is an OutputError.
    """
    import torch
    import transformers
    import yaml
    from safetensors import SafetensorError

    target = check_output(directory)
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    was_training = model.training
    model.eval()
    try:
        with quiet_transformers():
            (staging / "sparsebert").mkdir(parents=True)
            model.save_pretrained(staging, safe_serialization=True)
            tokenizer.save_pretrained(staging)
        table = tensor_table(staging / WEIGHTS)
        sha256 = content_sha256(table)
        model.config.sparsebert = {"format_version": FORMAT_VERSION, **(summary or {}), "weights_sha256": sha256}
        model.config.save_pretrained(staging)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(staging.iterdir())
            if path.is_file() and path.name != WEIGHTS
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "versions": {
                "sparsebert": sparsebert.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "key": key,
            "figures": figures,
            "weights_sha256": sha256,
            "tensors": table,
            "files": files,
            "golden": {
                "texts": list(GOLDEN_TEXTS),
                "logits": golden_logits(model, tokenizer, GOLDEN_TEXTS).tolist(),
                "tolerance": GOLDEN_TOLERANCE,
            },
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        (staging / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        _settle(staging)
        replace_directory(staging, target)
    except (OSError, SafetensorError) as error:  # safetensors has a name of its own for a full disk
        raise OutputError(
            f"{target} cannot be written: {error}", fix="free space or choose another output directory"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        model.train(was_training)
    return sha256


def check_output(directory: str | Path) -> Path:
    """`directory` as an absolute path that a model may be written to; OutputError before any work is done where it may
    not.
    """
    target = Path(directory).absolute()
    if target.exists() and not (target / MANIFEST).exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"output {target} exists and is no model directory of this package", fix="choose another -o, or remove it"
        )
    for path in (target, target.parent):
        # The mode is asked as well: root may write anywhere, and a directory marked read-only is so by someone's wish.
        if path.exists() and not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
            raise OutputError(f"output directory {path} is read-only", fix="choose another -o, or make it writable")
    probe = target.parent / f".{target.name}.probe-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"output {target} cannot be written: {error.strerror}", fix="choose another -o") from error
    for orphan in target.parent.glob(f".{target.name}.tmp-*"):  # what a killed process left; a live one keeps its own
        if not Path(f"/proc/{orphan.name.rpartition('-')[2]}").exists():
            shutil.rmtree(orphan, ignore_errors=True)
    return target


def replace_directory(staging: Path, target: Path) -> None:
    """Puts `staging` in the place of `target` in one step: a process killed at any moment leaves the old one or the new
    one.
    """
    if not target.exists():
        os.rename(staging, target)
    else:
        at_fdcwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(at_fdcwd, os.fsencode(staging), at_fdcwd, os.fsencode(target), rename_exchange) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(target))
        shutil.rmtree(staging)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _settle(directory: Path) -> None:
    """Flushes every file to disk and gives it the umask's mode: safetensors writes 0600, which another user's server
    cannot read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [*directory.rglob("*"), directory]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
