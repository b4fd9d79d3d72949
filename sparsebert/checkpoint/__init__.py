"""Model directories: written whole or not at all, and verified on every load.

A directory is a stock `transformers` one (dense safetensors with explicit zeros, so
`AutoModelForSequenceClassification` loads it unchanged) plus `sparsebert/manifest.json` (sha256, shape and non-zeros of
every tensor, sha256 of the other files, golden texts with their token ids and logits) and `sparsebert/recipe.yaml` (the
arguments that made it). `read` opens a directory. Importing this package needs neither torch nor transformers.
"""

from sparsebert.checkpoint.classifier import (
    golden_logits,
    load,
    load_config,
    load_tokenizer,
    require_model,
    saved_bytes,
    shapes,
)
from sparsebert.checkpoint.encoding import TextEncoder
from sparsebert.checkpoint.files import Changed
from sparsebert.checkpoint.manifest import GOLDEN_TOLERANCE, MANIFEST
from sparsebert.checkpoint.missing import PACKAGED, WEIGHTS, resolve
from sparsebert.checkpoint.provenance import ancestors, made_from
from sparsebert.checkpoint.reading import (
    Files,
    has_head,
    read,
    read_config,
    read_manifest,
    read_recipe,
    read_weights,
    require_finite,
    source_sha256,
    weights_sha256,
)
from sparsebert.checkpoint.sealing import reseal, seal
from sparsebert.checkpoint.tensors import mapped_arrays
from sparsebert.checkpoint.tokenizer import piecewise
from sparsebert.checkpoint.writing import check_output, finished, save

__all__ = [
    "GOLDEN_TOLERANCE",
    "MANIFEST",
    "PACKAGED",
    "WEIGHTS",
    "Changed",
    "Files",
    "TextEncoder",
    "ancestors",
    "check_output",
    "finished",
    "golden_logits",
    "has_head",
    "load",
    "load_config",
    "load_tokenizer",
    "made_from",
    "mapped_arrays",
    "piecewise",
    "read",
    "read_config",
    "read_manifest",
    "read_recipe",
    "read_weights",
    "require_finite",
    "require_model",
    "reseal",
    "resolve",
    "save",
    "saved_bytes",
    "seal",
    "shapes",
    "source_sha256",
    "weights_sha256",
]
