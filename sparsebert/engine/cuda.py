"""Runs a packed encoder on an NVIDIA GPU, by the Triton kernels of the ops and torch's matmul. Only
`Engine.load(device="cuda")` imports this file; it uses torch's tensors, none of its modules.

No time of it has been measured: whether any of this is faster than another engine is not known.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint
from sparsebert.checkpoint import Files
from sparsebert.engine import architectures, cuda_costs, inputs
from sparsebert.engine.costs import Costs
from sparsebert.engine.cuda_costs import LONG, TOKENS, kind_of
from sparsebert.engine.cuda_forms import FORMS, UNMEASURED, DeviceLinear, hint, on_device
from sparsebert.engine.cuda_graphs import Graphs, queue
from sparsebert.engine.engine import Engine, Text
from sparsebert.engine.formats import DTYPES, pack_cheapest
from sparsebert.errors import InputError, SparsebertError, UnsupportedError, first_line
from sparsebert.kernels import require_full_float32
from sparsebert.kernels.sparse_encoder import add_norm, attention, embed
from sparsebert.machine import MORE_MEMORY, ON_THE_CPU, gpu_name, require_device
from sparsebert.ops.sparse_encoder import LINEARS, EncoderLayer, Norm, PackedEncoder, require_sequences
from sparsebert.ops.sparse_matmul import unpack

MOST_TOKENS = 8192  # per run of the encoder; longer batches are cut between sequences
SPARE = 1 << 28  # bytes of the GPU that are left to compiled kernels and to torch's libraries
# Bytes per entry of a form on the CPU: the weights are stored there in the smallest.
BYTES = Costs(rows=(5.0,) * 3, groups=(4.0,) * 3, int8=(5.0,) * 3)


def require_settings(settings: dict) -> None:
    """Raises an error for arguments of `Engine.load` that a GPU does not run."""
    if settings["dtype"] == "int8":
        raise UnsupportedError("device cuda runs fp32 and bf16, not int8", fix="pass dtype='fp32', or device='cpu'")
    if settings["threads"] is not None:
        raise InputError(f"threads must be None on device cuda, got {settings['threads']}", fix="leave it out")


def current(device: str) -> AbstractContextManager:
    """Makes the GPU that `device` names the current one: cuda:N, or cuda for the one that is. Raises InputError if
    there is no such GPU.
    """
    index = torch.device(device).index
    if index is None:
        return nullcontext()
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(
            f"device must be one of the {count} GPUs that torch finds, cuda:0 to cuda:{count - 1}, got {device}",
            fix="pass one of these; CUDA_VISIBLE_DEVICES may hide GPUs",
        )
    return torch.cuda.device(index)


def require_memory(needed: int, device: torch.device) -> None:
    """Raises UnsupportedError if the GPU has not so many bytes left."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds unused
    if needed + SPARE > free:
        raise UnsupportedError(
            f"the model needs {(needed + SPARE) / 1e6:.0f} MB on the GPU, {free / 1e6:.0f} MB are free on "
            f"{gpu_name(device)}",
            fix=MORE_MEMORY,
        )


@contextmanager
def _memory_told(what: str) -> Iterator[None]:
    """Raises UnsupportedError, of one line, if the GPU runs out of memory. The frames that did so are cleared: the
    error would keep the tensors in them.
    """
    try:
        yield
    except RuntimeError as error:
        # What ends a capture may hide why it failed, and memory outside torch's own allocator is another error.
        causes = [error]
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        found = [cause for cause in causes if "out of memory" in str(cause)]
        if not found:
            raise
        said = first_line(found[-1])
        for cause in causes:
            traceback.clear_frames(cause.__traceback__)
        torch.cuda.empty_cache()
        raise UnsupportedError(f"the GPU has too little memory for {what}: {said}", fix=MORE_MEMORY) from None


def _kinds_of_gpus() -> list[torch.device]:
    """The GPUs that the engine runs on, one of each name. Raises UnsupportedError if there is none."""
    found: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            try:
                found.setdefault(gpu_name(require_device()), torch.device("cuda", index))
            except UnsupportedError:
                continue  # another may do
    return list(found.values()) or [require_device()]


