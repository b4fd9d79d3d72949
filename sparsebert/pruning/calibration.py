"""The unlabelled texts a pruning method may look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sparsebert import data
from sparsebert.encoders import collate, token_limit, tokenize
from sparsebert.errors import InputError

Batches = list[dict[str, torch.Tensor]]  # int64 [sequences, length] each, a batch's sequences all of one length
TOKENS_PER_BATCH = 4096
HELD_OUT = 256  # texts for choices within a method, at most a tenth of all: never calibrated on


@dataclass(frozen=True, eq=False)
class Calibration:
    """Texts in a seeded order: `texts` to calibrate on, `held_out` for choices within a method.

    max_length: tokens kept of a text, at most the model's positions.
    """

    texts: data.Examples
    held_out: data.Examples
    tokenizer: object
    max_length: int

    @cached_property
    def batches(self) -> Batches:
        """`texts` in batches of one length each, so that there is no padding; longest first."""
        return unpadded(self.tokenizer, tokenize(self.tokenizer, self.texts, self.max_length))

    @property
    def tokens(self) -> int:
        """Of all `texts`."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @cached_property
    def held_out_batches(self) -> Batches:
        """`held_out` likewise."""
        return unpadded(self.tokenizer, tokenize(self.tokenizer, self.held_out, self.max_length))

    @cached_property
    def padded_batches(self) -> Batches:
        """The first of `texts` as the released code of Li et al. feeds them: 256 at a time, cut or padded to 64 tokens,
        as many whole batches as have at most the tokens of `texts`, padding counted. InputError where that is none.
        """
        count = min(self.tokens // 64, len(self.texts)) // 256 * 256
        if not count:
            raise InputError(
                "--as-published pads 256 texts to 64 tokens each, 16384 in all, "
                f"got {len(self.texts)} texts of {self.tokens}",
                fix="raise --calibration-tokens",
            )
        encoded = tokenize(self.tokenizer, self.texts.take(np.arange(count)), min(64, self.max_length))
        return [
            dict(self.tokenizer.pad(encoded[i : i + 256], padding="max_length", max_length=64, return_tensors="pt"))
            for i in range(0, len(encoded), 256)
        ]

    @property
    def sha256(self) -> str:
        """Content hash: the data part of a key."""
        return self.texts.sha256 + self.held_out.sha256


def draw(model, tokenizer, examples: data.Examples, tokens: int, max_length: int, seed: int) -> Calibration:
    """Texts of `examples` in a seeded random order: the first ones held out, then as many as have `tokens` tokens."""
    max_length = token_limit(model.config, max_length)
    order = np.random.default_rng(seed).permutation(len(examples))
    held_out, order = np.split(order, [min(HELD_OUT, len(order) // 10)])
    chosen, counted = [], 0
    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        lengths = np.array([len(e["input_ids"]) for e in tokenize(tokenizer, examples.take(rows), max_length)])
        within = counted + np.cumsum(lengths) - lengths < tokens  # the text that crosses the line is in
        chosen.append(rows[within])
        counted += int(lengths[within].sum())
        if not within.all():
            break
    return Calibration(examples.take(np.concatenate(chosen)), examples.take(held_out), tokenizer, max_length)


def unpadded(tokenizer, encoded: list[dict], tokens: int = TOKENS_PER_BATCH) -> Batches:
    """Batches of at most about `tokens` tokens, each of texts of one length; longest first."""
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    batches = []
    for length in sorted(set(lengths.tolist()), reverse=True):
        rows = np.flatnonzero(lengths == length)
        size = max(1, tokens // length)
        batches += [collate(tokenizer, encoded, rows[i : i + size]) for i in range(0, len(rows), size)]
    return batches
