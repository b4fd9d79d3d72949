"""Runs a pruned classifier: tokens of all sequences concatenated, the whole encoder in one call, no padding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, environment, heads, machine
from sparsebert.checkpoint import Changed, Files
from sparsebert.engine import architectures, cache, inputs
from sparsebert.engine.costs import LONG, TOKENS, Costs, costs, kind_of
from sparsebert.engine.formats import DTYPES, FORM_DTYPES, explained, has_choice, pack_cheapest
from sparsebert.engine.measure import interleave
from sparsebert.errors import CheckpointError, InputError, SparsebertWarning, UnsupportedError, shown
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import LINEARS, PackedEncoder, clipped_inputs, sparse_encoder
from sparsebert.ops.sparse_matmul import Linear, Packed, PackedInt8, sparse_matmul

Text = str | tuple[str, str] | Sequence[str] | Sequence[int]
DEVICES = r"cpu|cuda(:\d{1,3})?"


class Engine:
    """A sequence classifier (BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA), read-only after loading: any number of threads
    may call `logits` at once, and so may a signal handler and the children of a fork. Pickling stores its directory and
    settings; unpickling loads it again.

    >>> engine = Engine.load("sst2-s875")
    >>> engine.logits(["a gripping film", ("a premise", "its hypothesis")])      # float32 [texts, labels]
    """

    def __init__(self, encoders: tuple[PackedEncoder, ...], files: Files, settings: dict, dtype: str):
        self.directory, self.config, self._settings = files.directory, files.config, settings
        self._inputs, self._facts = inputs.Inputs(files), files.facts
        self.threads, self.dtype, self.isa = _dispatch.threads(settings["threads"]), dtype, _dispatch.isa()
        self._encoders = cache.shared(encoders)  # one for each of TOKENS, or one for all batches
        self.problem, self.labels = heads.problem_of(self.config), list(heads.label_names(self.config))

    def __repr__(self) -> str:
        kind = f"{self.config['model_type']}, {len(self.labels)} labels, {self.dtype}, {self.threads} threads"
        return f"<Engine {shown(str(self.directory))}: {kind}>"

    def __reduce__(self):
        return partial(Engine.load, **self._settings), (self.directory,)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        batch_invariant: bool = False,
        cached: bool = True,
        device: str = "cpu",
    ) -> Engine:
        """Loads a model directory and verifies it: every tensor against the manifest, then the golden logits with every
        encoder that the engine may use. The packed form is kept in the user's cache, and later loads map it from there,
        unless `cached` is false. If the directory is replaced meanwhile, it is loaded once more.

        dtype: of weights and states, fp32 or bf16; sums are fp32. int8: of weights and of the linears' inputs, for a
        model that was made for it (`sparsebert quantize`, `prune --int8`). auto: int8 for such a model; bf16 if `dtype`
        in config.json is bfloat16 and the processor multiplies it in tiles (amx), as it is fast only there; else fp32,
        and on processors without AVX2. threads: None for the cores this process may use. batch_invariant: use one form
        of every linear for all batches, so that a text's logits have the same bits alone and in any batch; otherwise
        short batches may use another form than long ones if that is faster. device: cpu, cuda for torch's current
        NVIDIA GPU, or cuda:N for its GPU N, see `sparsebert.engine.cuda`. Raises CheckpointError for a damaged
        directory and UnsupportedError for a model that the engine does not run, or a device that is not here.
        """
        if dtype not in (known := ("auto", *DTYPES)):
            raise InputError(f"dtype must be one of {', '.join(known)}, got {shown(dtype)}", fix="pass one of these")
        if not isinstance(device, str) or not re.fullmatch(DEVICES, device, re.ASCII):
            raise InputError(f"device must be cpu, cuda or cuda:N, got {shown(device)}", fix="pass one of these")
        settings = {
            "dtype": dtype,
            "threads": None if threads is None else _dispatch.threads(threads),
            "batch_invariant": batch_invariant,
            "cached": cached,
            "device": device,
        }
        kind = cls if device == "cpu" else _cuda_engine(settings)
        try:
            engine = kind._read(directory, settings)
        except Changed:  # the model was being replaced, which is done now
            engine = kind._read(directory, settings)
        if device == "cpu":
            _warn_of_portable_path(engine.dtype)
        return engine

    @classmethod
    def _read(cls, directory: str | Path, settings: dict) -> Engine:
        """`load` once. Raises Changed if the directory is replaced meanwhile."""
        files = checkpoint.read(directory)
        files.warn_unsealed()
        return cls._load(files, settings)

    @classmethod
    def _load(cls, files: Files, settings: dict, table: Costs | None = None) -> Engine:
        """`load` with the files opened. table: None for this machine's costs. Raises Changed if they are no longer the
        files of the directory.
        """
        dtype, key, forms = cls._plan(files, settings, table)

        def make(weights: dict[str, np.ndarray]) -> tuple[PackedEncoder, ...]:
            return architectures.build(weights, files.facts, forms)

        def packed(anew: bool) -> tuple[PackedEncoder, ...]:
            return cache.packed(files, key, make, anew=anew) if settings["cached"] else make(files.weights)

        def verified(encoders: tuple[PackedEncoder, ...]) -> Engine:
            engine = cls(encoders[-1:] if settings["batch_invariant"] else encoders, files, settings, dtype)
            engine._verify(files)
            return engine

        try:
            encoders = packed(False)
            try:
                return verified(encoders)
            except CheckpointError:
                if not settings["cached"]:
                    raise
                return verified(packed(True))  # the packed form may be wrong: make it once more
        finally:
            files.require_same()

    @classmethod
    def _plan(cls, files: Files, settings: dict, table: Costs | None) -> tuple[str, dict, architectures.Pack]:
        """The dtype, what besides the files decides the packed form, and the function that packs a weight."""
        dtype = dtype_of(files, _dispatch.isa()) if settings["dtype"] == "auto" else settings["dtype"]
        scales = files.require_scales() if dtype == "int8" else None
        table = table or costs(_dispatch.isa())

        def forms(weight: np.ndarray, names: tuple[str, ...]) -> tuple[Packed, ...]:
            grid = None if scales is None else scales.grid(weight, names)
            return pack_cheapest(weight, table, dtype, grid)

        key = {"dtype": dtype} | ({"costs": asdict(table)} if has_choice(dtype) else {})
        return dtype, key | ({} if scales is None else {"scales": scales.sha256}), forms

    def _verify(self, files: Files) -> None:
        """Compares the golden logits of each encoder with the manifest's."""
        for encoder in dict.fromkeys(self._encoders):
            _ = encoder.core  # made now, because making it takes a lock, and a fork would copy the lock
            # In int8 the cost table may leave some or all linears in float32.
            rounded = {isinstance(linear.weight, PackedInt8) for linear in encoder.linears}
            as_made = "fp32" if self.dtype == "int8" and True not in rounded else self.dtype
            files.verify_golden(
                partial(self._run, encoder),
                dtype=as_made,
                relative=DTYPES[as_made].tolerance,
                mixed=as_made == "int8" and False in rounded,
            )

    @classmethod
    def unverified(cls, files: Files, dtype: str) -> Engine:
        """The engine of a directory that is just being made and has no golden logits of this dtype yet. In int8 all
        linears are in int8, whatever costs less here, so that the golden logits are the same on all machines.
        """
        settings = {"dtype": dtype, "threads": None, "batch_invariant": False, "cached": False}
        free = replace(costs(_dispatch.isa()), int8=(0.0,) * len(TOKENS))
        return cls._load(files, settings, free)

    @property
    def encoder(self) -> PackedEncoder:
        """The encoder that runs long batches."""
        return self._encoders[-1]

    @property
    def density(self) -> float:
        """Share of non-zeros in the encoder's linears."""
        packed = [linear.weight for linear in self.encoder.linears]
        return sum(w.nnz for w in packed) / sum(w.n_in * w.n_out for w in packed)

    @property
    def truncates_at(self) -> int:
        """Max tokens that `logits` keeps of a text with `truncate`: the positions, or the tokenizer's limit if less."""
        return self._inputs.truncates_at

    def explain(self, *, measure: bool = False, texts: Iterable[Text] = ()) -> list[dict]:
        """How each linear runs, first to last: layer, name, shape [n_out, n_in], density, form and kernel in long
        batches, why, and `short`: the form in short batches, None if it is the same.

        texts: as for `logits`, cut if they are too long. With them a linear in int8 has `clipped`: the share of its
        inputs on these texts that are at an end of the range that it was calibrated for, or beyond it.

        measure: also time each one, on 128 tokens and one thread, including the moves of the tokens into panels and
        back. `gflops`: 10^9 operations on non-zeros per second. `share_of_peak`: all its operations, as a share of
        those that the core could do in that time and dtype without waiting for memory.
        """
        ids, types, _ = self.encode(texts, truncate=True)
        clipped = self._clipped(ids, types) if ids else None
        peaks: dict[str, float] = {}
        rows = []
        for i, layer in enumerate(self.encoder.layers):
            for name in LINEARS:
                linear = getattr(layer, name)
                weight = linear.weight
                form, why = explained(weight)
                dtype = FORM_DTYPES[form]
                short = explained(getattr(self._encoders[0].layers[i], name).weight)[0]
                row = {
                    "layer": i, "linear": name, "shape": [weight.n_out, weight.n_in],
                    "density": weight.nnz / (weight.n_in * weight.n_out), "form": form,
                    "short": short if short != form else None,
                    "kernel": f"{DTYPES[dtype].kernel(self.isa)} {dtype}",
                    "why": why,
                }  # fmt: skip
                if clipped is not None and form == "int8":
                    row["clipped"] = float(clipped[i][name])
                if measure:
                    if dtype not in peaks:
                        peaks[dtype] = _dispatch.core().peak_flops(self.isa, dtype)
                    seconds = _seconds(linear, self.isa)
                    row["gflops"] = 2e-9 * weight.nnz * TOKENS[LONG] / seconds
                    row["share_of_peak"] = 2 * weight.stored * TOKENS[LONG] / seconds / peaks[dtype]
                rows.append(row)
        return rows

    def _clipped(self, ids: list[list[int]], types: list[list[int]]) -> list[dict[str, float]]:
        """The share of inputs of each layer's linears that are clipped."""
        tokens = sum(map(len, ids))
        counts = clipped_inputs(*self._arrays(self.encoder, ids, types, 0), self.encoder)
        return [
            {name: count / tokens / getattr(layer, name).weight.n_in for name, count in zip(LINEARS, row, strict=True)}
            for layer, row in zip(self.encoder.layers, counts, strict=True)
        ]

    def logits(self, texts: Iterable[Text], *, max_length: int | None = None, truncate: bool = False) -> np.ndarray:
        """Logits, float32 [texts, labels].

        texts: a list, a generator, or a 2-d array or tensor of token ids; no mapping and no set. A text is a string, a
        pair of strings (text, text_b) as a tuple or a list, or the ids of its tokens, special ones included; one call
        may hold all three.
        max_length: max tokens of a text. None: the number of positions of the model, or, with truncate, the tokenizer's
        limit if that is less. truncate: cut longer texts as transformers does (of a pair the longer part first), and
        ids after max_length; without it they are an error. Raises InputError if texts is not a list of texts, naming
        the text: an empty one, one that is too long, ids out of the vocabulary; and for a length the model cannot take.
        """
        ids, types, _ = self.encode(texts, max_length=max_length, truncate=truncate)
        return self.forward(ids, types) if ids else np.empty((0, len(self.labels)), dtype=np.float32)

    def encode(
        self, texts: Iterable[Text], *, max_length: int | None = None, truncate: bool = False
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """(token ids, token types) of each text, as `forward` takes them, and the numbers of the texts that were cut.
        Arguments and errors are those of `logits`.
        """
        return self._inputs.encode(texts, max_length=max_length, truncate=truncate)

    def forward(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], *, first: int = 0) -> np.ndarray:
        """Logits of token id lists, float32 [sequences, labels]; every sequence has at least one token. first: the
        number of the first sequence, in errors. Raises CheckpointError if a logit is not finite, because the weights
        overflow.
        """
        kind = kind_of(sum(map(len, ids)))
        return self._run(self._encoders[min(kind, len(self._encoders) - 1)], ids, type_ids, first)

    def _run(
        self, encoder: PackedEncoder, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], first: int = 0
    ) -> np.ndarray:
        arrays = self._arrays(encoder, ids, type_ids, first)
        logits = sparse_encoder(*arrays, encoder, threads=self.threads, isa=self.isa)
        checkpoint.require_finite(logits, self.directory, first)
        return logits

    def _arrays(
        self, encoder: PackedEncoder, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], first: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, types and starts of `sparse_encoder`."""
        starts = np.cumsum([0, *map(len, ids)])
        if sum(map(len, type_ids)) != starts[-1]:
            raise InputError(
                f"type_ids must have as many tokens as ids, {starts[-1]} in total, got {sum(map(len, type_ids))}",
                fix="give each token its type, 0 or 1",
            )
        flat_ids = np.fromiter(chain.from_iterable(ids), np.int32, count=starts[-1])
        flat_types = np.zeros_like(flat_ids)
        if len(encoder.positions) > 1:  # otherwise the model has one type of token, whatever its tokenizer says
            flat_types = np.fromiter(chain.from_iterable(type_ids), np.int32, count=starts[-1])
        if self._facts.position_offset and (padding := flat_ids == self._facts.padding).any():
            row = int(np.searchsorted(starts, np.argmax(padding), side="right")) - 1
            raise inputs.unplaced(first + row, self._facts.padding, self.config["model_type"])
        return flat_ids, flat_types, starts


def _cuda_engine(settings: dict) -> type[Engine]:
    """The engine for GPUs, which alone imports torch and triton. Raises UnsupportedError if it cannot run here."""
    try:
        from sparsebert.engine.cuda import CudaEngine, current, require_device, require_settings
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "triton"):
            raise
        raise UnsupportedError(f"device cuda needs {error.name}", fix="pip install 'sparsebert[triton]'") from error
    require_settings(settings)
    machine.require_start()
    with current(settings["device"]):
        require_device()
    return CudaEngine


def _warn_of_portable_path(dtype: str) -> None:
    if environment.isa_cap() is None and not DTYPES[dtype].has_kernel(_dispatch.isa()):
        warnings.warn(
            f"no {DTYPES[dtype].lacking} here: the engine runs {dtype} on its portable path, see `sparsebert doctor`",
            SparsebertWarning,
            stacklevel=3,
        )


def dtype_of(files: Files, isa: str) -> str:
    """The dtype for "auto": never less precise than the checkpoint declares, and only if it is fast."""
    if files.scales is not None and DTYPES["int8"].has_kernel(isa):
        return "int8"
    declared = files.config.get("dtype") or files.config.get("torch_dtype")
    return "bf16" if declared == "bfloat16" and isa == "amx" else "fp32"


def _seconds(linear: Linear, isa: str) -> float:
    """Seconds of the fastest of several calls, on one thread."""
    x = np.random.default_rng(0).standard_normal((TOKENS[LONG], linear.weight.n_in), np.float32)
    call = partial(sparse_matmul, x, linear, threads=1, isa=isa)
    return interleave({"linear": call}, rounds=7, warmup=0).minimum("linear")
