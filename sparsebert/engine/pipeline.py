"""The engine inside a transformers pipeline: the same calls as for `transformers.pipeline`, run faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsebert import checkpoint
from sparsebert.engine.engine import Engine
from sparsebert.errors import InputError

if TYPE_CHECKING:
    from transformers import TextClassificationPipeline

TASKS = ("text-classification", "sentiment-analysis")  # the second is transformers' other name for the first


def pipeline(
    task: str,
    model: str | Path,
    *,
    dtype: str = "auto",
    threads: int | None = None,
    batch_invariant: bool = False,
    **options,
) -> TextClassificationPipeline:
    """`transformers.pipeline(task, model, **options)` for a local model directory, run by the engine: the same calls,
    and the same answers up to the rounding of `dtype`. Needs torch and transformers, like any pipeline.

    >>> classify = sparsebert.pipeline("text-classification", "sst2-s875")
    >>> classify("a gripping film")
    [{'label': 'positive', 'score': 0.998…}]

    dtype, threads, batch_invariant: as for `Engine.load`. options: as for `transformers.pipeline`; batch_size texts are
    one call of the engine, which computes no padding. Raises InputError for another task, and the errors of
    `Engine.load`.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}", fix="pass one of these")
    import torch
    import transformers
    from transformers.modeling_outputs import SequenceClassifierOutput

    directory = checkpoint.resolve(model)
    engine = Engine.load(directory, dtype=dtype, threads=threads, batch_invariant=batch_invariant)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)

    class Runs:
        """The parts of a model that a pipeline uses."""

        device = torch.device("cpu")
        dtype = torch.float32  # of the logits

        def __init__(self):
            self.config = config

        def forward(self, input_ids, attention_mask=None, token_type_ids=None) -> SequenceClassifierOutput:
            ids = input_ids.numpy()
            kept = np.ones_like(ids) if attention_mask is None else attention_mask.numpy()
            types = np.zeros_like(ids) if token_type_ids is None else token_type_ids.numpy()
            rows = [np.flatnonzero(row) for row in kept]
            logits = engine.forward(
                [row[at].tolist() for row, at in zip(ids, rows, strict=True)],
                [row[at].tolist() for row, at in zip(types, rows, strict=True)],
            )
            return SequenceClassifierOutput(logits=torch.from_numpy(logits))

        __call__ = forward

        def to(self, device):
            if torch.device(device).type != "cpu":
                raise InputError(f"device must be cpu, got {device}", fix="leave it out")
            return self

        def can_generate(self) -> bool:
            return False

    # A pipeline decides by the name of its class whether it can run a model.
    stock = (config.architectures or ["BertForSequenceClassification"])[0]
    tokenizer = options.pop("tokenizer", None) or transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True
    )
    return transformers.pipeline(TASKS[0], type(stock, (Runs,), {})(), tokenizer=tokenizer, **options)
