"""How far the first token's hidden states are from the dense model's, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from sparsebert import checkpoint
from sparsebert.data import Examples
from sparsebert.encoders import batches, token_limit, tokenize


@torch.inference_mode()
def first_token(model, tokenizer, texts: Sequence[str], max_length: int | None) -> torch.Tensor:
    """The first token's hidden state after each layer: float32 [layers, texts, hidden]."""
    encoded = tokenize(tokenizer, Examples("texts", "", list(texts), None, None), token_limit(model.config, max_length))
    found = [torch.empty(0)] * len(texts)
    for rows, batch in batches(tokenizer, encoded, 64):
        states = model.eval()(**batch, output_hidden_states=True).hidden_states[1:]
        for row, state in zip(rows, torch.stack([layer[:, 0] for layer in states], 1), strict=True):
            found[row] = state
    return torch.stack(found, 1)


def distances(model: str | Path, dense: str | Path, texts: Sequence[str], max_length: int | None = None) -> list[float]:
    """For each layer, the mean over texts of 1 - cos of the first token's hidden states in two model directories.

    Li et al. 2023, Table 4, give such distances without saying of which kind.
    """
    both = [first_token(*checkpoint.load(directory), texts, max_length) for directory in (model, dense)]
    return (1 - cosine_similarity(*both, dim=2)).mean(1).tolist()
