"""Reads a model directory once, without torch: its contents, and whether they are complete and consistent."""

from __future__ import annotations

import hashlib
import shlex
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from sparsebert import architectures
from sparsebert.architectures import Facts
from sparsebert.checkpoint import manifest as manifests
from sparsebert.checkpoint import missing, names, tokenizer
from sparsebert.checkpoint import scales as grids
from sparsebert.checkpoint.encoding import TextEncoder
from sparsebert.checkpoint.files import MIB, REBUILD, Folder
from sparsebert.checkpoint.manifest import MANIFEST
from sparsebert.checkpoint.missing import WEIGHTS, resolve
from sparsebert.checkpoint.scales import Scales
from sparsebert.checkpoint.tensors import Entry, TensorFile, as_float, content_sha256, table_of
from sparsebert.errors import CheckpointError, InputError, SparsebertWarning, UnsupportedError, first_line, shown

INDEX = "model.safetensors.index.json"
RECIPE = "sparsebert/recipe.yaml"
_FLOATS = ("F64", "F32", "F16", "BF16")


class Files:
    """A model directory in the state in which it was opened. config.json, the manifest and the tokenizer's files are
    read into memory and checked. The weights are read on first use, from the files that were opened at the start. So
    everything belongs together, even if another directory takes this path in the meantime.

    directory: its path. folder: the open folder that reads it. config: config.json.
    facts: what config.json says about the forward pass. manifest: None if the directory is not sealed.
    contents: name -> bytes of config.json and the tokenizer's files, None for a missing file.
    """

    def __init__(self, directory: Path, *, changed: str | None = None):
        """changed: a file that may differ from the manifest."""
        self.directory = directory
        self.folder = Folder(directory)
        contents = {name: self.folder.read(name, 512 * MIB) for name in tokenizer.FILES}
        contents = {"config.json": self.folder.read("config.json", 16 * MIB)} | contents
        self.contents: dict[str, bytes | None] = contents
        self.config = _config(self.folder, contents["config.json"])
        self.facts: Facts = architectures.facts(self.config, directory / "config.json")
        self.manifest = manifests.read(self.folder)
        self._files = self._open_weights()
        missing.no_adapter(self.folder)
        if self.manifest is not None:
            manifests.verify_files(self.manifest, self.folder, contents, but=changed)
        self._entries = self._placed()

    def _open_weights(self) -> list[TensorFile]:
        file = self.folder.open(WEIGHTS)
        if file is not None:
            return [TensorFile(file, self.directory / WEIGHTS)]
        index = self.folder.read_json(INDEX, 64 * MIB)
        if index is None:
            missing.weights(self.folder)
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not all(isinstance(f, str) and f == Path(f).name for f in where.values()):
            raise CheckpointError(f"{self.directory / INDEX} must hold weight_map, tensor -> file", fix=REBUILD)
        opened = []
        for name in sorted(set(where.values())):
            file = self.folder.open(name)
            if file is None:
                raise CheckpointError(f"{self.directory} lacks {name}, which {INDEX} names", fix=REBUILD)
            opened.append(TensorFile(file, self.directory / name))
        for file in opened:
            listed = {tensor for tensor, name in where.items() if name == file.path.name}
            for tensor in sorted(listed ^ file.entries.keys()):
                fault = "lacks" if tensor in listed else "has, beside what its index says,"
                raise CheckpointError(f"{file.path} {fault} tensor {tensor}", fix=REBUILD)
        return opened

    def _placed(self) -> dict[str, list[tuple[int, Entry]]]:
        """Stock name of each tensor to read -> its places, each a file's number and entry. If there are two, the tensor
        is their product.
        """
        held = {name: (i, entry) for i, file in enumerate(self._files) for name, entry in file.entries.items()}
        path = self._files[0].path if len(self._files) == 1 else self.directory
        stock = names.canonical(held, self.facts.architecture, path)
        names.require_places(stock, self.facts, path)
        placed: dict[str, list[tuple[int, Entry]]] = {}
        wanted = dict(self.facts.encoder_tensors())
        heads = self.facts.head_tensors()
        for name, shape in (wanted | heads).items():
            parts = [name] if name in stock else [f"{name}_orig", f"{name}_mask"]
            if not all(part in stock for part in parts):
                if name in wanted:
                    raise CheckpointError(f"{path} lacks tensor {name}, {shape} expected", fix=REBUILD)
                continue
            placed[name] = [held[stock[part]] for part in parts]
            for part, (_, entry) in zip(parts, placed[name], strict=True):
                if entry.dtype not in _FLOATS:
                    raise UnsupportedError(
                        f"{path}: tensor {stock[part]} must have a dtype of {', '.join(_FLOATS)}, has {entry.dtype}",
                        fix="save the model in float32",
                    )
                if entry.shape != shape and name in wanted:
                    raise CheckpointError(
                        f"{path}: tensor {stock[part]} must have the shape {list(shape)} by config.json, "
                        f"has {list(entry.shape)}",
                        fix="correct config.json to what the weights were saved with, or restore both",
                    )
        return placed

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold the weights."""
        return [file.path.name for file in self._files]

    @property
    def has_head(self) -> bool:
        """Whether the directory holds a classifier, not only an encoder."""
        return f"{self.facts.architecture.classifier}.weight" in self._entries

    def require_head(self) -> None:
        """Raises CheckpointError unless it is a complete classifier for the labels that config.json names."""
        shapes = self.facts.head_tensors()
        absent = sorted(shapes.keys() - self._entries.keys())
        if absent:
            raise CheckpointError(
                f"{self.directory} must be a complete classifier, lacks {', '.join(absent)}",
                fix=f"fine-tune it first: sparsebert train {shlex.quote(str(self.directory))}",
            )
        for name, shape in shapes.items():
            for _, entry in self._entries[name]:
                if entry.shape != shape:
                    raise CheckpointError(
                        f"{self.directory}: tensor {name} must have the shape {list(shape)} by config.json, "
                        f"has {list(entry.shape)}",
                        fix="correct id2label in config.json, or fine-tune the model",
                    )

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Stock name -> float32 array, of the encoder's tensors and those of the head that are present. The arrays are
        in memory, not mapped, have only finite values, and match the manifest if there is one.
        """
        data = self._data
        found = {}
        for name, parts in self._entries.items():
            arrays = [np.require(as_float(entry, data[i]), np.float32, "AC") for i, entry in parts]
            found[name] = arrays[0] if len(arrays) == 1 else arrays[0] * arrays[1]
            if not np.isfinite(found[name]).all():
                bad = int(found[name].size - np.isfinite(found[name]).sum())
                raise CheckpointError(
                    f"{self._files[parts[0][0]].path}: tensor {name} must be finite in float32, has {bad} NaN or "
                    "infinite values",
                    fix="restore the weights from a good copy",
                )
        return found

    @cached_property
    def scales(self) -> Scales | None:
        """The int8 scales; None for a model that was not made for int8."""
        return grids.read(self.folder, self.manifest)

    def require_scales(self) -> Scales:
        """The int8 scales; InputError if there are none."""
        if self.scales is None:
            place = shlex.quote(str(self.directory))
            raise InputError(
                f"{self.directory} has no int8 scales", fix=f"make them: sparsebert quantize {place} --task TASK -o DIR"
            )
        return self.scales

    @cached_property
    def _data(self) -> list[np.ndarray]:
        data = [file.read() for file in self._files]
        if self.manifest is not None:
            manifests.verify_tensors(self.manifest, list(zip(self._files, data, strict=True)))
        return data

    @cached_property
    def tensors(self) -> dict[str, dict]:
        """Name in the file -> dtype, shape, non-zeros and sha256 of every tensor, as in a manifest."""
        found: dict[str, dict] = {}
        for file, data in zip(self._files, self._data, strict=True):
            found |= table_of(file, data)
        return found

    @cached_property
    def weights_sha256(self) -> str:
        """Content hash over every tensor's name, dtype, shape and bytes; independent of the files' layout. For a sealed
        directory it is taken from the manifest, with which reading `weights` compares the tensors.
        """
        return self.manifest["weights_sha256"] if self.manifest is not None else content_sha256(self.tensors)

    @cached_property
    def content_sha256(self) -> str:
        """Content hash of everything that decides what the model computes: weights, config.json, tokenizer."""
        digest = hashlib.sha256(content_sha256(self.tensors).encode())
        for name, data in self.contents.items():
            if data is not None:
                digest.update(f"{name}\0".encode() + data)
        return digest.hexdigest()

    @property
    def state(self) -> list[list[int]]:
        """Size, times, inode and device of each weights file: they stay the same until somebody writes a file."""
        return self.folder.state(self.weight_files)

    @cached_property
    def tokenizer(self) -> TextEncoder:
        """Converts texts to token ids as stock `transformers` does with this directory."""
        return tokenizer.read(self.contents, self.config, self.facts, self.directory)

    def warn_unsealed(self) -> None:
        """Warns that damage to a directory without a manifest would go unnoticed."""
        if self.manifest is None:
            seal = f"sparsebert seal {shlex.quote(str(self.directory))}"
            warnings.warn(
                f"{self.directory} is unsealed: damage would go unnoticed; run {seal}", SparsebertWarning, stacklevel=3
            )

    def require_same(self) -> None:
        """Raises CheckpointError if a file has changed since it was read."""
        self.folder.require_same()

    def require_seal(self) -> None:
        """Raises CheckpointError if the directory was sealed, according to its config.json, but has no manifest."""
        summary = self.config.get("sparsebert") or {}
        if self.manifest is None and summary.get("weights_sha256"):
            raise CheckpointError(
                f"{self.directory} has lost {MANIFEST}, config.json says it was sealed",
                fix=f"copy the folder {Path(MANIFEST).parent} from its source, or check the weights against the hash "
                f"in config.json: sparsebert seal {shlex.quote(str(self.directory))}",
            )

    def verify_golden(
        self,
        logits: Callable[[list[list[int]], list[list[int]]], np.ndarray],
        *,
        dtype: str = "fp32",
        relative: float = 0.0,
        mixed: bool = False,
        fix: str = manifests.PORTABLE,
    ) -> None:
        """Compares token ids and logits of the manifest's golden texts with those computed now; does nothing without a
        manifest. logits: function from token ids and token types to logits. dtype: int8 has logits of its own.
        relative: additional tolerance for arithmetic less exact than float32, as a share of the largest logit. mixed:
        whether some linears are in float32 and the others in `dtype`. fix: of the error for
        logits that differ.
        """
        if self.manifest is None:
            return
        golden = self.manifest["golden"]
        ids, types = self.tokenizer.encode(golden["texts"], max_length=self.facts.max_length, truncate=True)
        require_ids(golden["texts"], ids, golden.get("ids", ids), self.directory)
        got = logits(ids, types)
        manifests.verify_logits(
            self.manifest, got, self.directory, dtype=dtype, relative=relative, mixed=mixed, fix=fix
        )


