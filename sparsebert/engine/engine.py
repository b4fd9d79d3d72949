"""Runs a pruned BERT classifier: tokens of all sequences concatenated, linears by `sparse_matmul`, no padding
anywhere.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparsebert import checkpoint, environment
from sparsebert.data import require_texts
from sparsebert.errors import CheckpointError, InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import PackedWeight, pack, sparse_matmul

# transformers' defaults for the fields of config.json read here.
_DEFAULTS = {
    "hidden_act": "gelu",
    "id2label": {},
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "sparsebert": {},
}


@dataclass(frozen=True, eq=False)
class _Linear:
    weight: PackedWeight
    bias: np.ndarray
    gelu: bool = False

    def __call__(self, x: np.ndarray, threads: int) -> np.ndarray:
        return sparse_matmul(x, self.weight, self.bias, gelu=self.gelu, threads=threads)


@dataclass(frozen=True, eq=False)
class _Norm:
    weight: np.ndarray
    bias: np.ndarray
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Layer norm of float32 [tokens, hidden], in place."""
        x -= x.mean(axis=1, keepdims=True)
        variance = np.einsum("th,th->t", x, x) / x.shape[1]
        x *= (1.0 / np.sqrt(variance + np.float32(self.eps)))[:, None]
        x *= self.weight
        x += self.bias
        return x


@dataclass(frozen=True, eq=False)
class _Layer:
    qkv: _Linear
    attention_out: _Linear
    attention_norm: _Norm
    up: _Linear
    down: _Linear
    norm: _Norm


