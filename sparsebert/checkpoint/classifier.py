"""A model directory as a stock `transformers` classifier in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sparsebert.checkpoint.reading import (
    ARCHITECTURES,
    REBUILD,
    TOKENIZER_FILES,
    WEIGHTS,
    read_config,
    read_weights,
    resolve,
    verify_golden,
)
from sparsebert.errors import CheckpointError, first_line

# What transformers was seen to raise for a config.json with wrong contents.
FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError)


def shapes(directory: str | Path):
    """The classifier that a model directory's config.json describes, without weights: its tensors have shapes only."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    directory = resolve(directory)
    read_config(directory)
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            return AutoModelForSequenceClassification.from_config(config)
    except FAULTS as error:
        raise CheckpointError(
            f"{directory}/config.json must describe a model: {first_line(error)}", fix=REBUILD
        ) from error


def load(directory: str | Path, *, num_labels: int | None = None):
    """The classifier and tokenizer of a model directory, verified: (model in eval mode, float32; tokenizer).

    num_labels: None requires a whole classifier. A number is how many labels a fresh head may get where the directory
    holds an encoder alone (or a head of another size); every tensor of the encoder must be present all the same.
    """
    directory = resolve(directory)
    config = read_config(directory)
    read_weights(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up a vocabulary in which every word is unknown.
        raise CheckpointError(f"{directory} has no tokenizer ({TOKENIZER_FILES[0]})", fix=REBUILD)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kwargs = {} if num_labels is None else {"num_labels": num_labels}
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                directory,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                dtype="float32",
                **kwargs,
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (*FAULTS, StrictDataclassError) as error:
        raise CheckpointError(
            f"{directory} must load in transformers as {config['model_type']}: {first_line(error)}", fix=REBUILD
        ) from error
    _verify_complete(directory, model, info, whole=num_labels is None)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}", fix=REBUILD
        )
    model.eval()
    if num_labels is None:
        verify_golden(directory, lambda texts: golden_logits(model, tokenizer, texts))
    return model, tokenizer


def _verify_complete(directory: Path, model, info: dict, *, whole: bool) -> None:
    prefix = model.base_model_prefix + "."
    layers = ARCHITECTURES[model.config.model_type] + "."
    absent = {name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in name}
    mismatched = {entry[0] for entry in info["mismatched_keys"] if whole or entry[0].startswith(prefix)}
    if absent or mismatched:
        name = sorted(absent | mismatched)[0]
        what = "lacks" if name in absent else "has another shape for"
        shape = tuple(model.state_dict()[name].shape)
        raise CheckpointError(f"{directory / WEIGHTS} {what} tensor {name}, {shape} expected", fix=REBUILD)
    surplus = sorted(name for name in info["unexpected_keys"] if layers in name)
    if surplus:
        raise CheckpointError(
            f"{directory / WEIGHTS} has tensor {surplus[0]}, for which config.json has no place", fix=REBUILD
        )
    if whole and info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"]))
        raise CheckpointError(
            f"{directory} is no whole classifier: lacks {names}",
            fix=f"fine-tune it first: sparsebert train {directory}",
        )


def golden_logits(model, tokenizer, texts) -> np.ndarray:
    """float32 logits [n, labels], each text alone and uncut, so that no padding can enter."""
    import torch

    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).float().numpy()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its load report and progress bar say nothing that is not checked here; both are put back as they were."""
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
