"""sparse_encoder: a whole pruned BERT-like sequence classifier in one call. Needs only numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import Linear, sparse_matmul_ref

LINEARS = ("qkv", "attention_out", "up", "down")  # of a layer, in the order in which they run
Norm = tuple[np.ndarray, np.ndarray]  # weight and bias of a layer norm, float32 [n] each


@dataclass(frozen=True, eq=False)
class EncoderLayer:
    """One transformer layer whose norms come after the residual sums. H is the hidden size, I the intermediate size.

    qkv: H -> 3 H, query, key and value stacked; attention_out: H -> H; up: H -> I with the activation; down: I -> H.
    attention_out and down are added to the states; InputError if one of them has an activation.
    """

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm

    def __post_init__(self):
        for name in ("attention_out", "down"):
            if (activation := getattr(self, name).activation) != "none":
                raise InputError(
                    f"{name} is added to the states and must have no activation, has {activation}", fix="use none"
                )


@dataclass(frozen=True, eq=False)
class PackedEncoder:
    """A sequence classifier: embeddings, layers, and two linears on a sequence's first token. E is the embedding size.

    words: float32 [vocabulary, E]. positions: float32 [types, max_length, E], sums of position and token-type vectors.
    embedding_norm: over E. projection: E -> H, or None if they are equal. heads: number of attention heads; divides H.
    eps: of all norms. pooler: H -> P with its activation. classifier: P -> labels.
    """

    words: np.ndarray
    positions: np.ndarray
    embedding_norm: Norm
    projection: Linear | None
    layers: tuple[EncoderLayer, ...]
    heads: int
    eps: float
    pooler: Linear
    classifier: Linear

    @property
    def max_length(self) -> int:
        """Max number of tokens of a sequence."""
        return self.positions.shape[1]

    @property
    def linears(self) -> list[Linear]:
        """The linears of all layers."""
        return [linear for layer in self.layers for linear in map(partial(getattr, layer), LINEARS)]

    @cached_property
    def core(self):
        """This encoder as an object of the compiled core."""
        layers = [
            (
                layer.qkv.core, layer.attention_out.core, layer.up.core, layer.down.core, layer.attention_norm,
                layer.norm,
            )
            for layer in self.layers
        ]  # fmt: skip
        projection = None if self.projection is None else self.projection.core
        return _dispatch.core().Encoder(
            self.words, self.positions, self.embedding_norm, projection, layers, self.heads, self.eps,
            self.pooler.core, self.classifier.core,
        )  # fmt: skip


def sparse_encoder(
    ids: np.ndarray,
    types: np.ndarray,
    starts: np.ndarray,
    encoder: PackedEncoder,
    *,
    states: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Classifies sequences, which are concatenated without padding.

    ids: int32 [tokens], below the vocabulary. types: int32 [tokens], below the token types.
    starts: int64 [sequences + 1], from 0 to tokens; a sequence has 1 to `encoder.max_length` tokens.
    states: return the last layer's output as well.
    threads: None for the cores this process may use. isa: None for the best instruction set under SPARSEBERT_ISA.
    Returns logits, float32 [sequences, labels]; with `states` a pair, the second float32 [tokens, H].

    Float32 throughout, except that with linears in tiles the states between them are bf16. A sequence's result is
    bit-equal whatever the other sequences and the number of threads, and in float32 on avx2 and avx512. Raises
    InputError for arrays that break the above, UnsupportedError for an isa this machine cannot run.
    """
    require_sequences(ids, types, starts, encoder)
    run = partial(encoder.core.run, isa=_dispatch.isa(isa), threads=_dispatch.threads(threads))
    logits, hidden, _ = run(ids, types, starts, with_states=states, with_clipped=False)
    return (logits, hidden) if states else logits


def require_sequences(ids: np.ndarray, types: np.ndarray, starts: np.ndarray, encoder: PackedEncoder) -> None:
    """Raises InputError unless the arrays are what `sparse_encoder` says."""
    for name, array, dtype in (("ids", ids, np.int32), ("types", types, np.int32), ("starts", starts, np.int64)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            what = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{name} must be 1-d {np.dtype(dtype)}, got {what}", fix="convert it first")
    if ids.shape != types.shape:
        raise InputError(f"types must have one type per token, got {types.size} for {ids.size}", fix="match it to ids")
    lengths = np.diff(starts)
    if starts.size == 0 or starts[0] != 0 or starts[-1] != ids.size or (lengths < 1).any():
        raise InputError(
            f"starts must rise from 0 to the {ids.size} tokens, got {starts.tolist()[:8]}", fix="drop empty sequences"
        )
    if (lengths > encoder.max_length).any():
        raise InputError(
            f"a sequence must have at most {encoder.max_length} tokens, got {lengths.max()}", fix="truncate it"
        )
    for name, array, limit in (("ids", ids, len(encoder.words)), ("types", types, len(encoder.positions))):
        if array.size and not 0 <= array.min() <= array.max() < limit:
            bad = array.min() if array.min() < 0 else array.max()
            raise InputError(f"{name} must be at least 0 and below {limit}, got {bad}", fix="use the model's tokenizer")


def clipped_inputs(ids: np.ndarray, types: np.ndarray, starts: np.ndarray, encoder: PackedEncoder) -> np.ndarray:
    """How many inputs of each linear in int8 become the first or the last byte, the ends of the range that it was
    calibrated for: int64 [layers, 4], 0 for other linears. The arrays are those of `sparse_encoder`.
    """
    run = partial(encoder.core.run, isa=_dispatch.isa(), threads=_dispatch.threads())
    return run(ids, types, starts, with_states=False, with_clipped=True)[2]


def sparse_encoder_ref(
    ids: np.ndarray, types: np.ndarray, starts: np.ndarray, encoder: PackedEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Reference for `sparse_encoder` with `states`, in float64, sequence by sequence."""

    def norm(x: np.ndarray, parameters: Norm) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        scale = np.sqrt((centred**2).mean(1, keepdims=True) + encoder.eps)
        return centred / scale * parameters[0].astype(np.float64) + parameters[1]

    def attend(qkv: np.ndarray) -> np.ndarray:
        q, k, v = qkv.reshape(len(qkv), 3, encoder.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(2, keepdims=True))
        return (weights / weights.sum(2, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(qkv), -1)

    states = []
    for start, stop in pairwise(starts):
        part = slice(start, stop)
        x = encoder.words[ids[part]].astype(np.float64) + encoder.positions[types[part], np.arange(stop - start)]
        x = norm(x, encoder.embedding_norm)
        if encoder.projection is not None:
            x = sparse_matmul_ref(x, encoder.projection)
        for layer in encoder.layers:
            x = norm(x + sparse_matmul_ref(attend(sparse_matmul_ref(x, layer.qkv)), layer.attention_out),
                     layer.attention_norm)  # fmt: skip
            x = norm(x + sparse_matmul_ref(sparse_matmul_ref(x, layer.up), layer.down), layer.norm)
        states.append(x)
    hidden = np.concatenate(states)
    pooled = sparse_matmul_ref(hidden[starts[:-1]], encoder.pooler)
    return sparse_matmul_ref(pooled, encoder.classifier), hidden
