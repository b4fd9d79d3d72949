"""Words that a masked-language model proposes for a place in a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint
from sparsebert.encoders import token_limit
from sparsebert.errors import CheckpointError, first_line
from sparsebert.robustness.attacks.attack import Blank

MOST_PIECES = 3  # a word of more pieces gets no proposals: 8 each make 512 combinations of three


class MaskedLM:
    """A masked-language model of a local directory, run by torch. name: for people. sha256: of its weights."""

    def __init__(self, model, tokenizer, name: str, sha256: str):
        self._model, self._tokenizer, self.name, self.sha256 = model, tokenizer, name, sha256
        self._begins = tokenizer.tokenize("a a")[-1].removesuffix("a")  # what marks the first piece of a word, if any
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
        return cls(model.eval(), tokenizer, path.name, checkpoint.weights_sha256(path))

    def propose(self, blanks: Sequence[Blank]) -> list[list[str]]:
        """For each blank, whole words, the likeliest first."""
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
            logits = self._model(**encoded).logits.log_softmax(-1)
        ids = encoded["input_ids"].numpy()
        found = []
        for blank, text in zip(blanks, texts, strict=True):
            row = rows[text]
            begin, end = offsets[row].T
            if blank.masked:  # a token of a mask may begin with the space before it
                its = (ids[row] == self._tokenizer.mask_token_id) & (end == blank.start + len(mask))
            else:
                its = (begin >= blank.start) & (end <= blank.end) & (end > begin)
            places = np.flatnonzero(its)
            found.append(self._words(logits[row], places, blank.most))
        return found

    def _words(self, logits: torch.Tensor, places: np.ndarray, most: int) -> list[str]:
        """logits: log probabilities [tokens, vocabulary]. places: the pieces to fill; none if the text was cut."""
        if not 1 <= len(places) <= MOST_PIECES:
            return []
        top = logits[torch.from_numpy(places)].topk(min(most, logits.shape[1]))
        if len(places) == 1:
            pieces = self._tokenizer.convert_ids_to_tokens(top.indices[0].tolist())
            words = [piece.removeprefix(self._begins) for piece in pieces if piece.startswith(self._begins)]
            return [word for word in words if word.isalpha()]
        ranked = []
        for choice in product(range(top.indices.shape[1]), repeat=len(places)):
            at = list(enumerate(choice))
            pieces = self._tokenizer.convert_ids_to_tokens([int(top.indices[i, j]) for i, j in at])
            likely = sum(float(top.values[i, j]) for i, j in at)
            word = self._tokenizer.convert_tokens_to_string(pieces).strip()
            if word.isalpha():
                ranked.append((-likely, word))
        return [word for _, word in sorted(ranked)[:most]]
