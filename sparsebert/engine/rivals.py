"""Rivals that run the same classifier, timed alternately with the engine. Imports torch only when it is called."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsebert import checkpoint, machine
from sparsebert.config import BenchConfig
from sparsebert.engine.engine import Engine
from sparsebert.engine.formats import DTYPES
from sparsebert.engine.measure import Timings, in_order
from sparsebert.errors import CheckpointError, InputError, UnsupportedError
from sparsebert.ops import _dispatch

OURS = "sparsebert"
# Logits match if they differ from torch's float32 logits by at most what another order of a float32 sum makes, plus
# this share of the largest logit.
SHARE = {name: dtype.tolerance for name, dtype in DTYPES.items()} | {"int8": 0.25}
MOST_CALIBRATION = 300  # batches, the default of NNCF
SETTLE_S = 5e-3  # in which the workers of the previous engine stop spinning

Call = Callable[[int], np.ndarray]  # a batch's number -> its logits


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch on `threads` threads inside the block, and on the former number after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Work:
    """A classifier and the batches it is timed on."""

    model: object  # the stock module, in eval mode
    padded: list[dict]  # of tensors [rows, longest]
    threads: int
    folder: Path  # for files that rivals read
    deepsparse_python: str | None
    stack: contextlib.ExitStack  # closes what rivals opened
    calibrate_on: list[dict] | None = None  # like `padded`, for rivals in int8; None for the first of `padded`

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file, for the rivals that read only that."""
        import torch

        _required("onnx")
        names = list(self.padded[0])
        model = self.model

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, *tensors):
                return self.model(**dict(zip(names, tensors, strict=True))).logits

        path = self.folder / "model.onnx"
        example = {name: tensor[:1, :2].repeat(2, 1) for name, tensor in self.padded[0].items()}
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # the exporter's warnings about itself
            torch.onnx.export(
                Logits().eval(), tuple(example.values()), path, input_names=names, output_names=["logits"],
                dynamic_axes={name: {0: "rows", 1: "tokens"} for name in names}, opset_version=17, dynamo=False,
            )  # fmt: skip
        return path

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        return _arrays(self.padded)

    @property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """Batches that rivals in int8 are calibrated on."""
        return _arrays(self.padded[:MOST_CALIBRATION] if self.calibrate_on is None else self.calibrate_on)


def _arrays(batches: list[dict]) -> list[dict[str, np.ndarray]]:
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]


def _torch(work: Work, bf16: bool = False, compiled: bool = False) -> Call:
    import torch

    model = torch.compile(work.model, dynamic=True) if compiled else work.model

    def call(i: int) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return model(**work.padded[i]).logits.float().numpy()

    return call


