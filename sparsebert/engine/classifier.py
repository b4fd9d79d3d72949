"""Runs the classifier of a model directory on labelled examples, with the fastest engine on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, heads
from sparsebert.data import Examples
from sparsebert.encoders import Progress, predict, token_limit, tokenize
from sparsebert.engine.engine import Engine
from sparsebert.errors import UnsupportedError
from sparsebert.heads import Problem
from sparsebert.machine import at_work_on, device_for
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import PackedInt8

BATCH = 64  # texts per call of the engine; progress is reported between calls


@dataclass(frozen=True)
class Classifier:
    """A verified model directory that is ready to predict.

    config, tokenizer: transformers' objects. problem: its problem type. names: its label names, in the order of the
    logits. engine: "sparsebert" or "torch". device: as `load` was asked. dtype: int8 if any linear runs in int8, else
    fp32. predict(examples, max_length=…, progress=…): float32 logits, like `encoders.predict`.
    """

    directory: Path
    config: object
    tokenizer: object
    problem: Problem
    names: tuple[str, ...]
    engine: str
    device: str
    dtype: str
    predict: Callable[..., np.ndarray]

    @classmethod
    def load(cls, directory: str | Path, device: str = "auto") -> Classifier:
        """Loads a directory. A model in int8 runs as it is served, in the engine in int8. Any other runs in float32: by
        torch on a GPU if `device` (machine.device_for) is one, else by the engine, and by torch on the CPU if the
        engine cannot, or only on its portable path. Raises UnsupportedError for a GPU that cannot be used, and for a
        model in int8 if `device` is cuda.
        """
        directory = checkpoint.resolve(directory)
        stored = checkpoint.read_config(directory)
        problem, names = heads.problem_of(stored), heads.label_names(stored)
        dtype = "fp32" if checkpoint.read(directory).scales is None else "int8"
        runs_on = device_for(device)
        if dtype == "int8" and device == "cuda":
            raise UnsupportedError(f"device cuda runs fp32, {directory} is in int8", fix="run it with --device cpu")
        engine = _engine(directory, dtype, runs_on)
        if dtype == "int8" and not any(isinstance(linear.weight, PackedInt8) for linear in engine.encoder.linears):
            dtype = "fp32"  # rows in float32 cost less here
        if engine is None:
            model, tokenizer = checkpoint.load(directory)
            config = model.config
            with at_work_on(runs_on):
                model.to(runs_on)

            def run_torch(examples: Examples, *, max_length: int, progress: Progress) -> np.ndarray:
                with at_work_on(runs_on):
                    return predict(model, tokenizer, examples, max_length=max_length, progress=progress)

            return cls(directory, config, tokenizer, problem, names, "torch", device, dtype, run_torch)

        config, tokenizer = checkpoint.load_config(directory), checkpoint.load_tokenizer(directory)

        def run(examples: Examples, *, max_length: int, progress: Progress) -> np.ndarray:
            # The same tokenizer as in `predict`: transformers may override what tokenizer.json says.
            encoded = tokenize(tokenizer, examples, token_limit(config, max_length))
            logits = np.empty((len(encoded), config.num_labels), dtype=np.float32)
            for start in range(0, len(encoded), BATCH):
                batch = encoded[start : start + BATCH]
                ids = [row["input_ids"] for row in batch]
                types = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in batch]
                logits[start : start + BATCH] = engine.forward(ids, types, first=start)
                progress(start + len(batch), len(encoded))
            return logits

        return cls(directory, config, tokenizer, problem, names, "sparsebert", device, dtype, run)


def _engine(directory: Path, dtype: str, device: torch.device) -> Engine | None:
    """The engine in this dtype. None if torch does float32 faster, or the engine does not run this model."""
    if dtype == "fp32" and (device.type == "cuda" or _dispatch.isa() == "scalar"):
        return None
    try:
        return Engine.load(directory, dtype=dtype, batch_invariant=True, cached=False)
    except UnsupportedError:
        if dtype != "fp32":
            raise
        return None
