"""sparsebert/int8.safetensors: the int8 grids of a model's linears. The weights beside it lie on these grids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sparsebert.checkpoint.files import MIB, REBUILD, Folder
from sparsebert.errors import CheckpointError, InputError
from sparsebert.ops.sparse_matmul import Quantized

SCALES = "sparsebert/int8.safetensors"
PARTS = {"scale": np.float32, "step": np.float32, "zero": np.uint8}  # of a linear's grid, as in Quantized
Arrays = dict[str, np.ndarray]


class Scales:
    """The scales of all linears that run in int8: "<linear>.scale", "<linear>.step" and "<linear>.zero".

    sha256: of the file.
    """

    def __init__(self, data: bytes, path: Path):
        self.path, self.sha256 = path, hashlib.sha256(data).hexdigest()
        try:
            self._arrays = load(data)
        except (SafetensorError, KeyError) as error:  # a KeyError names a dtype that numpy lacks, such as BF16
            raise CheckpointError(f"{path} must be a safetensors file of scales: {error}", fix=REBUILD) from error
        for name, array in self._arrays.items():
            kind = PARTS.get(name.rpartition(".")[2])
            if kind is None or array.dtype != kind or array.ndim != 1:
                raise CheckpointError(
                    f"{path}: {name} must be a 1-d scale, step or zero, is {array.dtype} {list(array.shape)}",
                    fix=REBUILD,
                )

    def grid(self, weight: np.ndarray, names: Sequence[str]) -> Quantized | None:
        """The grid of the weights of these linears, stacked; None if they have no scales. CheckpointError if scales are
        missing, do not fit, or the weights are off the grid.
        """
        parts = {part: [self._arrays.get(f"{name}.{part}") for name in names] for part in PARTS}
        if all(array is None for arrays in parts.values() for array in arrays):
            return None
        for part, arrays in parts.items():
            for name, array in zip(names, arrays, strict=True):
                if array is None:
                    raise CheckpointError(f"{self.path} lacks {name}.{part}", fix=REBUILD)
                if part != "scale" and not np.array_equal(array, arrays[0], equal_nan=True):
                    raise CheckpointError(
                        f"{self.path}: {name}.{part} must equal that of {names[0]}, which has the same input",
                        fix=REBUILD,
                    )
        scale, step, zero = np.concatenate(parts["scale"]), parts["step"][0], parts["zero"][0]
        n_out, n_in = weight.shape
        for part, array, size in (("scale", scale, n_out), ("step", step, n_in), ("zero", zero, n_in)):
            if len(array) != size:
                raise CheckpointError(
                    f"{self.path}: {part} of {', '.join(names)} must have {size} entries, has {len(array)}", fix=REBUILD
                )
        try:
            with np.errstate(divide="ignore"):  # by a scale of 0, which is refused in the end
                return Quantized.of_weight(weight, scale, step, zero)
        except InputError as error:
            raise CheckpointError(f"{self.path}: {', '.join(names)}: {error.problem}", fix=REBUILD) from error


def read(folder: Folder, manifest: dict | None) -> Scales | None:
    """The scales of a directory; None if it has none. CheckpointError if they differ from its manifest."""
    sealed = None if manifest is None else manifest.get("int8")
    data = folder.read(SCALES, 512 * MIB)
    path = folder.path / SCALES
    if sealed is not None and data is None:
        raise CheckpointError(f"{folder.path} lacks {SCALES}", fix=REBUILD)
    if data is None or (manifest is not None and sealed is None):  # a file that the manifest does not know is not ours
        return None
    scales = Scales(data, path)
    if sealed is not None and scales.sha256 != sealed["sha256"]:
        raise CheckpointError(f"{path} differs from its manifest (sha256)", fix=REBUILD)
    return scales


def as_bytes(arrays: Arrays) -> bytes:
    """The file that holds these scales."""
    return save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})
