"""Runs a packed encoder on an NVIDIA GPU, by the Triton kernels of the ops and torch's matmul. Only
`Engine.load(device="cuda")` imports this file; it uses torch's tensors, none of its modules.

No time of it has been measured: whether any of this is faster than another engine is not known.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from sparsebert import checkpoint
from sparsebert.checkpoint import Files
from sparsebert.engine import architectures, cuda_forms, inputs
from sparsebert.engine.costs import Costs
from sparsebert.engine.cuda_forms import LONG, TOKENS, DeviceLinear, captured, kind_of, on_device
from sparsebert.engine.engine import Engine, Text
from sparsebert.engine.formats import DTYPES, pack_cheapest
from sparsebert.errors import InputError, SparsebertError, UnsupportedError, first_line
from sparsebert.kernels import require_full_float32
from sparsebert.kernels.sparse_encoder import add_norm, attention, embed
from sparsebert.machine import ON_THE_CPU, gpu_name, require_device
from sparsebert.ops.sparse_encoder import LINEARS, EncoderLayer, Norm, PackedEncoder, require_sequences

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


def require_memory(needed: int, device: torch.device) -> None:
    """Raises UnsupportedError if the GPU has not so many bytes left."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds unused
    if needed + SPARE > free:
        raise _too_little_memory(needed, f"{free / 1e6:.0f} MB are free on {gpu_name(device)}")


def _too_little_memory(needed: int, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"the model needs {(needed + SPARE) / 1e6:.0f} MB on the GPU, {found}",
        fix=f"end what else uses the GPU, choose another by CUDA_VISIBLE_DEVICES, or {ON_THE_CPU}",
    )


