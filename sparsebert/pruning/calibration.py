"""Calibration texts: the unlabelled texts that a pruning method looks at. They are the task's own, and others, so that
the model's function on other texts is kept as well.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sparsebert.data import Examples, general_texts, in_pairs, sameness
from sparsebert.data.tables import OF_TEXTS, read_texts
from sparsebert.encoders import collate, token_limit, tokenize
from sparsebert.errors import InputError

Batches = list[dict[str, torch.Tensor]]  # int64 [sequences, length] each; all sequences of a batch have one length
TOKENS_PER_BATCH = 4096
HELD_OUT = 256  # max texts to choose on within a method, at most a tenth of all; never calibrated on
# Parts of a calibration set and their shares of its tokens, if there are texts other than the task's. Of both kinds
# there are single texts, and several texts joined to a longer one. Chosen by `study_calibration choose`, on tasks that
# are not reported: the least drift elsewhere of the mixtures that stay within about 10 % of the task's texts alone.
SHARES = {"task": 0.6, "task, joined": 0.15, "others": 0.1, "others, joined": 0.15}
SHORTEST_JOINED = 48  # tokens
NONE, GENERAL = "none", "general"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Texts in a seeded order: `texts` to calibrate on, `held_out` to choose on within a method.

    max_length: max tokens per text, at most the model's positions; the rest is cut. parts: tokens in each part of the
    set.
    """

    texts: Examples
    held_out: Examples
    tokenizer: object
    max_length: int
    parts: dict[str, int] = field(default_factory=dict)

    @cached_property
    def batches(self) -> Batches:
        """`texts` in batches of one length each, so that there is no padding; longest first."""
        return unpadded(self.tokenizer, tokenize(self.tokenizer, self.texts, self.max_length))

    @property
    def tokens(self) -> int:
        """Number of tokens in `texts`."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @cached_property
    def held_out_batches(self) -> Batches:
        """`held_out` in batches like those of `batches`."""
        return unpadded(self.tokenizer, tokenize(self.tokenizer, self.held_out, self.max_length))

    @cached_property
    def padded_batches(self) -> Batches:
        """The first of `texts`, batched as in the released code of Li et al.: 256 texts per batch, cut or padded to 64
        tokens. There are as many whole batches as fit into the number of `tokens`, padding counted. InputError if none
        fits.
        """
        count = min(self.tokens // 64, len(self.texts)) // 256 * 256
        if not count:
            raise InputError(
                "--as-published needs at least 256 texts and 64 tokens for each, 16384 in total, "
                f"got {len(self.texts)} texts with {self.tokens} tokens",
                fix="raise --calibration-tokens",
            )
        encoded = tokenize(self.tokenizer, self.texts.take(np.arange(count)), min(64, self.max_length))
        return [
            dict(self.tokenizer.pad(encoded[i : i + 256], padding="max_length", max_length=64, return_tensors="pt"))
            for i in range(0, len(encoded), 256)
        ]

    @property
    def sha256(self) -> str:
        """Content hash: the data part of a job's key."""
        return self.texts.sha256 + self.held_out.sha256


def others(named: list[str], columns: tuple[str, ...] = ()) -> list[str]:
    """The texts that `--calibration` names, in order. A name is a file (.txt: one text per line; .csv, .tsv, .jsonl,
    .parquet: the columns of texts, which are `columns` if it has them), "general" (the packaged texts, the default) or
    "none".
    """
    named = named or [GENERAL]
    if NONE in named and len(named) > 1:
        raise InputError(f"calibration must be {NONE} or texts, got both", fix=f"leave {NONE} out")
    found: list[str] = []
    for name in named:
        if name == GENERAL:
            found += general_texts()
        elif name != NONE:
            path = Path(name)
            if path.suffix not in OF_TEXTS:
                raise InputError(
                    f"calibration must be {GENERAL}, {NONE} or files that end in {', '.join(OF_TEXTS)}, got {name}",
                    fix="convert or rename it",
                )
            found += [text for column in read_texts(path, columns)[0] for text in column]
    return found


