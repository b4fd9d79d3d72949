"""Runs a pruned classifier: tokens of all sequences concatenated, the whole encoder in one call, no padding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, environment
from sparsebert.checkpoint import Files
from sparsebert.data import require_texts
from sparsebert.engine import architectures, cache
from sparsebert.engine.costs import LONG, TOKENS, Costs, costs, kind_of
from sparsebert.engine.measure import interleave
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import PackedEncoder, sparse_encoder
from sparsebert.ops.sparse_matmul import (
    Linear,
    Packed,
    PackedRows,
    PackedTiles,
    pack,
    pack_groups,
    pack_tiles,
    places_in_groups,
    sparse_matmul,
)

DTYPES = ("auto", "fp32", "bf16")
# What bf16 may differ from the golden logits by, as a share of the largest of them.
BF16_TOLERANCE = 0.05

Text = str | tuple[str, str] | Sequence[int]


class Engine:
    """A sequence classifier (BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA), read-only after loading; several threads may
    call `logits`.

    >>> engine = Engine.load("sst2-s875")
    >>> engine.logits(["a gripping film", ("a premise", "its hypothesis")])      # float32 [texts, labels]
    """

    def __init__(self, encoders: tuple[PackedEncoder, ...], files: Files, dtype: str, threads: int):
        self.directory, self.config, self.threads = files.directory, files.config, threads
        self._tokenizer, self._facts = files.tokenizer, files.facts
        self.dtype, self.isa = dtype, _dispatch.isa()
        self._encoders = encoders  # for batches of every kind of TOKENS, or one for all
        labels = self.encoder.classifier.weight.n_out
        names = files.config.get("id2label") or {}  # transformers leaves the default names of two labels out
        self.labels = [names.get(str(i), f"LABEL_{i}") for i in range(labels)]

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        batch_invariant: bool = False,
        cached: bool = True,
    ) -> Engine:
        """Loads and verifies a model directory: every tensor against the manifest, then the golden logits. The packed
        form is kept in the user's cache, from where later loads map it, unless `cached` is false.

        dtype: what weights and states are, fp32 or bf16; sums are fp32. auto: bf16 where the processor multiplies it in
        tiles (amx), where alone it is fast. threads: None for the cores this process may use. batch_invariant: one form
        of every linear for all batches, so that a text's logits are the same bits alone and in any; else short batches
        may take another form than long ones where that is faster. Raises CheckpointError for a damaged directory and
        UnsupportedError for a model that the engine does not run.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", fix="pass one of these")
        if dtype == "auto":
            dtype = "bf16" if _dispatch.isa() == "amx" else "fp32"
        threads = _dispatch.threads(threads)
        files = checkpoint.read(directory)
        files.warn_unsealed()
        table = costs(_dispatch.isa())
        settings = {"dtype": dtype} | ({} if dtype == "bf16" else {"costs": asdict(table)})

        def forms(weight: np.ndarray) -> tuple[Packed, ...]:
            return (pack_tiles(weight),) if dtype == "bf16" else pack_cheapest(weight, table)

        def make(weights: dict[str, np.ndarray]) -> tuple[PackedEncoder, ...]:
            return architectures.build(weights, files.facts, forms)

        encoders = cache.packed(files, settings, make) if cached else make(files.weights)
        if environment.isa_cap() is None and (
            _dispatch.isa() == "scalar" or (dtype == "bf16" and _dispatch.isa() not in environment.BF16_ISAS)
        ):
            lacking = "AVX2" if dtype == "fp32" else "AMX and no AVX-512 BF16"
            warnings.warn(
                f"no {lacking} here: the engine runs {dtype} on its portable path, see `sparsebert doctor`",
                stacklevel=2,
            )
        files.require_same()
        engine = cls(encoders[-1:] if batch_invariant else encoders, files, dtype, threads)
        files.verify_golden(engine.forward, relative=BF16_TOLERANCE if dtype == "bf16" else 0.0)
        return engine

    @property
    def encoder(self) -> PackedEncoder:
        """What runs long batches."""
        return self._encoders[-1]

    @property
    def density(self) -> float:
        """Share of non-zeros in the encoder's linears."""
        packed = [linear.weight for linear in self.encoder.linears]
        return sum(w.nnz for w in packed) / sum(w.n_in * w.n_out for w in packed)

    def explain(self, *, measure: bool = False) -> list[dict]:
        """What each linear runs as, first to last: name, shape [n_out, n_in], density, form and kernel in long batches,
        why, and in `short` the form for fewer tokens where it is another, else None.

        measure: also time each, on 128 tokens and one thread, moving them into panels and back included: `gflops`, 10^9
        operations on non-zeros a second, and `share_of_peak`, all operations it does over those that the core could do
        in that dtype undisturbed by memory.
        """
        peak = _dispatch.core().peak_flops(self.isa, self.dtype == "bf16") if measure else None
        if self.dtype == "bf16":
            kernel = self.isa if self.isa in environment.BF16_ISAS else "scalar"
        else:
            kernel = _dispatch.float32_isa(self.isa)
        rows = []
        for i, layer in enumerate(self.encoder.layers):
            for name in ("qkv", "attention_out", "up", "down"):
                linear = getattr(layer, name)
                weight = linear.weight
                form, why = _explained(weight)
                short = _explained(getattr(self._encoders[0].layers[i], name).weight)[0]
                row = {
                    "layer": i, "linear": name, "shape": [weight.n_out, weight.n_in],
                    "density": weight.nnz / (weight.n_in * weight.n_out), "form": form,
                    "short": short if short != form else None,
                    "kernel": f"{kernel} {self.dtype}",
                    "why": why,
                }  # fmt: skip
                if measure:
                    seconds = _seconds(linear, self.isa)
                    row["gflops"] = 2e-9 * weight.nnz * TOKENS[LONG] / seconds
                    row["share_of_peak"] = 2 * weight.stored * TOKENS[LONG] / seconds / peak
                rows.append(row)
        return rows

    def logits(self, texts: Sequence[Text], *, max_length: int | None = None, truncate: bool = False) -> np.ndarray:
        """float32 [texts, labels]. A text is a string, a (text, text_b) pair, or the list of its token ids, special
        tokens included.

        max_length: tokens that a text may have; None for as many as the model has positions, or, with `truncate`, as
        the tokenizer's model_max_length says. truncate: cut longer texts; without it they are an error. Raises
        InputError for what is no list of texts, an empty text, one that is too long, ids out of the vocabulary, and a
        length the model cannot take.
        """
        if isinstance(texts, str) or not all(
            len(text) == 2 for text in texts if isinstance(text, tuple) and not _are_ids(text)
        ):
            raise InputError("texts must be a list of strings or (text, text_b) pairs", fix="put them in a list")
        limit = self.encoder.max_length
        if max_length is None:
            max_length = self._tokenizer.max_length if truncate else limit
        if not 3 <= max_length <= limit:
            raise InputError(f"max_length must be 3 to {limit}, got {max_length}", fix="choose a length in that range")
        if len(texts) == 0:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        if all(_are_ids(text) for text in texts):
            ids = [[int(i) for i in text] for text in texts]
            ids = [row[:max_length] for row in ids] if truncate else ids
            types = [[0] * len(row) for row in ids]
        else:
            require_texts([part for text in texts for part in (text if isinstance(text, tuple) else (text,))])
            ids, types = self._tokenizer.encode(list(texts), max_length=max_length, truncate=truncate)
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > max_length:
            raise InputError(
                f"texts must have at most {max_length} tokens, texts[{longest}] has {len(ids[longest])}",
                fix="pass truncate=True to cut them, or shorten it",
            )
        return self.forward(ids, types)

    def forward(self, ids: list[list[int]], type_ids: list[list[int]]) -> np.ndarray:
        """float32 logits [sequences, labels] of token id lists; every sequence at least one token long. Raises
        CheckpointError where one is not finite.
        """
        starts = np.cumsum([0, *map(len, ids)])
        flat_ids = np.fromiter((i for row in ids for i in row), np.int32, count=starts[-1])
        flat_types = np.zeros_like(flat_ids)
        if len(self.encoder.positions) > 1:  # else the model has one type of token, whatever its tokenizer says
            flat_types = np.fromiter((i for row in type_ids for i in row), np.int32, count=starts[-1])
        encoder = self._encoders[min(kind_of(len(flat_ids)), len(self._encoders) - 1)]
        if self._facts.position_offset and (flat_ids == self._facts.padding).any():
            row = int(np.searchsorted(starts, np.argmax(flat_ids == self._facts.padding), side="right")) - 1
            raise UnsupportedError(
                f"texts[{row}] holds the padding token, id {self._facts.padding}, which {self.config['model_type']} "
                "gives no position of its own",
                fix="take it out of the text",
            )
        logits = sparse_encoder(flat_ids, flat_types, starts, encoder, threads=self.threads, isa=self.isa)
        checkpoint.require_finite(logits, self.directory)
        return logits


