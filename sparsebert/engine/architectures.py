"""Where each architecture keeps what `sparse_encoder` needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsebert.errors import CheckpointError, UnsupportedError
from sparsebert.ops.sparse_encoder import EncoderLayer, Norm, PackedEncoder
from sparsebert.ops.sparse_matmul import Linear, Packed, pack_groups


@dataclass(frozen=True)
class _Names:
    """Tensor names of one architecture, without `.weight` and `.bias`. A layer's follow `layer` and its number."""

    embeddings: str
    layer: str
    attention: tuple[str, str, str]
    attention_out: str
    attention_norm: str
    up: str
    down: str
    norm: str
    pooler: str
    pooler_activation: str
    classifier: str


def _bert(base: str, pooler: str, pooler_activation: str, classifier: str) -> _Names:
    return _Names(
        embeddings=f"{base}.embeddings",
        layer=f"{base}.encoder.layer",
        attention=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_out="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        norm="output.LayerNorm",
        pooler=pooler,
        pooler_activation=pooler_activation,
        classifier=classifier,
    )


_NAMES = {
    "bert": _bert("bert", "bert.pooler.dense", "tanh", "classifier"),
    "roberta": _bert("roberta", "classifier.dense", "tanh", "classifier.out_proj"),
    "xlm-roberta": _bert("roberta", "classifier.dense", "tanh", "classifier.out_proj"),
    "electra": _bert("electra", "classifier.dense", "gelu", "classifier.out_proj"),
    "distilbert": _Names(
        embeddings="distilbert.embeddings",
        layer="distilbert.transformer.layer",
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
        pooler="pre_classifier",
        pooler_activation="relu",
        classifier="classifier",
    ),
}
# transformers' defaults for the fields of config.json that are read here; it need not write what is at its default.
_DEFAULTS = {
    "activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 1,  # of RoBERTa, where it counts
}
_ELECTRA_DEFAULTS = {"num_attention_heads": 4}
ACTIVATIONS = ("gelu", "relu")


def build(
    weights: dict[str, np.ndarray], config: dict, pack: Callable[[np.ndarray], Sequence[Packed]]
) -> tuple[PackedEncoder, ...]:
    """The encoder of a model directory, as often as `pack` has forms of a weight: for short batches and long ones.

    weights: by name, any float dtype. config: config.json. pack: of all linears but the classifier. The encoders share
    what is the same in them.
    Raises UnsupportedError for an architecture, activation or kind of position that the engine does not run, and
    CheckpointError where a tensor is missing.
    """
    kind = config["model_type"]
    if kind not in _NAMES:
        raise UnsupportedError(
            f"the engine runs model_type {', '.join(_NAMES)}, got {kind}", fix="run it in transformers"
        )
    names, distilbert = _NAMES[kind], kind == "distilbert"
    config = _DEFAULTS | (_ELECTRA_DEFAULTS if kind == "electra" else {}) | config
    activation = config["activation" if distilbert else "hidden_act"]
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"the engine runs the activations {', '.join(ACTIVATIONS)} (gelu: the exact form), got {activation!r}",
            fix="run it in transformers",
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedError(
            f"the engine runs absolute positions, got {config['position_embedding_type']!r}",
            fix="run it in transformers",
        )

    def take(name: str) -> np.ndarray:
        if name not in weights:
            raise CheckpointError(f"weights lack tensor {name}", fix="fine-tune the model first: sparsebert train")
        return np.ascontiguousarray(weights[name], dtype=np.float32)

    def norm(name: str) -> Norm:
        return take(f"{name}.weight"), take(f"{name}.bias")

    def stacked(*of: str, activation: str = "none", pack: Callable[[np.ndarray], Sequence[Packed]] = pack):
        weight = np.concatenate([take(f"{name}.weight") for name in of])
        bias = np.concatenate([take(f"{name}.bias") for name in of])
        made: dict[int, Linear] = {}
        return tuple(made.setdefault(id(packed), Linear(packed, bias, activation)) for packed in pack(weight))

    base = names.embeddings.partition(".")[0]
    positions = take(f"{names.embeddings}.position_embeddings.weight")
    if kind in {"roberta", "xlm-roberta"}:  # their positions are counted from the padding token's id onward
        positions = positions[config["pad_token_id"] + 1 :]
    types = np.zeros((1, positions.shape[1]), np.float32)
    if not distilbert:
        types = take(f"{names.embeddings}.token_type_embeddings.weight")
    pooler = stacked(names.pooler, activation=names.pooler_activation)
    forms = range(len(pooler))
    classifier = stacked(names.classifier, pack=lambda weight: (pack_groups(weight),) * len(forms))
    projection = (None,) * len(forms)
    if f"{base}.embeddings_project.weight" in weights:
        projection = stacked(f"{base}.embeddings_project")
    layers = []  # of each, one of every form
    for i in range(config["n_layers" if distilbert else "num_hidden_layers"]):
        at = f"{names.layer}.{i}."
        qkv = stacked(*(at + name for name in names.attention))
        attention_out = stacked(at + names.attention_out)
        up, down = stacked(at + names.up, activation=activation), stacked(at + names.down)
        norms = norm(at + names.attention_norm), norm(at + names.norm)
        layers.append([EncoderLayer(qkv[f], attention_out[f], norms[0], up[f], down[f], norms[1]) for f in forms])
    words, embedding_norm = take(f"{names.embeddings}.word_embeddings.weight"), norm(f"{names.embeddings}.LayerNorm")
    positions = positions[None] + types[:, None]
    return tuple(
        PackedEncoder(
            words=words,
            positions=positions,
            embedding_norm=embedding_norm,
            projection=projection[f],
            layers=tuple(layer[f] for layer in layers),
            heads=config["n_heads" if distilbert else "num_attention_heads"],
            eps=1e-12 if distilbert else config["layer_norm_eps"],
            pooler=pooler[f],
            classifier=classifier[f],
        )
        for f in forms
    )