def _onnxruntime(work: Work, int8: str | None = None) -> Call:
    """int8: dynamic scales of the activations, or static ones (QDQ), calibrated on the batches that are timed."""
    onnxruntime = _required("onnxruntime")
    path = work.onnx
    if int8 is not None:
        quantization = _required("onnxruntime.quantization")
        path = work.folder / f"model.{int8}.onnx"
        if int8 == "dynamic":
            quantization.quantize_dynamic(work.onnx, path, weight_type=quantization.QuantType.QInt8)
        else:
            batches = iter(work.calibration)
            reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda _: next(batches, None)})
            # Signed weights and activations would saturate on processors without VNNI; these are its own defaults else.
            quantization.quantize_static(
                work.onnx, path, reader(), activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8, per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batches = work.arrays
    return lambda i: session.run(None, batches[i])[0]


def _openvino(work: Work, precision: str, int8: bool = False) -> Call:
    """int8: quantised by NNCF after training, as it does transformers, on the batches that are timed."""
    openvino = _required("openvino")
    model = openvino.Core().read_model(str(work.onnx))
    if int8:
        nncf = _required("nncf")
        batches = work.calibration
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            model = nncf.quantize(
                model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
            )
    settings = {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": work.threads, "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    batches = work.arrays
    return lambda i: compiled(batches[i])[0]


# Runs in another environment, whose numpy is older, so it uses no part of this package. Batches are padded to a
# multiple of 16 tokens, because DeepSparse compiles an engine for each shape.
_DEEPSPARSE = """
import json, sys
import numpy as np
from deepsparse import Engine
model, batches, threads = json.loads(sys.stdin.readline())
loaded = np.load(batches)
names = json.loads(str(loaded["names"]))
engines, work = {}, []
for i in range(int(loaded["count"])):
    arrays = [loaded["%d.%s" % (i, name)] for name in names]
    rows, tokens = arrays[0].shape
    pad = ((0, 0), (0, -tokens % 16))
    arrays = [np.pad(a, pad).astype(np.int64) for a in arrays]
    shape = arrays[0].shape
    if shape not in engines:
        engines[shape] = Engine(model, batch_size=rows, num_cores=threads, input_shapes=[list(shape)] * len(names))
    work.append((engines[shape], arrays))
print("ready", flush=True)
for line in sys.stdin:
    engine, arrays = work[int(line)]
    print(json.dumps(engine.run(arrays, val_inp=False)[0].tolist()), flush=True)
"""


def _deepsparse(work: Work) -> Call:
    """DeepSparse in a separate process, which receives the number of a batch and sends its logits: about 0.1 ms more
    per batch.
    """
    if work.deepsparse_python is None:
        raise UnsupportedError(
            "deepsparse needs a separate environment with numpy below 2",
            fix="pass --deepsparse-python: `python3.11 -m venv V && V/bin/pip install deepsparse==1.8.0`, then "
            "V/bin/python",
        )
    names = list(work.padded[0])
    arrays = {f"{i}.{name}": a for i, batch in enumerate(work.arrays) for name, a in batch.items()}
    path = work.folder / "batches.npz"
    np.savez(path, names=json.dumps(names), count=len(work.padded), **arrays)
    try:
        process = subprocess.Popen(
            [work.deepsparse_python, "-c", _DEEPSPARSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    except OSError as error:
        raise UnsupportedError(f"--deepsparse-python cannot be run: {error}", fix="pass the path of Python") from error
    work.stack.callback(process.wait)
    work.stack.callback(process.kill)

    def said(line: str) -> str:
        try:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        for answer in process.stdout:
            if answer.startswith(("ready", "[")):  # the library prints other lines too
                return answer
        tail = process.stderr.read().strip().splitlines()
        raise UnsupportedError(
            f"deepsparse stopped: {tail[-1] if tail else 'no message'}", fix="leave it out of --rivals"
        )

    said(json.dumps([str(work.onnx), str(path), work.threads]))
    return lambda i: np.asarray(json.loads(said(str(i))), np.float32)


class _Rival(NamedTuple):
    dtype: str
    prepare: Callable[[Work], Call]


RIVALS = {
    "torch": _Rival("fp32", _torch),
    "torch-bf16": _Rival("bf16", lambda work: _torch(work, bf16=True)),
    "torch-compile": _Rival("fp32", lambda work: _torch(work, compiled=True)),
    "torch-compile-bf16": _Rival("bf16", lambda work: _torch(work, bf16=True, compiled=True)),
    "onnxruntime": _Rival("fp32", _onnxruntime),
    "onnxruntime-int8": _Rival("int8", lambda work: _onnxruntime(work, int8="dynamic")),
    "onnxruntime-int8-static": _Rival("int8", lambda work: _onnxruntime(work, int8="static")),
    "openvino": _Rival("fp32", lambda work: _openvino(work, "f32")),
    "openvino-bf16": _Rival("bf16", lambda work: _openvino(work, "bf16")),
    "openvino-int8": _Rival("int8", lambda work: _openvino(work, "f32", int8=True)),
    "deepsparse": _Rival("fp32", _deepsparse),
}


def _required(name: str):
    """A module that the extra `rivals` installs. Raises UnsupportedError if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"this rival needs the package {name.split('.')[0]}, which cannot be imported: {error}",
            fix="pip install 'sparsebert[rivals]', or leave it out of --rivals",
        ) from error


def named(rivals: str) -> list[str]:
    """The rivals of a comma-separated list, or of none. Raises InputError for an unknown one."""
    names = [name.strip() for name in rivals.split(",") if name.strip()]
    names = [] if names == ["none"] else names
    for name in names:
        if name not in RIVALS:
            raise InputError(f"rivals must be among {', '.join(RIVALS)}, got {name!r}", fix="correct --rivals")
    return list(dict.fromkeys(names))


def time_rivals(
    directory: str | Path,
    encoded: list[dict],
    config: BenchConfig,
    *,
    vs: str | Path | None = None,
    explain: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Times `Engine` and `config.rivals` on the classifier in `directory`: same weights, texts, batches and threads.

    vs: another classifier with the same tokens, such as the dense one, which our engine also runs, in the number format
    that it was made for. encoded: one dict of token id lists per text, as from `encoders.tokenize`: tokenizing is
    outside all timings. Rivals get each batch padded to its longest text; their matrices are dense, whatever zeros they
    hold.
    Returns the document that `sparsebert bench` prints: one row per engine, ours first. p50_ms and p99_ms are
    milliseconds per batch. seq_per_s is the median over rounds. ratio is the median over rounds of the engine's time
    over ours, with its 95 % interval (null below 6 rounds). content_sha256 says which model it ran. error is the
    largest difference of a logit from torch's in float32; match says whether the engine's dtype allows that difference;
    both are null for `vs`. With `explain` also `layers`: how each linear runs, timed. Raises CheckpointError if our
    logits do not match, InputError if `vs` has another vocabulary, and UnsupportedError for a rival that is not
    installed.
    """
    from sparsebert.encoders import collate

    threads = _dispatch.threads(config.threads)
    engine = Engine.load(directory, dtype=config.dtype, threads=threads)
    other = None if vs is None else Engine.load(vs, threads=threads)
    model, tokenizer = checkpoint.load(directory)
    if vs is not None and checkpoint.load_tokenizer(vs).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{vs} must have the vocabulary of {directory}", fix="name the model that it was made from")
    parts = [range(i, min(i + config.batch, len(encoded))) for i in range(0, len(encoded), config.batch)]
    types = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in encoded]
    ragged = [([encoded[i]["input_ids"] for i in rows], [types[i] for i in rows]) for rows in parts]
    names = named(config.rivals)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads), contextlib.ExitStack() as stack:
        padded = [collate(tokenizer, encoded, rows) for rows in parts]
        work = Work(model, padded, threads, Path(folder), config.deepsparse_python, stack)
        expected = [_torch(work)(i) for i in range(len(parts))]
        calls = {OURS: lambda i: engine.forward(*ragged[i])} | {name: RIVALS[name].prepare(work) for name in names}
        compared = list(calls)  # the others have weights of their own
        if other is not None:
            calls[f"{OURS}, {vs}"] = lambda i: other.forward(*ragged[i])
        dtypes = {OURS: engine.dtype} | {name: RIVALS[name].dtype for name in names}
        dtypes |= {name: other.dtype for name in calls if name not in compared}
        largest = max(float(np.abs(logits).max()) for logits in expected)
        errors = {
            name: float(np.max([np.abs(call(i) - expected[i]).max() for i in range(len(parts))]))
            for name, call in calls.items()
            if name in compared
        }
        allowed = {name: checkpoint.GOLDEN_TOLERANCE + SHARE[dtypes[name]] * largest for name in compared}
        if not errors[OURS] <= allowed[OURS]:
            raise CheckpointError(
                f"{directory}: the engine's logits must match torch's within {allowed[OURS]:g}, "
                f"they differ by {errors[OURS]:g}",
                fix="run `sparsebert doctor`, then try SPARSEBERT_ISA=scalar",
            )
        timings, batches_s = _in_turn(calls, len(parts), config.rounds, progress)
    rows = []
    contents = {of: checkpoint.read(of).content_sha256 for of in (directory, vs) if of is not None}

    def pattern_of(of: Engine) -> str:
        return (of.config.get("sparsebert") or {}).get("pattern") or config.pattern

    for name in calls:
        ratio, of = timings.ratio(name, OURS), other if name not in compared else engine
        rows.append({
            "engine": name, "dtype": dtypes[name], "pattern": pattern_of(of), "sparsity": 1 - of.density,
            "batch": config.batch, "seq": config.seq, "threads": threads,
            "p50_ms": float(np.percentile(batches_s[name], 50)) * 1e3,
            "p99_ms": float(np.percentile(batches_s[name], 99)) * 1e3,
            "seq_per_s": len(encoded) / timings.median(name),
            "ratio": ratio.value, "ratio_ci": [ratio.low, ratio.high],
            "content_sha256": contents[directory if name in compared else vs],
            "error": errors.get(name), "match": bool(errors[name] <= allowed[name]) if name in errors else None,
        })  # fmt: skip
    return {
        "machine": machine.card(),
        "versions": {name: machine.version_of(name) for name in ("torch", "onnxruntime", "openvino", "nncf")},
        "density": engine.density,
        "n": len(encoded),
        "tokens": sum(len(row["input_ids"]) for row in encoded),
        "rounds": config.rounds,
        "rows": rows,
    } | ({"layers": engine.explain(measure=True)} if explain else {})


def _in_turn(
    calls: dict[str, Call], batches: int, rounds: int, progress: Callable[[int, int], None]
) -> tuple[Timings, dict[str, np.ndarray]]:
    """Rounds in which each engine runs all batches; each round starts with the next engine. Returns seconds per round
    and per batch.
    """
    each = {name: np.empty((rounds, batches)) for name in calls}
    for turn in range(rounds):
        for done, name in enumerate(in_order(calls, turn)):
            time.sleep(SETTLE_S)
            calls[name](0)
            for i in range(batches):
                start = time.perf_counter()
                calls[name](i)
                each[name][turn, i] = time.perf_counter() - start
            progress(turn * len(calls) + done + 1, rounds * len(calls))
    return Timings({name: seconds.sum(1) for name, seconds in each.items()}), each
