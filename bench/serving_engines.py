"""Engines to serve beside ours: an engine of fixed speed, and rivals of `sparsebert bench` on the dense model.

python -m bench.serving_engines NAME DIR THREADS [FLAGS of sparsebert serve as name=value]
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data
from sparsebert.config import ServeConfig
from sparsebert.engine import Engine
from sparsebert.engine.rivals import RIVALS, Work
from sparsebert.serving.process import load_engine
from sparsebert.serving.server import serve

STUB_SECONDS = 0.02  # per text: 50 a second
SLACK = 5e-4  # seconds; a sleep takes longer than it is told
CALIBRATION = 300


def stub(directory: str, dtype: str, threads: int | None):
    """Answers 50 texts a second, whatever they are."""
    _, facts = load_engine(directory, dtype, threads)

    def forward(ids, types) -> np.ndarray:
        end = time.perf_counter() + STUB_SECONDS * len(ids)
        time.sleep(STUB_SECONDS * len(ids) - SLACK)
        while time.perf_counter() < end:
            pass
        return np.zeros((len(ids), len(facts["labels"])), np.float32)

    return forward, facts


@dataclass(frozen=True)
class Live(Work):
    """Batches that come one at a time: `now` holds the one that is asked about."""

    now: list = field(default_factory=list)

    @property
    def arrays(self):
        return self.now


def rival(directory: str, dtype: str, threads: int | None, *, name: str):
    """A rival on the model, padded to the longest text of a batch; in int8 calibrated on training texts of SST-2."""
    import torch

    torch.set_num_threads(threads)
    model, tokenizer = checkpoint.load(directory)
    spec = data.get_task("sst2")
    texts = list(data.load(spec, spec.train).sample(CALIBRATION, 0).texts)
    calibrate_on = [dict(tokenizer([text], return_tensors="pt", truncation=True)) for text in texts]
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    work = Live(model, calibrate_on[:1], threads, Path(folder), None, stack, calibrate_on)
    names, padding = list(calibrate_on[0]), tokenizer.pad_token_id
    work.now.append({key: tensor.numpy() for key, tensor in calibrate_on[0].items()})
    call = RIVALS[name].prepare(work)
    facts = load_engine(directory, "fp32", threads)[1] | {"dtype": RIVALS[name].dtype, "kernels": {name: 1}}

    def forward(ids, types) -> np.ndarray:
        longest = max(map(len, ids))
        rows = {
            "input_ids": np.array([[*row, *[padding] * (longest - len(row))] for row in ids]),
            "token_type_ids": np.array([[*row, *[0] * (longest - len(row))] for row in types]),
            "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        }
        batch = {key: rows[key].astype(np.int64) for key in names}
        work.now[0], work.padded[0] = batch, {key: torch.from_numpy(value) for key, value in batch.items()}
        return np.ascontiguousarray(call(0), np.float32)

    (want,), got = Engine.load(directory, dtype="fp32").logits(texts[:1]), forward(*_encoded(directory, texts[:1]))
    if not np.abs(want - got[0]).max() < 0.5 * np.abs(want).max():
        raise SystemExit(f"{name} gives {got[0]}, dense float32 {want}")
    return forward, facts


def _encoded(directory: str, texts: list[str]):
    ids, types, _ = Engine.load(directory).encode(texts)
    return ids, types


def torch_bf16(directory: str, dtype: str, threads: int | None):
    return rival(directory, dtype, threads, name="torch-bf16")


def openvino_int8(directory: str, dtype: str, threads: int | None):
    return rival(directory, dtype, threads, name="openvino-int8")


ENGINES = {"stub": stub, "torch-bf16": torch_bf16, "openvino-int8": openvino_int8}

if __name__ == "__main__":
    name, directory, threads, *flags = sys.argv[1:]
    # By its module's name, under which the engine's process imports it.
    from bench import serving_engines

    given = {key: json.loads(value) for key, _, value in (flag.partition("=") for flag in flags)}
    config = ServeConfig(port=0, threads=int(threads), **given)
    said = partial(print, flush=True)
    serve(
        directory, config, ready=lambda told: said(json.dumps(told)), log=lambda line: None,
        load=serving_engines.ENGINES[name],
    )  # fmt: skip
