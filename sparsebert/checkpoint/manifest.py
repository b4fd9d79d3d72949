"""sparsebert/manifest.json: what a model directory held when it was sealed, and which logits it gave then.

`tensors`: dtype, shape, non-zeros and sha256 of each tensor. `files`: sha256 of the other files that decide the
results. `golden`: texts and pairs, their token ids (from format 2 on) and their logits.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsebert.checkpoint.encoding import Text
from sparsebert.checkpoint.files import MIB, REBUILD, Folder
from sparsebert.checkpoint.tensors import TensorFile, sha256_of
from sparsebert.errors import CheckpointError

MANIFEST = "sparsebert/manifest.json"
FORMAT_VERSION = 2
_READ = (1, 2)
LONGEST_GOLDEN = 20_000  # max characters per golden text
MOST_GOLDEN = 64

# These cover casing, accents, other scripts and a pair. `golden_texts` adds one as long as the model allows.
_GOLDEN: tuple[Text, ...] = (
    "a gripping , quietly devastating film .",
    "The Plot makes NO sense: Éloïse's naïve café jokes land with a thud!",
    "你好，世界。 Привет, мир! مرحبا بالعالم",
    ("Stocks FELL on Tuesday as traders weighed the bank's warning.", "growth may be slower than expected"),
    "ok",
)
_WORDS = (
    "it is not often that a story this long keeps the thread of what was said at its beginning until the end ,".split()
)
MOST_GOLDEN_TOKENS = 512
# Max |logit difference| of a correct fp32 kernel, as a share of the largest logit if that is above 1. Another order of
# summation moves a MiniLM's logits by 2e-6; two orders of magnitude more allow for deeper models and lower ISAs.
# tests/test_checkpoint.py shows that faults cause far larger differences.
GOLDEN_TOLERANCE = 5e-4
PORTABLE = "run `sparsebert doctor`, then try SPARSEBERT_ISA=scalar"  # the fix for logits that differ


def golden_texts(max_length: int) -> list[Text]:
    """The golden texts for a model that takes at most `max_length` tokens. The last one is longer and gets cut, or has
    about MOST_GOLDEN_TOKENS tokens.
    """
    count = min(max_length, MOST_GOLDEN_TOKENS)
    return [*_GOLDEN, " ".join(_WORDS[i % len(_WORDS)] for i in range(count))]


def golden_entry(texts: Sequence[Text], ids: Sequence[Sequence[int]], logits: np.ndarray) -> dict:
    """The manifest's entry for these golden texts, their token ids and logits."""
    return {
        "texts": [text if isinstance(text, str) else list(text) for text in texts],
        "ids": [list(row) for row in ids],
        "logits": logits.tolist(),
        "tolerance": GOLDEN_TOLERANCE,
    }


def read(folder: Folder) -> dict | None:
    """The manifest of a directory, checked; None if it has none. Its pairs are tuples."""
    path = folder.path / MANIFEST
    manifest = folder.read_json(MANIFEST, 64 * MIB)
    if manifest is None:
        return None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in _READ:
        raise CheckpointError(
            f"{path}: format_version must be {' or '.join(map(str, _READ))}, got {str(version)[:40]!r}",
            fix="update this package, or make it anew",
        )
    fault = _fault(manifest)
    if fault is not None:
        raise CheckpointError(
            f"{path} must hold valid tensors, files, golden, figures, key and weights_sha256: {fault}", fix=REBUILD
        )
    found = manifest["golden"]
    found["texts"] = [text if isinstance(text, str) else tuple(text) for text in found["texts"]]
    return manifest


def _fault(manifest: dict) -> str | None:
    """The first fault in the structure of a manifest; None if there is none."""
    for name, kind in {
        "tensors": dict,
        "files": dict,
        "golden": dict,
        "figures": dict,
        "key": str,
        "weights_sha256": str,
    }.items():
        if not isinstance(manifest.get(name), kind):
            return name
    fields = {"dtype": str, "shape": list, "nnz": int, "sha256": str}
    for name, tensor in manifest["tensors"].items():
        if not isinstance(tensor, dict) or not all(isinstance(tensor.get(f), kind) for f, kind in fields.items()):
            return f"tensor {name}"
    for name, sha256 in manifest["files"].items():
        if not isinstance(sha256, str) or name != Path(name).name:
            return f"file {name}"
    if (fault := _golden_fault(manifest["golden"], manifest["format_version"])) is not None:
        return fault
    if "int8" in manifest:
        int8 = manifest["int8"]
        if not isinstance(int8, dict) or not isinstance(int8.get("sha256"), str):
            return "int8"
        if not _are_logits(int8.get("logits"), len(manifest["golden"]["texts"])):
            return "int8 golden logits"
    return None


def _are_logits(rows: object, texts: int) -> bool:
    """Whether this is a list of equally many finite numbers for each of the texts."""
    if not (isinstance(rows, list) and len(rows) == texts and all(isinstance(row, list) and row for row in rows)):
        return False
    same = len({len(row) for row in rows}) == 1
    return same and all(type(value) is float and math.isfinite(value) for row in rows for value in row)


