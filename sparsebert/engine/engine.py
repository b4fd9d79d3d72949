"""Runs a pruned classifier: tokens of all sequences concatenated, the whole encoder in one call, no padding."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparsebert import checkpoint, environment
from sparsebert.data import require_texts
from sparsebert.engine import architectures
from sparsebert.errors import CheckpointError, InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import sparse_encoder
from sparsebert.ops.sparse_matmul import (
    Packed,
    PackedTiles,
    PackedWeight,
    pack,
    pack_groups,
    pack_tiles,
    places_in_groups,
)

# What a kept entry costs in rows of their own, against one in groups of rows, filled places counted.
ROWS_COST = 1.6
DTYPES = ("auto", "fp32", "bf16")
# What bf16 may differ from the golden logits by, as a share of the largest of them.
BF16_TOLERANCE = 0.05


class Engine:
    """A sequence classifier (BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA), read-only after loading; several threads may
    call `logits`.

    >>> engine = Engine.load("sst2-s875")
    >>> engine.logits(["a gripping film", ("a premise", "its hypothesis")])      # float32 [texts, labels]
    """

    def __init__(self, weights: dict[str, np.ndarray], config: dict, tokenizer: Tokenizer, dtype: str, threads: int):
        self.config, self.threads, self._tokenizer, self._lock = config, threads, tokenizer, threading.Lock()
        self.dtype, self.isa = dtype, _dispatch.isa()
        self.encoder = architectures.build(weights, config, pack_tiles if dtype == "bf16" else pack_fastest)
        labels = self.encoder.classifier.weight.n_out
        names = config.get("id2label", {})  # transformers leaves the default names of two labels out
        self.labels = [names.get(str(i), f"LABEL_{i}") for i in range(labels)]

    @classmethod
    def load(cls, directory: str | Path, *, dtype: str = "auto", threads: int | None = None) -> Engine:
        """Loads and verifies a model directory: every tensor against the manifest, then the golden logits.

        dtype: what weights and states are, fp32 or bf16; sums are fp32. auto: bf16 where the processor multiplies it in
        tiles (amx), where alone it is fast. threads: None for the cores this process may use. Raises CheckpointError
        for a damaged directory and UnsupportedError for a model that the engine does not run.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", fix="pass one of these")
        if dtype == "auto":
            dtype = "bf16" if _dispatch.isa() == "amx" else "fp32"
        directory = checkpoint.resolve(directory)
        weights = checkpoint.read_weights(directory)
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{directory}/tokenizer.json must be a tokenizer: {error}", fix="restore the file"
            ) from error
        tokenizer.no_padding()
        if environment.isa_cap() is None and (
            _dispatch.isa() == "scalar" or (dtype == "bf16" and _dispatch.isa() != "amx")
        ):
            lacking = "AVX2" if dtype == "fp32" else "AMX"
            warnings.warn(
                f"no {lacking} here: the engine runs {dtype} on its portable path, see `sparsebert doctor`",
                stacklevel=2,
            )
        engine = cls(weights, checkpoint.read_config(directory), tokenizer, dtype, _dispatch.threads(threads))
        # At full length, as the golden logits were made.
        limit = engine.encoder.max_length
        relative = BF16_TOLERANCE if dtype == "bf16" else 0.0
        checkpoint.verify_golden(directory, lambda texts: engine.logits(texts, max_length=limit), relative=relative)
        return engine

    @property
    def density(self) -> float:
        """Share of non-zeros in the encoder's linears."""
        packed = [linear.weight for linear in self.encoder.linears]
        return sum(w.nnz for w in packed) / sum(w.n_in * w.n_out for w in packed)

    def explain(self) -> list[dict]:
        """What each linear runs as, first to last: name, shape [n_out, n_in], density, form and kernel, and why."""
        rows = []
        for i, layer in enumerate(self.encoder.layers):
            for name in ("qkv", "attention_out", "up", "down"):
                weight = getattr(layer, name).weight
                form, why = _explained(weight)
                rows.append({
                    "layer": i, "linear": name, "shape": [weight.n_out, weight.n_in],
                    "density": weight.nnz / (weight.n_in * weight.n_out), "form": form,
                    "kernel": f"{self.isa if self.dtype == 'fp32' or self.isa == 'amx' else 'scalar'} {self.dtype}",
                    "why": why,
                })  # fmt: skip
        return rows

    def logits(self, texts: list[str | tuple[str, str]], *, max_length: int | None = None) -> np.ndarray:
        """float32 [texts, labels]. A text is a string or a (text, text_b) pair.

        max_length: tokens kept of a text; None for the length the model was trained at, or 128 where its directory does
        not say. Raises InputError for what is no list of texts, an empty text, and a length the model cannot take.
        """
        if isinstance(texts, str) or not all(len(text) == 2 for text in texts if isinstance(text, tuple)):
            raise InputError("texts must be a list of strings or (text, text_b) pairs", fix="put them in a list")
        require_texts([part for text in texts for part in (text if isinstance(text, tuple) else (text,))])
        limit = self.encoder.max_length
        if max_length is None:
            max_length = min(limit, self.config.get("sparsebert", {}).get("max_length", 128))
        if not 3 <= max_length <= limit:
            raise InputError(f"max_length must be 3 to {limit}, got {max_length}", fix="choose a length in that range")
        if not texts:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        with self._lock:  # the tokenizer keeps the length between the two calls
            self._tokenizer.enable_truncation(max_length)
            encoded = self._tokenizer.encode_batch(texts)
        return self.forward([row.ids for row in encoded], [row.type_ids for row in encoded])

    def forward(self, ids: list[list[int]], type_ids: list[list[int]]) -> np.ndarray:
        """float32 logits [sequences, labels] of token id lists; every sequence at least one token long."""
        starts = np.cumsum([0, *map(len, ids)])
        flat_ids = np.fromiter((i for row in ids for i in row), np.int32, count=starts[-1])
        flat_types = np.zeros_like(flat_ids)
        if len(self.encoder.positions) > 1:  # else the model has one type of token, whatever its tokenizer says
            flat_types = np.fromiter((i for row in type_ids for i in row), np.int32, count=starts[-1])
        return sparse_encoder(flat_ids, flat_types, starts, self.encoder, threads=self.threads, isa=self.isa)


def pack_fastest(weight: np.ndarray) -> Packed:
    """A float32 weight in the packed form that runs faster."""
    return (pack_groups if places_in_groups(weight) < ROWS_COST * np.count_nonzero(weight) else pack)(weight)


def _explained(weight: Packed) -> tuple[str, str]:
    """A packed form's name and why it was chosen."""
    size = weight.n_in * weight.n_out
    if isinstance(weight, PackedTiles):
        whole = float((weight.mask_begin < 0).mean())
        stored = (
            weight.tiles.astype(np.int64) @ weight.chunks * (_dispatch.core().TILE_ROWS * _dispatch.core().TILE_COLS)
        )
        return "tiles", f"{stored / size:.0%} of the matrix in tiles, {whole:.0%} of the groups' tiles stored whole"
    if isinstance(weight, PackedWeight):
        return "rows", "rows share too few kept columns for groups to be cheaper"
    stored = weight.values.size
    if len(np.unique(weight.col_begin)) == 1 and stored >= size:
        return "dense", f"{weight.nnz / size:.0%} is kept: without sparsity is cheaper"
    return "groups", f"groups of rows with the same columns; {weight.nnz / stored:.0%} of their places kept"
