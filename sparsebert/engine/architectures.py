"""Builds the encoder that `sparse_encoder` runs from the tensors of a model directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparsebert.architectures import Facts
from sparsebert.errors import UnsupportedError
from sparsebert.ops.sparse_encoder import EncoderLayer, Norm, PackedEncoder
from sparsebert.ops.sparse_matmul import Linear, Packed, pack_groups

ACTIVATIONS = ("gelu", "relu")
Pack = Callable[[np.ndarray, tuple[str, ...]], Sequence[Packed]]  # a weight and the names of its linears -> its forms


def build(weights: dict[str, np.ndarray], facts: Facts, pack: Pack) -> tuple[PackedEncoder, ...]:
    """The encoders of a model directory, one for each packed form that `pack` returns: for short batches and for long
    ones.

    weights: `checkpoint.Files.weights`. facts: of the same directory. pack: packs the weights of all linears except the
    classifier, and gets the names of the linears that are stacked in a weight. The encoders share their equal parts.
    Raises UnsupportedError for an activation that the engine does not run.
    """
    if facts.activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"the engine runs the activations {', '.join(ACTIVATIONS)} (gelu: exact), got {facts.activation!r}",
            fix="run it in transformers",
        )
    names = facts.architecture

    def norm(name: str) -> Norm:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def stacked(*of: str, activation: str = "none", pack: Pack = pack):
        weight = np.concatenate([weights[f"{name}.weight"] for name in of])
        bias = np.concatenate([weights[f"{name}.bias"] for name in of])
        made: dict[int, Linear] = {}
        return tuple(made.setdefault(id(packed), Linear(packed, bias, activation)) for packed in pack(weight, of))

    positions = weights[f"{names.embeddings}.position_embeddings.weight"][facts.position_offset :]
    types = np.zeros((1, facts.embedding), np.float32)
    if facts.types:
        types = weights[f"{names.embeddings}.token_type_embeddings.weight"]
    pooler = stacked(names.pooler, activation=names.pooler_activation)
    forms = range(len(pooler))
    classifier = stacked(names.classifier, pack=lambda weight, _: (pack_groups(weight),) * len(forms))
    projection = (None,) * len(forms)
    if facts.embedding != facts.hidden:
        projection = stacked(f"{names.base}.embeddings_project")
    layers = []  # for each layer, one EncoderLayer per form
    for i in range(facts.layers):
        at = names.layer(i)
        qkv = stacked(*(at + name for name in names.attention))
        attention_out = stacked(at + names.attention_out)
        up, down = stacked(at + names.up, activation=facts.activation), stacked(at + names.down)
        norms = norm(at + names.attention_norm), norm(at + names.norm)
        layers.append([EncoderLayer(qkv[f], attention_out[f], norms[0], up[f], down[f], norms[1]) for f in forms])
    words, embedding_norm = weights[f"{names.embeddings}.word_embeddings.weight"], norm(f"{names.embeddings}.LayerNorm")
    positions = positions[None] + types[:, None]
    return tuple(
        PackedEncoder(
            words=words,
            positions=positions,
            embedding_norm=embedding_norm,
            projection=projection[f],
            layers=tuple(layer[f] for layer in layers),
            heads=facts.heads,
            eps=facts.eps,
            pooler=pooler[f],
            classifier=classifier[f],
        )
        for f in forms
    )