def _golden_fault(found: dict, version: int) -> str | None:
    texts, logits, tolerance = found.get("texts"), found.get("logits"), found.get("tolerance")
    if not (isinstance(texts, list) and 1 <= len(texts) <= MOST_GOLDEN):
        return "golden texts"
    for text in texts:
        parts = [text] if isinstance(text, str) else text
        pair = isinstance(parts, list) and (parts is not text or len(parts) == 2)
        if not pair or not all(isinstance(part, str) for part in parts):
            return "golden texts"
        for part in parts:
            if not part.strip() or len(part) > LONGEST_GOLDEN or any("\ud800" <= c <= "\udfff" for c in part):
                return f"a golden text must be 1 to {LONGEST_GOLDEN} characters of valid Unicode"
    if not _are_logits(logits, len(texts)):
        return "golden logits must be finite numbers, as many for each text"
    if type(tolerance) is not float or not math.isfinite(tolerance):
        return "golden tolerance must be a finite number"
    if version >= 2:
        ids = found.get("ids")
        if not (isinstance(ids, list) and len(ids) == len(texts) and all(isinstance(row, list) for row in ids)):
            return "golden ids"
    return None


def verify_tensors(manifest: dict, files: Sequence[tuple[TensorFile, np.ndarray]]) -> None:
    """Raises CheckpointError, naming the tensor, unless the files hold exactly what the manifest says."""
    expected = dict(manifest["tensors"])
    for file, data in files:
        for name, entry in file.entries.items():
            want = expected.pop(name, None)
            if want is None:
                raise CheckpointError(f"{file.path} has tensor {name}, which its manifest does not name", fix=REBUILD)
            if (entry.dtype, list(entry.shape)) != (want["dtype"], want["shape"]):
                raise CheckpointError(
                    f"{file.path}: tensor {name} must be {want['dtype']} {want['shape']}, "
                    f"is {entry.dtype} {list(entry.shape)}",
                    fix=REBUILD,
                )
            if sha256_of(entry, data) != want["sha256"]:
                raise CheckpointError(
                    f"{file.path}: tensor {name} differs from its manifest (sha256), the file is corrupt", fix=REBUILD
                )
    for name in sorted(expected):
        raise CheckpointError(f"{files[0][0].path} lacks tensor {name} {expected[name]['shape']}", fix=REBUILD)


def verify_files(manifest: dict, folder: Folder, contents: dict[str, bytes | None], *, but: str | None = None) -> None:
    """Compares the files other than the weights with the manifest; CheckpointError if one differs, is missing or was
    added. contents: name -> bytes of the files that decide what the model computes, None for a missing one. but: the
    file that may differ.
    """
    for name in sorted(name for name, data in contents.items() if data is not None):
        if name not in manifest["files"] and name != but:
            raise CheckpointError(
                f"{folder.path / name} must be among the files of its manifest, was added after the seal",
                fix="remove it, or copy the directory again from its source",
            )
    for name, sha256 in manifest["files"].items():
        if name == but:
            continue
        data = contents[name] if name in contents else folder.read(name, 2048 * MIB)
        if data is None:
            raise CheckpointError(f"{folder.path} lacks {name}", fix=REBUILD)
        if hashlib.sha256(data).hexdigest() != sha256:
            fix = REBUILD
            if name == "config.json":
                place = shlex.quote(str(folder.path))
                fix = f"restore it, or, if only label names were changed: sparsebert reseal {place}"
            raise CheckpointError(f"{folder.path / name} differs from its manifest (sha256)", fix=fix)


def verify_logits(
    manifest: dict,
    got: np.ndarray,
    path: Path,
    *,
    dtype: str = "fp32",
    relative: float = 0.0,
    mixed: bool = False,
    fix: str = PORTABLE,
) -> None:
    """Raises CheckpointError unless the logits of the golden texts are the manifest's for this dtype, within its
    tolerance. relative: additional tolerance for arithmetic less exact than float32, as a share of the largest logit.
    mixed: whether some linears are in float32. The logits may then differ by twice as much more as the manifest's of
    the two dtypes differ by. fix: of the error.
    """
    found = manifest["golden"]
    want = np.asarray((manifest["int8"] if dtype == "int8" else found)["logits"], dtype=np.float64)
    largest = float(np.abs(want).max())
    error = float(np.abs(got - want).max()) if got.shape == want.shape else math.inf
    allowed = found["tolerance"] * max(1.0, largest) + relative * largest
    if mixed and got.shape == want.shape:
        allowed += 2 * float(np.abs(want - np.asarray(found["logits"], dtype=np.float64)).max())
    if not error <= allowed:
        raise CheckpointError(
            f"{path}: golden logits must agree within {allowed:g}, differ by {error:g}",
            fix=fix,
        )
