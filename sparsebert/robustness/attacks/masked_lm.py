"""Words that a masked-language model proposes for a place in a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from string import punctuation

import numpy as np
import torch

from sparsebert import checkpoint
from sparsebert.encoders import token_limit
from sparsebert.errors import CheckpointError, first_line
from sparsebert.robustness.attacks.attack import Blank
from sparsebert.robustness.attacks.words import words_of

# Of a word's pieces: all of three with 8 tokens each. TextAttack forms all of any number, which takes hours.
MOST_COMBINATIONS = 512


class MaskedLM:
    """A masked-language model of a local directory, run by torch. name: for people. sha256: of its weights."""

    def __init__(self, model, tokenizer, name: str, sha256: str):
        self._model, self._tokenizer, self.name, self.sha256 = model, tokenizer, name, sha256
        self._begins = tokenizer.tokenize("a a")[-1].removesuffix("a")  # what marks the first piece of a word, if any
        self._specials = frozenset(tokenizer.all_special_ids)
        self._max_length = token_limit(model.config, tokenizer.model_max_length)

    @classmethod
    def load(cls, directory: str | Path) -> MaskedLM:
        """CheckpointError if the directory holds no masked-language model with a fast tokenizer."""
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        path = checkpoint.resolve(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model, loading = AutoModelForMaskedLM.from_pretrained(
                path, local_files_only=True, output_loading_info=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} must be a masked-language model: {first_line(error)}", fix="name the directory of one"
            ) from error
        if loading["missing_keys"]:
            raise CheckpointError(
                f"{path} must be a masked-language model, lacks {sorted(loading['missing_keys'])[0]}",
                fix="name the directory of a model that was saved with its masked-language head",
            )
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            raise CheckpointError(f"{path} must have a fast tokenizer with a mask", fix="name another model")
        return cls(model.eval(), tokenizer, path.name, checkpoint.source_sha256(path))

    def propose(self, blanks: Sequence[Blank]) -> list[list[str]]:
        """For each blank, words, the likeliest first. Which tokens are words is TextAttack's rule."""
        mask = self._tokenizer.mask_token
        texts = [b.text[: b.start] + mask + b.text[b.end :] if b.masked else b.text for b in blanks]
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        encoded = self._tokenizer(
            list(rows),
            truncation=True,
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping").numpy()
        with torch.inference_mode():
            logits = self._model(**encoded).logits
        ids = encoded["input_ids"].numpy()
        found = []
        for blank, text in zip(blanks, texts, strict=True):
            row = rows[text]
            begin, end = offsets[row].T
            if blank.masked:  # a token of a mask may begin with the space before it
                its = (ids[row] == self._tokenizer.mask_token_id) & (end == blank.start + len(mask))
            else:
                its = (begin >= blank.start) & (end <= blank.end) & (end > begin)
            places = np.flatnonzero(its)  # none if the text was cut before it
            words = self._for_mask if blank.masked else self._for_pieces
            found.append(words(logits[row], places, blank.most) if len(places) else [])
        return found

    def _for_mask(self, logits: torch.Tensor, places: np.ndarray, most: int) -> list[str]:
        """The `most` likeliest words, without those that have no letter. Pieces without their marks are words too.
        logits: [tokens, vocabulary]. places: the one of the mask.
        """
        ranked = (self._joined([token]) for token in logits[places[0]].argsort(descending=True).tolist())
        words = (word for word in ranked if len(words_of(word)) == 1 and not set(word) <= set(punctuation))
        return [word for word in islice(words, most) if any(c.isascii() and c.isalpha() for c in word)]

    def _for_pieces(self, logits: torch.Tensor, places: np.ndarray, most: int) -> list[str]:
        """The first words that the `most` likeliest tokens of each piece make together; the last piece changes first.
        logits: [tokens, vocabulary]. places: those of the word's pieces.
        """
        top = logits[torch.from_numpy(places)].topk(min(most, logits.shape[1])).indices.tolist()
        if len(top) == 1:
            first = places[0] == 1  # at the start of a text no space marks a word
            top = [[token for token in top[0] if self._is_whole(token, first)]]
        joined = (self._joined(tokens) for tokens in islice(product(*top), MOST_COMBINATIONS))
        return list(islice((word for word in joined if len(words_of(word)) == 1), most))

    def _is_whole(self, token: int, first: bool) -> bool:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return "##" not in piece and (first or piece.startswith(self._begins))

    def _joined(self, tokens: Sequence[int]) -> str:
        """The tokens as one word, without the marks of pieces; nothing if one is a special token."""
        if not self._specials.isdisjoint(tokens):
            return ""
        pieces = self._tokenizer.convert_ids_to_tokens(tokens)
        parts = [self._tokenizer.convert_tokens_to_string([piece]).strip() for piece in pieces]
        return "".join(parts).replace("##", "")
