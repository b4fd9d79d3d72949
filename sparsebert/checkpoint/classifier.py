"""Loads a model directory as a stock `transformers` classifier in float32, from the tensors that the engine reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sparsebert import architectures
from sparsebert.checkpoint.encoding import Text
from sparsebert.checkpoint.files import REBUILD
from sparsebert.checkpoint.manifest import golden_entry, golden_texts
from sparsebert.checkpoint.reading import Files, read, require_ids
from sparsebert.errors import CheckpointError, InputError, first_line

# Errors that transformers has been observed to raise for a config.json with wrong contents.
FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError)


def shapes(directory: str | Path):
    """The classifier that a model directory's config.json describes, without weights: its tensors have only shapes."""
    import torch
    from transformers import AutoModelForSequenceClassification

    def made(config):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)

    return _described(directory, made)


def load_config(directory: str | Path):
    """The transformers config object that a model directory's config.json describes."""
    return _described(directory, lambda config: config)


def _described(directory: str | Path, made: Callable):
    """What `made` makes of the config object."""
    files = read(directory, head=False)
    try:
        with quiet_transformers():
            return made(_config(files))
    except FAULTS as error:
        raise CheckpointError(
            f"{files.directory}/config.json must describe a model: {first_line(error)}", fix=REBUILD
        ) from error


def saved_bytes(directory: str | Path) -> int:
    """About how many bytes the weights of a model take that is made from `directory` and saved, in float32."""
    return sum(4 * parameter.numel() for parameter in shapes(directory).parameters())


def load(directory: str | Path, *, num_labels: int | None = None):
    """Loads and verifies a model directory. Returns (model in eval mode and float32, tokenizer).

    num_labels: None requires a complete classifier. A number also accepts an encoder without a head, or with a head of
    another size; the model then gets a new head with this number of labels. Every tensor of the encoder must be present
    in both cases.
    """
    files = read(directory, head=num_labels is None)
    model, tokenizer = build(files, num_labels)
    files.require_same()
    if num_labels is None:
        files.verify_golden(logits_function(files, model))
    return model, tokenizer


def load_tokenizer(directory: str | Path):
    """The tokenizer of a model directory, after a check that it gives the same token ids as the engine."""
    return _tokenizer(read(directory, head=False))


def build(files: Files, num_labels: int | None = None):
    """`load` for a directory that is already open, without the checks of golden logits and of changed files."""
    tokenizer = _tokenizer(files)
    return _model(files, num_labels), tokenizer


def logits_function(files: Files, model) -> Callable[[list[list[int]], list[list[int]]], np.ndarray]:
    """The function (token ids, token types) -> logits that `Files.verify_golden` needs."""
    return lambda ids, types: logits_of(model, ids, types if files.facts.types else None)


def _config(files: Files):
    from transformers import AutoConfig

    left = (
        "model_type",
        "dtype",
        "torch_dtype",
        "chunk_size_feed_forward",
    )  # chunk_size_feed_forward only saves memory, and fails for some text lengths
    config = {name: value for name, value in files.config.items() if name not in left}
    return AutoConfig.for_model(files.config["model_type"]).from_dict(config | {"return_dict": True})


def _model(files: Files, num_labels: int | None):
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForSequenceClassification

    weights = files.weights
    try:
        with quiet_transformers():
            config = _config(files)
            if num_labels is not None and num_labels != config.num_labels:
                config.num_labels = num_labels
            kind = AutoModelForSequenceClassification._model_mapping[type(config)]
            shapes = {**dict(files.facts.encoder_tensors()), **_head_shapes(files, config.num_labels)}
            tensors = {n: torch.from_numpy(a) for n, a in weights.items() if shapes.get(n) == a.shape}
            model, info = kind.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
            )
    except (*FAULTS, StrictDataclassError) as error:
        raise CheckpointError(
            f"{files.directory} must load in transformers as {files.config['model_type']}: {first_line(error)}",
            fix=REBUILD,
        ) from error
    head = _head_shapes(files, config.num_labels).keys() if num_labels is not None else ()
    odd = sorted(
        (set(info["missing_keys"]) - set(head)) | set(info["unexpected_keys"]) | set(map(str, info["mismatched_keys"]))
    )
    if odd:
        raise CheckpointError(
            f"{files.directory}: transformers must load the tensors that the engine reads, differs in {odd[0]}",
            fix="install a version of transformers that this package supports",
        )
    return model.eval()