def measure(progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Times the forms of linears on the GPUs, one of each name, and stores their costs; engines loaded later choose by
    them. Raises UnsupportedError without a GPU that the engine runs on, or with too little memory on it.
    """
    devices = _kinds_of_gpus()
    for i, device in enumerate(devices):

        def update(done: int, total: int, before: int = i) -> None:
            progress(before * total + done, len(devices) * total)

        with current(str(device)), _memory_told("measuring the forms"):
            cuda_costs.measure(FORMS.values(), gpu_name(device), device, update)


def forms_here() -> dict[str, str] | str:
    """Form -> whether the current GPU has it, in which dtypes it was measured, and what it can hold; a sentence if
    there is no GPU that the engine runs on.
    """
    try:
        device = require_device()
    except UnsupportedError as error:
        return f"off: {error}"
    tables = {dtype: cuda_costs.costs(gpu_name(device), dtype) for dtype in cuda_costs.DTYPES}
    found = {}
    for form in FORMS.values():
        why = form.missing(device)
        measured = [dtype for dtype, table in tables.items() if form.name in table]
        state = f"measured in {', '.join(measured)}" if measured else "not measured: sparsebert doctor --tune"
        found[form.name] = f"off: {why}" if why else f"{state}; {form.holds}"
    return found


class DeviceEncoder:
    """A PackedEncoder on a device, with memory for the states of `most` tokens. States and weights have one dtype;
    norms, position vectors and the classifier are float32.

    table: the costs by which a linear's form is chosen. invariant: use one form for all batches, and one whose result
    does not depend on the other tokens. Raises UnsupportedError if the device has too little memory.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        dtype: torch.dtype,
        device: torch.device,
        table: cuda_costs.Costs,
        *,
        invariant: bool,
    ):
        self.device, self._encoder, self._dtype, self._invariant = device, encoder, dtype, invariant
        self._buckets = buckets(max(MOST_TOKENS, encoder.max_length))
        self.most = self._buckets[-1]
        hidden = encoder.pooler.weight.n_in
        embedding = encoder.words.shape[1]
        wide = max((max(layer.qkv.weight.n_out, layer.up.weight.n_out) for layer in encoder.layers), default=1)
        features = {"states": hidden, "attended": max(hidden, embedding), "sums": hidden, "wide": wide}
        require_memory(_least_bytes(encoder, dtype, sum(features.values()) * self.most, table), device)
        with _memory_told("the model"):
            try:
                self._fill(encoder, features, table)
            except RuntimeError:
                vars(self).clear()  # half of the model, which a traceback would keep
                raise

    def _fill(self, encoder: PackedEncoder, features: dict[str, int], table: cuda_costs.Costs) -> None:
        """Moves the encoder to the device, and makes the memory of the states."""
        dtype, device = self._dtype, self.device
        put = partial(on_device, dtype=dtype, device=device, table=table, invariant=self._invariant)
        self.layers = [{name: put(getattr(layer, name)) for name in LINEARS} for layer in encoder.layers]
        self._norms = [(self._norm(layer.attention_norm), self._norm(layer.norm)) for layer in encoder.layers]
        self._projection = None if encoder.projection is None else put(encoder.projection)
        self._pooler = on_device(encoder.pooler, dtype, device)
        self._classifier = on_device(encoder.classifier, torch.float32, device)
        self._words = torch.tensor(encoder.words, dtype=dtype, device=device)
        self._positions = torch.tensor(encoder.positions, device=device)
        self._embedding_norm = self._norm(encoder.embedding_norm)
        empty = partial(torch.empty, device=device)
        self._memory = {name: empty(n * self.most, dtype=dtype) for name, n in features.items()}
        self._pooled = empty(encoder.pooler.weight.n_out * self.most // 2, dtype=torch.float32)
        self._logits = empty(encoder.classifier.weight.n_out * self.most // 2, dtype=torch.float32)
        self._inputs = torch.zeros(inputs_of(self.most), dtype=torch.int32, device=device)
        self._staged = torch.zeros(self._inputs.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._queue = queue(device)
        self._graphs = None
        self._queue.follow()  # the copies were launched on the current stream
        if device.type == "cuda":
            self._graphs = Graphs()

    def logits(self, ids: np.ndarray, types: np.ndarray, starts: np.ndarray, *, kind: int | None = None) -> np.ndarray:
        """Logits, float32 [sequences, labels], of checked arrays of `sparse_encoder`; at most `most` tokens, and half
        as many sequences.

        kind: run the forms for TOKENS[kind], without a graph; None: those for this many tokens. Calls of several
        threads follow each other. Raises UnsupportedError in a child of a fork, in a signal handler that has
        interrupted a call, and if the GPU has too little memory.
        """
        sequences = len(starts) - 1
        capacity = next(size for size in self._buckets if size >= max(len(ids), 2 * sequences))
        with self._queue.turn(), _memory_told(f"a batch of {capacity} tokens"):
            size = inputs_of(capacity)
            _stage(self._staged[:size].numpy(), capacity, ids, types, starts)
            self._inputs[:size].copy_(self._staged[:size], non_blocking=True)
            if kind is None and self._graphs is not None:
                kind = kind_of(capacity)
                self._graphs.replay((capacity, kind), partial(self._run, capacity, kind))
            else:
                self._run(capacity, kind_of(capacity) if kind is None else kind)
            labels = self._encoder.classifier.weight.n_out
            half = capacity // 2
            return self._logits[: labels * half].view(labels, half)[:, :sequences].t().cpu().contiguous().numpy()

    def _run(self, capacity: int, kind: int) -> None:
        """Launches the forward pass of the tokens in `_inputs`, for at most `capacity` tokens."""
        if self._dtype == torch.float32:
            require_full_float32("fp32 on device cuda", instead="pass dtype='bf16'")
        eps, heads = self._encoder.eps, self._encoder.heads
        ids, types, first, stop = self._inputs[: 4 * capacity].view(4, capacity)
        firsts = self._inputs[4 * capacity :][: capacity // 2]
        tokens, sequences = self._inputs[inputs_of(capacity) - 2 : inputs_of(capacity)].split(1)
        embedded = self._words.shape[1]
        x = self._part("states" if self._projection is None else "attended", embedded, capacity)
        embed(ids, types, first, self._words, self._positions, self._embedding_norm, eps, tokens, x)
        hidden = self._encoder.pooler.weight.n_in
        if self._projection is not None:
            x = self._projection(x, kind, tokens, self._part("states", hidden, capacity))
        attended, sums = (self._part(name, hidden, capacity) for name in ("attended", "sums"))
        half, width = capacity // 2, capacity
        first_of = partial(torch.index_select, dim=1, index=firsts)
        for i, (layer, linears, norms) in enumerate(zip(self._encoder.layers, self.layers, self._norms, strict=True)):
            qkv = linears["qkv"](x, kind, tokens, self._part("wide", 3 * hidden, capacity))
            attention(qkv, first, stop, tokens, heads, attended, invariant=self._invariant)
            if i == len(self.layers) - 1:  # from here on, only what the pooler reads
                # Into memory that is free by now: where torch's allocator keeps none, a capture may not allocate.
                attended = first_of(attended, out=self._part("sums", hidden, half))
                x = first_of(x, out=self._part("attended", hidden, half))
                sums, tokens, width = self._part("states", hidden, half), sequences, half
            linears["attention_out"](attended, kind, tokens, sums)
            add_norm(sums, x, norms[0], eps, tokens, x)
            up = linears["up"](x, kind, tokens, self._part("wide", layer.up.weight.n_out, width))
            linears["down"](up, kind, tokens, sums)
            add_norm(sums, x, norms[1], eps, tokens, x)
        if not self.layers:
            x = first_of(x, out=self._part("sums", hidden, half))
        pooled = self._pooled[: self._encoder.pooler.weight.n_out * half].view(-1, half)
        self._pooler(x, kind, sequences, pooled)
        logits = self._logits[: self._encoder.classifier.weight.n_out * half].view(-1, half)
        self._classifier(pooled, kind, sequences, logits)

    def _part(self, name: str, features: int, capacity: int) -> torch.Tensor:
        """[features, capacity] of the memory of this name."""
        return self._memory[name][: features * capacity].view(features, capacity)

    def _norm(self, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = (torch.tensor(part, device=self.device) for part in norm)
        return weight, bias


def _least_bytes(encoder: PackedEncoder, dtype: torch.dtype, states: int, table: cuda_costs.Costs) -> int:
    """Bytes on the device, at least: measured forms may store less than all of a linear."""
    heads = [encoder.pooler] if encoder.projection is None else [encoder.pooler, encoder.projection]
    linears = heads if table else [*encoder.linears, *heads]
    weights = sum(linear.weight.n_in * linear.weight.n_out for linear in linears)
    return dtype.itemsize * (weights + encoder.words.size + states) + 4 * encoder.positions.size


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of tokens for which the encoder is launched, up to the first that is at least `most`: a batch runs in
    the next one, whose other tokens only torch's matmul computes. They are multiples of 16.
    """
    sizes = [32]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 3 // 2 if len(sizes) % 2 else sizes[-2] * 2)
    return tuple(sizes)


def inputs_of(capacity: int) -> int:
    """Number of integers that say what a batch of so many tokens is."""
    return 4 * capacity + capacity // 2 + 2


def _stage(given: np.ndarray, capacity: int, ids: np.ndarray, types: np.ndarray, starts: np.ndarray) -> None:
    """Writes ids, types, and each token's sequence from its first token to the one after its last, each [capacity]; the
    first token of each sequence [capacity / 2]; the numbers of tokens and of sequences.
    """
    given[:] = 0
    lengths = np.diff(starts)
    rows = given[: 4 * capacity].reshape(4, capacity)[:, : len(ids)]
    rows[:] = ids, types, np.repeat(starts[:-1], lengths), np.repeat(starts[1:], lengths)
    given[4 * capacity :][: len(lengths)] = starts[:-1]
    given[-2:] = len(ids), len(lengths)


class CudaEngine(Engine):
    """An `Engine` on an NVIDIA GPU, made by `Engine.load(device="cuda")`, on the current one, or `device="cuda:N"`. The
    calls are those of `Engine`.

    dtype auto: bf16 if `dtype` in config.json is bfloat16, else fp32; also for a model that was made for int8. Any
    number of threads may call `logits`; the calls of all engines on a GPU follow each other. Not in the children of a
    fork, and not in a signal handler during a call. The golden logits are verified with the forms of every size of
    batch.
    """

    def __init__(self, encoders: tuple[PackedEncoder, ...], files: Files, settings: dict, dtype: str):
        super().__init__(encoders, files, settings, dtype)
        device = require_device()
        self.gpu = gpu_name(device)
        self.isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else self.gpu
        self._device = DeviceEncoder(
            self.encoder, cuda_costs.DTYPES[dtype], device, cuda_costs.costs(self.gpu, dtype),
            invariant=settings["batch_invariant"],
        )  # fmt: skip

    def __repr__(self) -> str:
        return super().__repr__().replace(f"{self.threads} threads", self.gpu)

    @classmethod
    def _read(cls, directory: str | Path, settings: dict) -> Engine:
        with current(settings["device"]):
            return super()._read(directory, settings)

    @classmethod
    def _plan(cls, files: Files, settings: dict, table: object) -> tuple[str, dict, architectures.Pack]:
        dtype = settings["dtype"]
        if dtype == "auto":
            declared = files.config.get("dtype") or files.config.get("torch_dtype")
            dtype = "bf16" if declared == "bfloat16" else "fp32"
        device = require_device()
        if not cuda_costs.costs(gpu_name(device), dtype):  # all of each linear is stored: refused before it is read
            shapes = files.facts.encoder_tensors()
            require_memory(cuda_costs.DTYPES[dtype].itemsize * sum(math.prod(shape) for _, shape in shapes), device)
        # On the CPU the weights are float32 for both dtypes, and stored once.
        return dtype, {"dtype": "fp32", "device": "cuda"}, lambda weight, names: pack_cheapest(weight, BYTES)[-1:]

    def _verify(self, files: Files) -> None:
        try:
            for kind in self._kinds():
                files.verify_golden(
                    partial(self._logits_of, kind=kind),
                    dtype="fp32",
                    relative=DTYPES[self.dtype].tolerance,
                    fix=f"report it with the GPU's name, {self.gpu}, and {ON_THE_CPU}",
                )
        except SparsebertError:
            del self._device  # its memory, before the model is perhaps loaded again
            raise

    def _kinds(self) -> Iterable[int]:
        """One of each set of forms that batches may run."""
        linears = [linear for layer in self._device.layers for linear in layer.values()]
        first = {tuple(linear.forms[kind] for linear in linears): kind for kind in range(len(TOKENS))}
        return first.values()

    def forward(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], *, first: int = 0) -> np.ndarray:
        return self._logits_of(ids, type_ids, first)

    def _logits_of(
        self,
        ids: Sequence[Sequence[int]],
        type_ids: Sequence[Sequence[int]],
        first: int = 0,
        kind: int | None = None,
    ) -> np.ndarray:
        found = [np.empty((0, len(self.labels)), np.float32)]
        for start, stop in _cuts([len(row) for row in ids], self._device.most):
            arrays = self._arrays(self.encoder, ids[start:stop], type_ids[start:stop], first + start)
            require_sequences(*arrays, self.encoder)
            found.append(self._device.logits(*arrays, kind=kind))
            checkpoint.require_finite(found[-1], self.directory, first + start)
        return np.concatenate(found)

    def explain(self, *, measure: bool = False, texts: Iterable[Text] = ()) -> list[dict]:
        """As `Engine.explain`. `short`: the form in batches of at most 64 tokens. measure: the calls are those of a
        CUDA graph; `share_of_peak` is None, as this GPU's peak is not known. texts: nothing is clipped here.
        """
        inputs.read(texts, len(self.encoder.words), self._facts.padding)
        rows = []
        for i, (layer, linears) in enumerate(zip(self.encoder.layers, self._device.layers, strict=True)):
            for name, linear in linears.items():
                rows.append(self._explained(i, name, layer, linear))
                if measure:
                    weight, tokens, form = getattr(layer, name).weight, TOKENS[LONG], linear.forms[LONG]
                    entries = FORMS[form].entries(unpack(weight) != 0)
                    taken = cuda_costs.seconds(
                        {name: (linear.weights[form], entries)}, (weight.n_out, weight.n_in), tokens,
                        cuda_costs.DTYPES[self.dtype], self._device.device,
                    )[name]  # fmt: skip
                    rows[-1] |= {"gflops": 2e-9 * weight.nnz * tokens / taken, "share_of_peak": None}
        return rows

    def _explained(self, i: int, name: str, layer: EncoderLayer, linear: DeviceLinear) -> dict:
        weight, form, short = getattr(layer, name).weight, linear.forms[LONG], linear.forms[0]
        why = linear.why[LONG]
        if why == UNMEASURED:
            invariant = self._settings["batch_invariant"]
            why += hint(unpack(weight) != 0, cuda_costs.DTYPES[self.dtype], self._device.device, invariant=invariant)
        return {
            "layer": i, "linear": name, "shape": [weight.n_out, weight.n_in],
            "density": weight.nnz / (weight.n_in * weight.n_out), "form": form,
            "short": short if short != form else None,
            "kernel": f"{FORMS[form].kernel} {self.isa} {self.dtype}",
            "why": why,
        }  # fmt: skip


def _cuts(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """The first and the last sequence but one of runs of at most `most` tokens and half as many sequences."""
    start = tokens = 0
    for i, length in enumerate(lengths):
        if i > start and (tokens + length > most or 2 * (i + 1 - start) > most):
            yield start, i
            start, tokens = i, 0
        tokens += length
    if start < len(lengths):
        yield start, len(lengths)
