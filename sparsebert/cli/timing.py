"""What `sparsebert bench` times: a model directory or random weights, on a task's texts or on texts of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data
from sparsebert.config import BenchConfig
from sparsebert.errors import InputError

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265}
SHAPES = {  # the class of transformers, and what its defaults, BERT-base, do not say
    "minilm": ("Bert", MINILM),
    "bert-base": ("Bert", {}),
    "bert-large": ("Bert", LARGE),
    "roberta-base": ("Roberta", ROBERTA),
}
LABELS = 8  # tolerances are shares of the largest logit; of two random ones both are sometimes small


def random_model(config: BenchConfig, folder: Path) -> Path:
    """A model directory of random weights under `folder`, pruned to the pattern by magnitude, which is at random."""
    import torch
    import transformers

    from sparsebert.pruning.entry import save_stand_in

    name, sizes = SHAPES[config.random]
    made = getattr(transformers, f"{name}Config")(**sizes, num_labels=LABELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForSequenceClassification")(made).eval()
    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve("minilm"))
    save_stand_in(
        model, tokenizer, folder / config.random, config.pattern, config.sparsity, int8=config.dtype == "int8",
        command="bench",
    )  # fmt: skip
    return folder / config.random


def texts_of(directory: Path, config: BenchConfig) -> list[dict]:
    """Token id lists: `config.n` of the task's test texts, or of random words of one length."""
    from sparsebert.encoders import limited, token_limit, tokenize

    stock = checkpoint.load_config(directory)
    if config.seq != "mix":
        if config.max_length is not None:
            raise InputError(f"--max-length belongs to --seq mix, got --seq {config.seq}", fix="leave it out")
        length = int(config.seq)
        if token_limit(stock, length) < length:
            limit = token_limit(stock, length)
            raise InputError(f"seq must be at most {limit} tokens, got {length}", fix="choose a shorter --seq")
        # The first tokens of a vocabulary are special ones.
        words = np.random.default_rng(config.seed).integers(stock.vocab_size // 2, stock.vocab_size, (config.n, length))
        return [{"input_ids": row.tolist(), "attention_mask": [1] * length} for row in words]
    spec = limited(data.get_task(config, labelled=False), stock, config.max_length)
    examples = data.load(spec, spec.test, limit=config.n, seed=config.seed)
    return tokenize(checkpoint.load_tokenizer(directory), examples, spec.max_length)
