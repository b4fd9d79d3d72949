"""Model directories: written whole or not at all, and verified on every load.

A directory is a stock `transformers` one (dense safetensors with explicit zeros, so
`AutoModelForSequenceClassification` loads it unchanged) plus `sparsebert/manifest.json` (sha256, shape and non-zeros of
every tensor, sha256 of the other files, four golden inputs with their logits) and `sparsebert/recipe.yaml` (the
arguments that made it). Importing this package needs neither torch nor transformers.
"""

from sparsebert.checkpoint.classifier import golden_logits, load, shapes
from sparsebert.checkpoint.provenance import ancestors, made_from
from sparsebert.checkpoint.reading import (
    ARCHITECTURES,
    MANIFEST,
    WEIGHTS,
    has_head,
    mapped_arrays,
    read_config,
    read_manifest,
    read_recipe,
    read_weights,
    resolve,
    source_sha256,
    verify_files,
    verify_golden,
    weights_sha256,
)
from sparsebert.checkpoint.writing import GOLDEN_TOLERANCE, check_output, finished, save

__all__ = [
    "ARCHITECTURES",
    "GOLDEN_TOLERANCE",
    "MANIFEST",
    "WEIGHTS",
    "ancestors",
    "check_output",
    "finished",
    "golden_logits",
    "has_head",
    "load",
    "made_from",
    "mapped_arrays",
    "read_config",
    "read_manifest",
    "read_recipe",
    "read_weights",
    "resolve",
    "save",
    "shapes",
    "source_sha256",
    "verify_files",
    "verify_golden",
    "weights_sha256",
]
