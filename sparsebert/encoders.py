"""Functions on a stock `transformers` classifier that training, pruning and evaluation share: its linears, its batches,
its logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from sparsebert import architectures, checkpoint, data, heads
from sparsebert.checkpoint import piecewise, require_finite, require_model
from sparsebert.config import TaskConfig
from sparsebert.data import Examples, Task
from sparsebert.errors import InputError
from sparsebert.machine import bf16_is_fast


class Progress(Protocol):
    """Progress callback: called with (units done, units in total). what: the part of the work they belong to, if there
    are several parts.
    """

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


def no_progress(done: int, total: int, what: str = "") -> None:
    """Progress callback that does nothing."""


def encoder_layers(model) -> nn.ModuleList:
    """The encoder's layers, first to last."""
    require_model(model)
    return model.base_model.get_submodule(architectures.of(model.config.model_type).layers)


def head_linears(model, *, classifier: bool = True) -> dict[str, nn.Linear]:
    """The linears after the encoder, by their full name: the pooler or hidden layer, and last the classifier proper,
    unless `classifier` is false.
    """
    inside = encoder_linears(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in inside and "embedding" not in name
    ]
    return dict(found if classifier else found[:-1])


def encoder_linears(model) -> dict[str, nn.Linear]:
    """The prunable linears, by their full name: every nn.Linear inside the encoder's layers, but not the embeddings,
    pooler and classifier.
    """
    inside = {id(module) for layer in encoder_layers(model) for module in layer.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }


def set_labels(model, names: Sequence[str], columns: np.ndarray | None = None) -> None:
    """Names the model's labels. columns: for each name, the index of its output in the model; the classifier's rows are
    put into the order of the names. None: they are in that order already.
    """
    if columns is not None and (columns != np.arange(len(columns))).any():
        classifier = list(head_linears(model).values())[-1]
        rows = torch.from_numpy(columns)
        with torch.no_grad():
            for part in classifier.parameters():
                part.copy_(part[rows].clone())
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