def _head_shapes(files: Files, labels: int) -> dict[str, tuple[int, ...]]:
    from dataclasses import replace

    return replace(files.facts, labels=labels).head_tensors()


def _tokenizer(files: Files):
    """The transformers tokenizer, after a check that it gives the same ids as `Files.tokenizer`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    ours = files.tokenizer
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(files.directory, local_files_only=True)
    except (*FAULTS, StrictDataclassError) as error:
        raise CheckpointError(
            f"{files.directory} must have a tokenizer that transformers loads: {first_line(error)}", fix=REBUILD
        ) from error
    tokenizer.padding_side = "right"  # padding on the left would shift BERT's positions
    texts = golden_texts(files.facts.max_length)
    for limit in (files.facts.max_length, min(16, files.facts.max_length)):
        ids, types = ours.encode(texts, max_length=limit, truncate=True)
        theirs = [_encoded(tokenizer, text, limit) for text in texts]
        require_ids(texts, ids, [row["input_ids"] for row in theirs], files.directory)
        if files.facts.types > 1:
            require_ids(
                texts,
                types,
                [row.get("token_type_ids", [0] * len(row["input_ids"])) for row in theirs],
                files.directory,
            )
    return tokenizer


def _encoded(tokenizer, text: Text, limit: int) -> dict[str, list[int]]:
    pair = text if isinstance(text, tuple) else (text,)
    return dict(tokenizer(*pair, truncation=True, max_length=limit))


def golden_logits(model, tokenizer, texts: Sequence[Text]) -> tuple[list[list[int]], np.ndarray]:
    """(token ids, float32 logits [n, labels]) of the texts. Each text is run alone, so padding has no effect."""
    limit = architectures.max_length(model.config)
    rows = [_encoded(tokenizer, text, limit) for text in texts]
    ids = [row["input_ids"] for row in rows]
    types = [row["token_type_ids"] for row in rows] if "token_type_ids" in rows[0] else None
    return ids, logits_of(model, ids, types)


def golden(files: Files, model, tokenizer) -> dict:
    """The manifest's entry for the golden texts, after a check that the engine's tokenizer gives the same ids."""
    texts = golden_texts(files.facts.max_length)
    ids, logits = golden_logits(model, tokenizer, texts)
    ours, _ = files.tokenizer.encode(texts, max_length=files.facts.max_length, truncate=True)
    require_ids(texts, ours, ids, files.directory)
    return golden_entry(texts, ids, logits)


def logits_of(model, ids: list[list[int]], types: list[list[int]] | None) -> np.ndarray:
    """float32 logits [texts, labels] of token ids. Each text is run alone."""
    import torch

    found = []
    with torch.inference_mode():
        for i, row in enumerate(ids):
            more = {} if types is None else {"token_type_ids": torch.tensor([types[i]], device=model.device)}
            found.append(model(input_ids=torch.tensor([row], device=model.device), **more).logits[0])
    return torch.stack(found).float().cpu().numpy()


def require_model(model) -> None:
    """Raises InputError for anything but a stock classifier: a path, a wrapped or compiled module, an adapter."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    what, fix = f"a {type(model).__name__}", "pass the model inside of it"
    if isinstance(model, (str, Path)):
        what, fix = f"the path {model}", "load it first: model, tokenizer = sparsebert.checkpoint.load(path)"
    elif hasattr(model, "_orig_mod"):
        fix = "pass model._orig_mod"
    elif hasattr(model, "merge_and_unload"):
        fix = "pass model.merge_and_unload()"
    elif hasattr(model, "module"):
        fix = "pass model.module"
    raise InputError(f"model must be a classifier of transformers, got {what}", fix=fix)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the load report and progress bar of transformers, and restores both at the end. This module checks
    everything that they would report.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