def require_finite(logits: np.ndarray, directory: str | Path, first: int = 0) -> None:
    """Raises CheckpointError, naming the text, if a model's logits [texts, labels] are not all finite. first: number of
    the first text.
    """
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise CheckpointError(
            f"{directory}: logits must be finite, those of texts[{first + row}] are {shown(logits[row].tolist())}: "
            "the weights overflow float32",
            fix="restore the weights and config.json from a good copy",
        )


def require_ids(texts: Sequence, got: Sequence[list[int]], want: Sequence[list[int]], directory: Path) -> None:
    """Raises CheckpointError if the token ids of a golden text differ from the expected ones."""
    for text, a, b in zip(texts, got, want, strict=True):
        if list(a) != list(b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise CheckpointError(
                f"{directory}: the tokens of {shown(text)} must be those of transformers, differ from number {at} on: "
                f"{shown(list(a)[at : at + 4])}, not {shown(list(b)[at : at + 4])}",
                fix="save the tokenizer anew: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )


def read(directory: str | Path, *, head: bool = True) -> Files:
    """Opens a model directory. Its weights are read and verified on first use.

    head: True requires a complete classifier. False accepts an encoder; a head that is there is read as well. Raises
    CheckpointError and UnsupportedError, naming file and field or tensor.
    """
    files = Files(resolve(directory).absolute())
    files.require_seal()
    _ = files.scales  # compared with the manifest, in whatever dtype the model will run
    if head:
        files.require_head()
    return files


def read_config(directory: str | Path) -> dict:
    """config.json of a model directory, with its fields checked."""
    folder = Folder(resolve(directory))
    config = _config(folder, folder.read("config.json", 16 * MIB))
    architectures.facts(config, folder.path / "config.json")
    return config


def read_manifest(directory: Path) -> dict | None:
    """The manifest of a sealed directory; None for a stock model directory."""
    return manifests.read(Folder(directory)) if directory.is_dir() else None


def read_recipe(directory: Path) -> dict:
    """The recipe of a directory that this package wrote; CheckpointError if it has none."""
    import yaml

    path = directory / RECIPE
    data = Folder(directory).read(RECIPE, MIB)
    try:
        recipe = yaml.safe_load(b"" if data is None else data)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} must be a YAML file in UTF-8: {first_line(error)}", fix=REBUILD) from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(recipe).__name__}", fix=REBUILD)
    return recipe


def read_weights(directory: str | Path) -> dict[str, np.ndarray]:
    """`Files.weights` of a directory."""
    return read(directory, head=False).weights


def has_head(directory: str | Path) -> bool:
    """`Files.has_head` of a directory."""
    return read(directory, head=False).has_head


def weights_sha256(directory: str | Path) -> str:
    """The content hash of a directory's weights, computed from the files, not taken from the manifest."""
    return content_sha256(read(directory, head=False).tensors)


def source_sha256(directory: str | Path) -> str:
    """`Files.content_sha256` of a directory, for the keys of jobs."""
    return read(directory, head=False).content_sha256


def _config(folder: Folder, data: bytes | None) -> dict:
    path = folder.path / "config.json"
    if data is None:
        missing.config(folder)
    config = tokenizer.parse_json(data, path)
    if not isinstance(config, dict):
        raise UnsupportedError(f"{path} must hold an object with model_type, got {shown(config)}", fix="check the path")
    return config