@contextmanager
def forwards_replaced(modules: Iterable[nn.Module], forward_of: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Inside the block, `forward_of(module)` runs in place of the forward of each module."""
    before = {module: vars(module).get("forward") for module in modules}  # None: its class has the only one
    for module in before:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def layers_skipped(layers: Iterable[nn.Module], cell: list):
    """A context in which each of these layers returns cell[0] without computing anything."""
    return forwards_replaced(layers, lambda _: lambda *args, **kwargs: cell[0])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block, no parameter of the module has requires_grad."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def autocast(bf16: bool | None = None, device: torch.device | None = None) -> torch.autocast:
    """A context in which matrix products on `device` (None: the CPU) are bf16 if `bf16` is true; None: if the device
    multiplies bf16 in hardware.
    """
    kind = "cpu" if device is None else device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16_is_fast(device) if bf16 is None else bf16)


def moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def task_for(task: str | TaskConfig, source: str | Path, *, labelled: bool = True, beside: bool = False) -> Task:
    """The task (data.get_task), read for the model in directory `source`: if the model has one logit, a file's numbers
    are values, not ids of classes; and the user's own texts are as long as the model's tokenizer lets them be, which is
    what `predict` and the server keep. A name that is not a task is refused before the model is read.
    """
    name = TaskConfig.of(task).task
    if name in data.TASKS or not os.path.lexists(name):
        return data.get_task(task, labelled=labelled, beside=beside)
    files = checkpoint.read(source, head=False)
    values = files.has_head and heads.problem_of(files.config) is heads.ONE_LOGIT
    own = data.get_task(task, labelled=labelled, values=values, beside=beside)
    return own if own.max_length is not None else replace(own, max_length=files.tokenizer.max_length)


def token_limit(config, wanted: int | None) -> int:
    """Max tokens per text for a model of this transformers config: its positions, or `wanted` if that is less."""
    positions = architectures.max_length(config)
    return positions if wanted is None else min(wanted, positions)


def limited(task: Task, config, asked: int | None) -> Task:
    """The task with the max_length for a model of this transformers config: `asked`, else the task's own, at most the
    model's positions. Raises InputError if the model cannot take `asked` tokens, or they leave no room for a text.
    """
    positions, least = token_limit(config, None), 6 if task.pair else 3  # four special tokens around a pair, at most
    if asked is not None and not least <= asked <= positions:
        raise InputError(f"max_length must be {least} to {positions}, got {asked}", fix="choose a length in that range")
    return replace(task, max_length=token_limit(config, task.max_length if asked is None else asked))


LONG_TEXT = 1 << 16  # characters


def tokenize(tokenizer, examples: Examples, max_length: int) -> list[dict]:
    """One dict of token id lists per example, cut to max_length tokens, not padded. Of a long text only the part that
    is kept is read: 10 MB would take 30 s and 3 GB.
    """
    characters = [
        len(a) + len(b) for a, b in zip(examples.texts, examples.texts_b or [""] * len(examples), strict=True)
    ]
    long = [i for i, count in enumerate(characters) if count > LONG_TEXT]
    encoder = piecewise(tokenizer) if long else None
    if encoder is None:
        return _tokenized(tokenizer, examples, max_length)
    short = [i for i, count in enumerate(characters) if count <= LONG_TEXT]
    rows = dict(zip(short, _tokenized(tokenizer, examples.take(short), max_length), strict=True)) if short else {}
    some = examples.take(long)
    texts = some.texts if some.texts_b is None else list(zip(some.texts, some.texts_b, strict=True))
    for i, ids, types in zip(long, *encoder.encode(texts, max_length=max_length, truncate=True), strict=True):
        row = {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}
        rows[i] = {name: row[name] for name in tokenizer.model_input_names}
    return [rows[i] for i in range(len(examples))]


def _tokenized(tokenizer, examples: Examples, max_length: int) -> list[dict]:
    encoded = tokenizer(examples.texts, examples.texts_b, truncation=True, max_length=max_length)
    return [{name: column[i] for name, column in encoded.items()} for i in range(len(examples))]


def cut_share(tokenizer, examples: Examples, encoded: list[dict], max_length: int) -> float:
    """Share of the examples that have more than max_length tokens. encoded: from `tokenize`, cut to max_length."""
    full = examples.take([i for i, row in enumerate(encoded) if len(row["input_ids"]) == max_length])
    if not len(full):
        return 0.0
    return sum(len(row["input_ids"]) > max_length for row in tokenize(tokenizer, full, max_length + 1)) / len(examples)


def collate(tokenizer, encoded: list[dict], rows) -> dict[str, torch.Tensor]:
    """The examples `rows` as one batch, int64 [rows, longest of them]."""
    return dict(tokenizer.pad([encoded[i] for i in rows], return_tensors="pt"))


def bucketed(
    encoded: list[dict], batch_size: int, rng: np.random.Generator | None = None, window: int = 50
) -> list[np.ndarray]:
    """Rows in batches of similar length, so that little padding is computed.

    Without rng: sorted by length, longest first (memory peaks at the start, not at the end). With rng: shuffled, sorted
    within windows of `window` batches, and the batches shuffled again: an epoch's order stays random at the scale of a
    window.
    """
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    if rng is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), window * batch_size):
        block = order[start : start + window * batch_size]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches(tokenizer, encoded: list[dict], batch_size: int) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """(rows, batch) over all examples, longest first."""
    for rows in bucketed(encoded, batch_size):
        yield rows, collate(tokenizer, encoded, rows)


def predict(
    model, tokenizer, examples: Examples, *, max_length: int, batch_size: int = 64, progress: Progress = no_progress
) -> np.ndarray:
    """Logits, float32 [examples, labels], in the order of the examples; puts the model into eval mode. max_length: max
    tokens kept of a text, at most the model's positions.
    """
    encoded = tokenize(tokenizer, examples, token_limit(model.config, max_length))
    logits = np.empty((len(examples), model.config.num_labels), dtype=np.float32)
    model.eval()
    done = 0
    with torch.inference_mode():
        for rows, batch in batches(tokenizer, encoded, batch_size):
            logits[rows] = model(**moved(batch, model.device)).logits.float().cpu().numpy()
            done += len(rows)
            progress(done, len(examples))
    require_finite(logits, model.name_or_path or type(model).__name__)
    return logits
