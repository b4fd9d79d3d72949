"""Runs the classifier of a model directory on labelled examples, with the fastest engine on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, heads
from sparsebert.data import Examples
from sparsebert.encoders import Progress, predict, token_limit, tokenize
from sparsebert.engine.engine import Engine
from sparsebert.errors import UnsupportedError
from sparsebert.heads import Problem
from sparsebert.ops import _dispatch

BATCH = 64  # texts per call of the engine; progress is reported between calls


@dataclass(frozen=True)
class Classifier:
    """A verified model directory that is ready to predict.

    config, tokenizer: transformers' objects. problem: its problem type. names: its label names, in the order of the
    logits. engine: "sparsebert" or "torch". predict(examples, max_length=…, progress=…): float32 logits, like
    `encoders.predict`.
    """

    directory: Path
    config: object
    tokenizer: object
    problem: Problem
    names: tuple[str, ...]
    engine: str
    predict: Callable[..., np.ndarray]

    @classmethod
    def load(cls, directory: str | Path) -> Classifier:
        """Loads a directory. Torch runs it on a GPU if there is one. Else the engine runs it in float32; if the engine
        cannot, or only on its portable path, torch runs it on the CPU.
        """
        directory = checkpoint.resolve(directory)
        stored = checkpoint.read_config(directory)
        problem, names = heads.problem_of(stored), heads.label_names(stored)
        model, tokenizer = checkpoint.load(directory)
        config = model.config
        on_gpu = torch.cuda.is_available()
        engine = None if on_gpu else _engine(directory)
        if engine is None:
            model.to("cuda" if on_gpu else "cpu")
            return cls(directory, config, tokenizer, problem, names, "torch", partial(predict, model, tokenizer))

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

        return cls(directory, config, tokenizer, problem, names, "sparsebert", run)


def _engine(directory: Path) -> Engine | None:
    """The engine in float32. None if it does not run this model, or only on its portable path, which is slower than
    torch.
    """
    if _dispatch.isa() == "scalar":
        return None
    try:
        return Engine.load(directory, dtype="fp32", batch_invariant=True, cached=False)
    except UnsupportedError:
        return None