def measure(progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Times the forms of linears on the current GPU and stores their costs; engines loaded later choose by them. Raises
    UnsupportedError without a GPU that the engine runs on.
    """
    device = require_device()
    cuda_forms.measure(gpu_name(device), device, progress)


class Graphs:
    """CUDA graphs, one for each of `key`, captured when it is first replayed. They share the memory that they allocate,
    so only one may run at a time.
    """

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def replay(self, key: tuple[int, ...], work: Callable[[], object]) -> None:
        """Does what `work` launches. It must launch the same on the same memory for the same key."""
        if key not in self._graphs:
            self._graphs[key] = captured(work, self._pool)
        self._graphs[key].replay()


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
        table: cuda_forms.Costs,
        *,
        invariant: bool,
    ):
        self._encoder, self._dtype, self._device, self._invariant = encoder, dtype, device, invariant
        self._buckets = buckets(max(MOST_TOKENS, encoder.max_length))
        self.most = self._buckets[-1]
        hidden, labels = encoder.pooler.weight.n_in, encoder.classifier.weight.n_out
        embedding = encoder.words.shape[1]
        wide = max((max(layer.qkv.weight.n_out, layer.up.weight.n_out) for layer in encoder.layers), default=1)
        features = {"states": hidden, "attended": max(hidden, embedding), "sums": hidden, "wide": wide}
        needed = self._bytes(encoder, sum(features.values()))
        require_memory(needed, device)
        try:
            put = partial(on_device, dtype=dtype, device=device, table=table, invariant=invariant)
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
            self._logits = empty(labels * self.most // 2, dtype=torch.float32)
            self._inputs = torch.zeros(inputs_of(self.most), dtype=torch.int32, device=device)
        except torch.OutOfMemoryError as error:
            raise _too_little_memory(needed, first_line(error)) from error
        self._staged = torch.zeros(self._inputs.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._graphs = Graphs() if device.type == "cuda" else None
        self._lock, self._busy, self._process = threading.RLock(), False, os.getpid()

    def logits(self, ids: np.ndarray, types: np.ndarray, starts: np.ndarray, *, kind: int | None = None) -> np.ndarray:
        """Logits, float32 [sequences, labels], of checked arrays of `sparse_encoder`; at most `most` tokens, and half
        as many sequences.

        kind: run the forms for TOKENS[kind], without a graph; None: those for this many tokens. Calls of several
        threads follow each other. Raises UnsupportedError in a child of a fork, and in a signal handler that has
        interrupted a call.
        """
        sequences = len(starts) - 1
        capacity = next(size for size in self._buckets if size >= max(len(ids), 2 * sequences))
        with self._alone():
            size = inputs_of(capacity)
            _fill(self._staged[:size].numpy(), capacity, ids, types, starts)
            self._inputs[:size].copy_(self._staged[:size], non_blocking=True)
            if kind is None and self._graphs is not None:
                kind = kind_of(capacity)
                with torch.cuda.device(self._device):
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
        for layer, linears, norms in zip(self._encoder.layers, self.layers, self._norms, strict=True):
            qkv = linears["qkv"](x, kind, tokens, self._part("wide", 3 * hidden, capacity))
            attention(qkv, first, stop, tokens, heads, attended, invariant=self._invariant)
            linears["attention_out"](attended, kind, tokens, sums)
            add_norm(sums, x, norms[0], eps, tokens, x)
            up = linears["up"](x, kind, tokens, self._part("wide", layer.up.weight.n_out, capacity))
            linears["down"](up, kind, tokens, sums)
            add_norm(sums, x, norms[1], eps, tokens, x)
        half = capacity // 2
        pooled = self._pooled[: self._encoder.pooler.weight.n_out * half].view(-1, half)
        self._pooler(x.index_select(1, firsts), kind, sequences, pooled)
        logits = self._logits[: self._encoder.classifier.weight.n_out * half].view(-1, half)
        self._classifier(pooled, kind, sequences, logits)

    def _part(self, name: str, features: int, capacity: int) -> torch.Tensor:
        """[features, capacity] of the memory of this name."""
        return self._memory[name][: features * capacity].view(features, capacity)

    def _norm(self, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = (torch.tensor(part, device=self._device) for part in norm)
        return weight, bias

    def _bytes(self, encoder: PackedEncoder, features: int) -> int:
        """Bytes on the device, at least: a linear that runs in two forms is stored twice."""
        size = self._dtype.itemsize
        heads = [encoder.pooler, encoder.projection] if encoder.projection is not None else [encoder.pooler]
        linears = sum(linear.weight.n_in * linear.weight.n_out for linear in (*encoder.linears, *heads))
        return size * (linears + encoder.words.size + features * self.most) + 4 * encoder.positions.size

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time: all use the same memory."""
        if os.getpid() != self._process:
            raise UnsupportedError(
                "an engine on a GPU must run in the process that loaded it, this is a child of its fork",
                fix="load the engine in the child, and start it by spawn",
            )
        with self._lock:
            if self._busy:
                raise UnsupportedError(
                    "an engine on a GPU runs one call at a time, a signal handler calls it during another",
                    fix="use another engine in the handler",
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False


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


def _fill(given: np.ndarray, capacity: int, ids: np.ndarray, types: np.ndarray, starts: np.ndarray) -> None:
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
    """An `Engine` on the current NVIDIA GPU, made by `Engine.load(device="cuda")`. The calls are those of `Engine`.

    dtype auto: bf16 if `dtype` in config.json is bfloat16, else fp32; also for a model that was made for int8. Any
    number of threads may call `logits`; their calls follow each other. Not in the children of a fork, and not in a
    signal handler during a call. The golden logits are verified with the forms of every size of batch.
    """

    def __init__(self, encoders: tuple[PackedEncoder, ...], files: Files, settings: dict, dtype: str):
        super().__init__(encoders, files, settings, dtype)
        device = require_device()
        self.gpu = gpu_name(device)
        self.isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else self.gpu
        self._device = DeviceEncoder(
            self.encoder, cuda_forms.DTYPES[dtype], device, cuda_forms.costs(self.gpu, dtype),
            invariant=settings["batch_invariant"],
        )  # fmt: skip

    def __repr__(self) -> str:
        return super().__repr__().replace(f"{self.threads} threads", self.gpu)

    @classmethod
    def _plan(cls, files: Files, settings: dict, table: object) -> tuple[str, dict, architectures.Pack]:
        dtype = settings["dtype"]
        if dtype == "auto":
            declared = files.config.get("dtype") or files.config.get("torch_dtype")
            dtype = "bf16" if declared == "bfloat16" else "fp32"
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
        """As `Engine.explain`. `short`: the form in batches of fewer than 64 tokens. measure: the calls are those of a
        CUDA graph; `share_of_peak` is None, as this GPU's peak is not known. texts: nothing is clipped here.
        """
        inputs.read(texts, len(self.encoder.words), self._facts.padding)
        rows = []
        for i, (layer, linears) in enumerate(zip(self.encoder.layers, self._device.layers, strict=True)):
            for name, linear in linears.items():
                rows.append(self._explained(i, name, layer, linear))
                if measure:
                    weight, tokens = getattr(layer, name).weight, TOKENS[LONG]
                    dtype = cuda_forms.DTYPES[self.dtype]
                    device = require_device()
                    taken = cuda_forms.seconds({name: linear}, weight.n_in, tokens, dtype, device)[name]
                    rows[-1] |= {"gflops": 2e-9 * weight.nnz * tokens / taken, "share_of_peak": None}
        return rows

    def _explained(self, i: int, name: str, layer: EncoderLayer, linear: DeviceLinear) -> dict:
        weight, form, short = getattr(layer, name).weight, linear.forms[LONG], linear.forms[0]
        return {
            "layer": i, "linear": name, "shape": [weight.n_out, weight.n_in],
            "density": weight.nnz / (weight.n_in * weight.n_out), "form": form,
            "short": short if short != form else None,
            "kernel": f"{'torch' if form == 'dense' else 'triton'} {self.isa} {self.dtype}",
            "why": linear.why[LONG],
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
