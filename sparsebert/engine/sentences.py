"""Sentence embeddings by the engine, to compare the meaning of two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from sparsebert import checkpoint, jobs
from sparsebert.checkpoint import require_finite
from sparsebert.checkpoint.files import MIB
from sparsebert.engine import architectures
from sparsebert.engine.costs import costs
from sparsebert.engine.formats import pack_cheapest
from sparsebert.errors import CheckpointError, shown
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import PackedEncoder, sparse_encoder

POOLING, MODULES, PROMPTS = "1_Pooling/config.json", "modules.json", "config_sentence_transformers.json"
# Of the encoder; sentence-transformers reads the first that holds something.
SIZES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class SentenceEncoder:
    """A sentence-transformers model whose embedding is the mean over the tokens, scaled to length 1 [Reimers & Gurevych
    2019]. name: for people. sha256: of everything that decides an embedding.
    """

    def __init__(self, encoder: PackedEncoder, files: checkpoint.Files, max_length: int, name: str):
        self.directory, self.name = files.directory, name
        self.sha256 = jobs.digest([files.content_sha256, max_length])
        self._encoder, self._tokenizer, self._max_length = encoder, files.tokenizer, max_length

    @classmethod
    def load(cls, directory: str | Path) -> SentenceEncoder:
        """Loads a model directory; `minilm` is the packaged one. CheckpointError if it pools in another way, changes
        texts first, or is no encoder that the engine runs.
        """
        files = checkpoint.read(directory, head=False)
        found = {name: files.folder.read_json(name, MIB) for name in (POOLING, MODULES, PROMPTS, *SIZES)}
        place = next((name for name in SIZES if found[name]), SIZES[0])
        sizes = found[place] or {}
        fault = _pooling_fault(found[POOLING], found[MODULES]) or _text_fault(found[PROMPTS], place, sizes, files)
        if fault is not None:
            raise CheckpointError(
                f"{files.directory} must be a sentence encoder that takes the mean over tokens: {fault}",
                fix="name another one, or minilm",
            )
        table = costs(_dispatch.isa())
        # The classifier of `sparse_encoder` is not asked for; it needs one anyway.
        names, hidden = files.facts.architecture, files.facts.hidden
        shapes = {names.pooler: (1, hidden), names.classifier: (1, 1)}
        head = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        head |= {f"{name}.bias": np.zeros(1, np.float32) for name in shapes}
        facts = replace(files.facts, labels=1)
        encoder = architectures.build(
            files.weights | head, facts, lambda weight, _: pack_cheapest(weight, table, "fp32", None)
        )[-1]
        most = min(sizes.get("max_seq_length") or files.tokenizer.max_length, encoder.max_length)
        name = "all-MiniLM-L6-v2" if str(directory) == "minilm" else files.directory.name
        return cls(encoder, files, max(3, most), name)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, float32 [texts, H], of length 1. Long texts are cut. A text's has the same bits in any batch."""
        ids, types = self._tokenizer.encode(texts, max_length=self._max_length, truncate=True)
        starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        flat_ids, flat_types = (np.array([x for row in rows for x in row], np.int32) for rows in (ids, types))
        if len(self._encoder.positions) == 1:
            flat_types = np.zeros_like(flat_ids)
        _, states = sparse_encoder(flat_ids, flat_types, starts, self._encoder, states=True)
        sums = np.add.reduceat(states, starts[:-1], axis=0)
        embedded = sums / np.sqrt(np.einsum("th,th->t", sums, sums, dtype=np.float64))[:, None].astype(np.float32)
        require_finite(embedded, self.directory)
        return embedded


def _pooling_fault(pooling: object, modules: object) -> str | None:
    """What makes this another encoder than one that takes the mean over tokens; None if nothing does."""
    if pooling is None:
        return f"lacks {POOLING}"
    if not isinstance(pooling, dict) or not _is_mean(pooling):
        return f"{POOLING} says otherwise"
    if modules is not None and not _is_plain(modules):
        return f"{MODULES} says otherwise"
    return None


def _text_fault(prompts: object, place: str, sizes: object, files: checkpoint.Files) -> str | None:
    """What sentence-transformers would do to a text that is not done here; None if nothing. place: the file that holds
    `sizes`.
    """
    if not isinstance(sizes, dict):
        return f"{place} must hold an object, got {shown(sizes)}"
    length, lower = sizes.get("max_seq_length"), sizes.get("do_lower_case")
    if length is not None and (type(length) is not int or length < 1):
        return f"{place}: max_seq_length must be a number of tokens, got {shown(length)}"
    if lower and not _lowercases(files.tokenizer):
        return f"{place}: do_lower_case must be false, as the tokenizer keeps case, got {shown(lower)}"
    prompts = prompts if isinstance(prompts, dict) else {}
    name, texts = prompts.get("default_prompt_name"), prompts.get("prompts")
    prompt = texts.get(name) if isinstance(texts, dict) and isinstance(name, str) else None
    if prompt:
        return f"{PROMPTS}: the prompt of default_prompt_name must be empty, got {shown(prompt)}"
    return None


def _lowercases(tokenizer: checkpoint.TextEncoder) -> bool:
    """Whether capital letters get the same tokens as small ones."""
    ids, _ = tokenizer.encode([" ".join(ascii_lowercase), " ".join(ascii_uppercase)])
    return ids[0] == ids[1]


def _is_mean(pooling: dict) -> bool:
    """Whether a configuration of sentence-transformers' Pooling, of any version, takes the mean and nothing else."""
    modes = {name for name, value in pooling.items() if name.startswith("pooling_mode") and value}
    return modes == {"pooling_mode_mean_tokens"} or pooling.get("pooling_mode") == "mean"


def _is_plain(modules: object) -> bool:
    """Whether nothing but pooling and scaling comes after the encoder."""
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (TypeError, KeyError):
        return False
    return kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