class Engine:
    """A sequence classifier of the BERT architecture, read-only after loading; `logits` may be called from several
    threads.

    >>> engine = Engine.load("sst2-s875")
    >>> engine.logits(["a gripping film", ("a premise", "its hypothesis")])      # float32 [texts, labels]
    """

    def __init__(self, weights: dict[str, np.ndarray], config: dict, tokenizer: Tokenizer, threads: int):
        self.config, self.threads, self._tokenizer, self._lock = config, threads, tokenizer, threading.Lock()
        self._heads = config["num_attention_heads"]
        take, norm, linear = _readers(weights, config)
        self._words = take("bert.embeddings.word_embeddings.weight")
        # Position and token-type vectors are added once here: type 0 or 1 selects a table of position vectors.
        positions = take("bert.embeddings.position_embeddings.weight")
        self._positions = positions[None] + take("bert.embeddings.token_type_embeddings.weight")[:, None]
        self._embedding_norm = norm("bert.embeddings.LayerNorm")
        self._layers = []
        for i in range(config["num_hidden_layers"]):
            name = f"bert.encoder.layer.{i}"
            self._layers.append(
                _Layer(
                    qkv=linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
                    attention_out=linear(f"{name}.attention.output.dense"),
                    attention_norm=norm(f"{name}.attention.output.LayerNorm"),
                    up=linear(f"{name}.intermediate.dense", gelu=True),
                    down=linear(f"{name}.output.dense"),
                    norm=norm(f"{name}.output.LayerNorm"),
                )
            )
        self._pooler = take("bert.pooler.dense.weight"), take("bert.pooler.dense.bias")
        self._classifier = take("classifier.weight"), take("classifier.bias")
        names = config["id2label"]  # transformers leaves the default names of two labels out
        self.labels = [names.get(str(i), f"LABEL_{i}") for i in range(len(self._classifier[1]))]

    @classmethod
    def load(cls, directory: str | Path, *, threads: int | None = None) -> Engine:
        """Loads and verifies a model directory: every tensor against the manifest, then the golden logits.

        threads: None for the cores this process may use. Raises CheckpointError for a damaged directory and
        UnsupportedError for a model that is no BERT classifier with exact GELU.
        """
        directory = checkpoint.resolve(directory)
        config = _DEFAULTS | checkpoint.read_config(directory)
        if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
            raise UnsupportedError(
                f"{directory}: the engine runs model_type bert with hidden_act gelu, "
                f"got {config['model_type']} with {config['hidden_act']}",
                fix="run it in transformers",
            )
        weights = checkpoint.read_weights(directory)
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{directory}/tokenizer.json must be a tokenizer: {error}", fix="restore the file"
            ) from error
        tokenizer.no_padding()
        if _dispatch.isa() == "scalar" and environment.isa_cap() is None:
            warnings.warn("no AVX2 here: the engine runs its portable path, see `sparsebert doctor`", stacklevel=2)
        engine = cls(weights, config, tokenizer, _dispatch.threads(threads))
        # At full length, as the golden logits were made.
        limit = config["max_position_embeddings"]
        checkpoint.verify_golden(directory, lambda texts: engine.logits(texts, max_length=limit))
        return engine

    @property
    def density(self) -> float:
        """Share of non-zeros in the encoder's linears."""
        packed = [
            linear.weight for layer in self._layers for linear in (layer.qkv, layer.attention_out, layer.up, layer.down)
        ]
        return sum(w.nnz for w in packed) / sum(w.n_in * w.n_out for w in packed)

    def logits(self, texts: list[str | tuple[str, str]], *, max_length: int | None = None) -> np.ndarray:
        """float32 [texts, labels]. A text is a string or a (text, text_b) pair.

        max_length: tokens kept of a text; None for the length the model was trained at, or 128 where its directory does
        not say. Raises InputError for what is no list of texts, an empty text, and a length the model cannot take.
        """
        if isinstance(texts, str) or not all(len(text) == 2 for text in texts if isinstance(text, tuple)):
            raise InputError("texts must be a list of strings or (text, text_b) pairs", fix="put them in a list")
        require_texts([part for text in texts for part in (text if isinstance(text, tuple) else (text,))])
        limit = self.config["max_position_embeddings"]
        if max_length is None:
            max_length = min(limit, self.config["sparsebert"].get("max_length", 128))
        if not 3 <= max_length <= limit:
            raise InputError(f"max_length must be 3 to {limit}, got {max_length}", fix="choose a length in that range")
        if not texts:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        with self._lock:  # the tokenizer keeps the length between the two calls
            self._tokenizer.enable_truncation(max_length)
            encoded = self._tokenizer.encode_batch(texts)
        return self.forward([row.ids for row in encoded], [row.type_ids for row in encoded])

    def forward(self, ids: list[list[int]], type_ids: list[list[int]]) -> np.ndarray:
        """float32 logits [sequences, labels] of token id lists; every sequence at least one token long."""
        lengths = [len(row) for row in ids]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        flat_ids = np.fromiter((i for row in ids for i in row), np.int64, count=starts[-1])
        flat_types = np.fromiter((i for row in type_ids for i in row), np.int64, count=starts[-1])
        positions = np.concatenate([np.arange(n) for n in lengths])
        x = self._embedding_norm(self._words[flat_ids] + self._positions[flat_types, positions])
        for layer in self._layers:
            attended = self._attention(layer.qkv(x, self.threads), starts)
            x += layer.attention_out(attended, self.threads)
            x = layer.attention_norm(x)
            x += layer.down(layer.up(x, self.threads), self.threads)
            x = layer.norm(x)
        weight, bias = self._pooler
        pooled = np.tanh(x[starts[:-1]] @ weight.T + bias)
        weight, bias = self._classifier
        return pooled @ weight.T + bias

    def _attention(self, qkv: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Softmax attention within each sequence; qkv float32 [tokens, 3 * hidden], result [tokens, hidden]."""
        hidden = qkv.shape[1] // 3
        size = hidden // self._heads
        out = np.empty((len(qkv), hidden), dtype=np.float32)
        for start, stop in pairwise(starts):
            q, k, v = qkv[start:stop].reshape(stop - start, 3, self._heads, size).transpose(1, 2, 0, 3)
            scores = q @ k.transpose(0, 2, 1)
            scores *= np.float32(1 / math.sqrt(size))
            scores -= scores.max(axis=2, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=2, keepdims=True)
            out[start:stop].reshape(stop - start, self._heads, size)[:] = (scores @ v).transpose(1, 0, 2)
        return out


def _readers(weights: dict[str, np.ndarray], config: dict):
    """(take, norm, linear): how a tensor, a layer norm, and one or several stacked linears are read by name."""

    def take(name: str) -> np.ndarray:
        if name not in weights:
            raise CheckpointError(f"weights lack tensor {name}", fix="fine-tune the model first: sparsebert train")
        return np.ascontiguousarray(weights[name], dtype=np.float32)

    def norm(name: str) -> _Norm:
        return _Norm(take(f"{name}.weight"), take(f"{name}.bias"), config["layer_norm_eps"])

    def linear(*names: str, gelu: bool = False) -> _Linear:
        stacked = np.concatenate([take(f"{name}.weight") for name in names])
        return _Linear(pack(stacked), np.concatenate([take(f"{name}.bias") for name in names]), gelu)

    return take, norm, linear