def _are_ids(text: Text) -> bool:
    sized = isinstance(text, (list, tuple, np.ndarray))
    return sized and len(text) > 0 and all(isinstance(i, Integral) for i in text)


def pack_cheapest(weight: np.ndarray, table: Costs) -> tuple[Packed, ...]:
    """A float32 weight in the cheapest form for each of TOKENS, packed once a form."""
    forms = {"groups": pack_groups, "dense": partial(pack_groups, whole=True), "rows": pack}
    places = places_in_groups(weight)
    chosen = []
    for rows, groups in zip(table.rows, table.groups, strict=True):
        cost = {"groups": groups * places, "dense": groups * weight.size, "rows": rows * np.count_nonzero(weight)}
        chosen.append(min(cost, key=cost.get))
    made = {form: forms[form](weight) for form in set(chosen)}
    return tuple(made[form] for form in chosen)


def _seconds(linear: Linear, isa: str) -> float:
    """The fastest of some calls."""
    x = np.random.default_rng(0).standard_normal((TOKENS[LONG], linear.weight.n_in), np.float32)
    call = partial(sparse_matmul, x, linear, threads=1, isa=isa)
    return interleave({"linear": call}, rounds=7, warmup=0).minimum("linear")


def _explained(weight: Packed) -> tuple[str, str]:
    """A packed form's name and why it was chosen."""
    size, stored = weight.n_in * weight.n_out, weight.stored
    if isinstance(weight, PackedTiles):
        whole = float((weight.mask_begin < 0).mean())
        return "tiles", f"{stored / size:.0%} of the matrix in tiles, {whole:.0%} of the groups' tiles stored whole"
    if isinstance(weight, PackedRows):
        return "rows", "rows share too few kept columns for groups to be cheaper"
    if len(np.unique(weight.col_begin)) == 1 and stored >= size:
        return "dense", f"{weight.nnz / size:.0%} is kept: without sparsity is cheaper"
    return "groups", f"groups of rows with the same columns; {weight.nnz / stored:.0%} of their places kept"