def draw(
    model,
    tokenizer,
    examples: Examples,
    tokens: int,
    max_length: int | None,
    seed: int,
    *,
    others: Sequence[str] = (),
    shares: dict[str, float] | None = None,
) -> Calibration:
    """Draws calibration texts from `examples`, and from `others` if there are any, in a seeded random order.

    Some texts are held out. The rest gives about `tokens` tokens, of which each part gets its share. If a part has too
    few texts, the set is smaller; joined texts never run out, because they are joined anew. shares: of each part; None
    for SHARES, or for the task's texts alone if there are no others. max_length: max tokens per text; None for the
    model's positions.

    Pair tasks: two texts of `others` make a pair; texts are joined to texts on the same side of the pair.
    """
    limit = token_limit(model.config, max_length)
    rng = np.random.default_rng(seed)
    own = _Pool(examples.texts, examples.texts_b)
    pools = {"task": own}
    if others:
        pools["others"] = _Pool(*in_pairs(others, examples.texts_b is not None))
        if not pools["others"].texts:
            raise InputError("calibration on pairs needs at least two other texts, got 1", fix="give more texts")
    shares = shares or (SHARES if others else {"task": 1.0})
    held, rest, apart = {}, {}, {}
    for name, pool in pools.items():
        order = rng.permutation(len(pool.texts))
        held[name], rest[name] = np.split(order, [held_out_of(len(order))])
        apart[name] = set(sameness(pool.taken(held[name])))

    def composed(
        rows: dict[str, np.ndarray], budget: float, apart: dict[str, set] | None = None
    ) -> tuple[Examples, dict[str, int]]:
        texts, texts_b, parts = [], [], {}
        for part, share in shares.items():
            name, joined = part.removesuffix(_JOINED), part.endswith(_JOINED)
            counted = 0
            but = apart[name] if apart else frozenset()
            for a, b, length in pools[name].drawn(tokenizer, rows[name], limit, rng if joined else None, but=but):
                if counted >= share * budget:
                    break
                texts.append(a)
                texts_b.append(b)
                counted += length
            parts[part] = counted
        order = rng.permutation(len(texts)) if others else np.arange(len(texts))
        made = Examples(examples.task, examples.split, texts, texts_b if own.texts_b is not None else None, None)
        return made.take(order), parts

    # The held-out texts are the same mixture, as many tokens as the task's held-out texts allow.
    small = sum(length for *_, length in own.drawn(tokenizer, held["task"], limit)) / shares["task"]
    held_out, _ = composed(held, small)
    texts, parts = composed(rest, tokens, apart)
    if not len(texts) or (len(texts) > 1 and len(set(sameness(texts))) == 1):  # the head's input would not vary
        raise InputError(
            f"calibration texts must differ, all {len(examples)} are {examples.texts[0][:60]!r}",
            fix="give texts that differ",
        )
    return Calibration(texts, held_out, tokenizer, limit, parts)


def held_out_of(texts: int) -> int:
    """Number of texts that `draw` holds out of so many."""
    return min(HELD_OUT, texts // 10)


_JOINED = ", joined"


@dataclass(frozen=True)
class _Pool:
    """Texts that parts of a calibration set are drawn from. texts_b: the second texts of pairs, else None."""

    texts: Sequence[str]
    texts_b: Sequence[str] | None

    def taken(self, rows: np.ndarray) -> Examples:
        """The texts at `rows`."""
        return Examples("", "", self.texts, self.texts_b, None).take(rows)

    def drawn(
        self,
        tokenizer,
        rows: np.ndarray,
        limit: int,
        rng: np.random.Generator | None = None,
        but: Container[tuple[str, ...]] = frozenset(),
    ) -> Iterator[tuple[str, str | None, int]]:
        """Yields (text, text_b, number of tokens after the cut) of these rows, in order. With an rng: yields joined
        texts, each of a random number of tokens from SHORTEST_JOINED to `limit`, without end; the rows are shuffled
        before each time through. but: `sameness` keys of texts to leave out.
        """
        if rng is None:
            yield from self._counted(tokenizer, rows, limit, but)
            return
        several: list[tuple[str, str | None]] = []
        special = tokenizer.num_special_tokens_to_add(pair=self.texts_b is not None)
        length, wanted = special, rng.uniform(min(SHORTEST_JOINED, limit), limit)
        found = True
        while found:
            found = False
            for a, b, own in self._counted(tokenizer, rng.permutation(rows), limit, but):
                found = True
                several.append((a, b))
                length += own - special
                if length >= wanted:
                    texts, texts_b = zip(*several, strict=True)
                    yield " ".join(texts), None if b is None else " ".join(texts_b), min(length, limit)
                    several, length, wanted = [], special, rng.uniform(min(SHORTEST_JOINED, limit), limit)

    def _counted(
        self, tokenizer, rows: np.ndarray, limit: int, but: Container[tuple[str, ...]]
    ) -> Iterator[tuple[str, str | None, int]]:
        for start in range(0, len(rows), 1024):
            some = self.taken(rows[start : start + 1024])
            keys, encoded = sameness(some), tokenize(tokenizer, some, limit)
            for a, b, key, row in zip(some.texts, some.texts_b or [None] * len(some), keys, encoded, strict=True):
                if key not in but:
                    yield a, b, len(row["input_ids"])


def unpadded(tokenizer, encoded: list[dict], tokens: int = TOKENS_PER_BATCH) -> Batches:
    """Batches of at most `tokens` tokens (or of one longer text), each of texts of one length; longest first."""
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    batches = []
    for length in sorted(set(lengths.tolist()), reverse=True):
        rows = np.flatnonzero(lengths == length)
        size = max(1, tokens // length)
        batches += [collate(tokenizer, encoded, rows[i : i + size]) for i in range(0, len(rows), size)]
    return batches
