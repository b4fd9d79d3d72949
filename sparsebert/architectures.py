"""Facts about BERT, RoBERTa, XLM-RoBERTa, DistilBERT and ELECTRA classifiers: the names of their tensors, and the
meaning of each field of config.json. One table, used by reading, the engine, training and pruning. Imports only leaf
modules.

A field of config.json is one of four kinds: a size or a setting that is honoured (`Architecture.fields` and `Facts`);
one that must have a certain value because the others change the logits (REFUSED); one that no forward pass of these
classifiers reads (NEUTRAL); or one that stock `transformers` does not know. The last kind is ignored:
tests/test_architectures.py shows that the model code of transformers reads no field that is not named here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebert.errors import CheckpointError, UnsupportedError, shown
from sparsebert.heads import label_count

RESTORE = "restore config.json from its source"


@dataclass(frozen=True)
class Architecture:
    """One `model_type`. Tensor names leave out `.weight` and `.bias`; those of a layer follow `layers` and the layer's
    number.

    base: the attribute of the classifier that holds the encoder. layers: the path below it to the layers. pooler,
    pooler_activation and classifier: the head. counted_from_padding: position numbers start after the padding token's
    id.
    fields: our name of a setting -> its name in config.json and transformers' default, used if the field is missing.
    """

    kind: str
    base: str
    layers: str
    attention: tuple[str, str, str]
    attention_out: str
    attention_norm: str
    up: str
    down: str
    norm: str
    pooler: str
    pooler_activation: str
    classifier: str
    counted_from_padding: bool
    fields: dict[str, tuple[str, Any]]

    @property
    def embeddings(self) -> str:
        return f"{self.base}.embeddings"

    def layer(self, i: int | str) -> str:
        """The prefix of the names of a layer's tensors."""
        return f"{self.base}.{self.layers}.{i}."


_BERT_FIELDS = {
    "vocabulary": ("vocab_size", 30522), "hidden": ("hidden_size", 768), "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12), "intermediate": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"), "positions": ("max_position_embeddings", 512),
    "types": ("type_vocab_size", 2), "eps": ("layer_norm_eps", 1e-12), "padding": ("pad_token_id", 0),
}  # fmt: skip


def _bert(kind: str, base: str, pooler: str, pooler_activation: str, classifier: str, **changes) -> Architecture:
    fields = _BERT_FIELDS | {name: (_BERT_FIELDS.get(name, (name,))[0], value) for name, value in changes.items()}
    if "embedding" in changes:
        fields["embedding"] = ("embedding_size", changes["embedding"])
    return Architecture(
        kind=kind,
        base=base,
        layers="encoder.layer",
        attention=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_out="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        norm="output.LayerNorm",
        pooler=pooler,
        pooler_activation=pooler_activation,
        classifier=classifier,
        counted_from_padding=base == "roberta",
        fields=fields,
    )


_ELECTRA_SIZES = {"embedding": 128, "hidden": 256, "heads": 4, "intermediate": 1024}
ARCHITECTURES = {
    found.kind: found
    for found in (
        _bert("bert", "bert", "bert.pooler.dense", "tanh", "classifier"),
        _bert("roberta", "roberta", "classifier.dense", "tanh", "classifier.out_proj", vocabulary=50265, padding=1),
        _bert("xlm-roberta", "roberta", "classifier.dense", "tanh", "classifier.out_proj", padding=1),
        _bert("electra", "electra", "classifier.dense", "gelu", "classifier.out_proj", **_ELECTRA_SIZES),
        Architecture(
            kind="distilbert",
            base="distilbert",
            layers="transformer.layer",
            attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            attention_out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            norm="output_layer_norm",
            pooler="pre_classifier",
            pooler_activation="relu",
            classifier="classifier",
            counted_from_padding=False,
            fields={
                "vocabulary": ("vocab_size", 30522), "hidden": ("dim", 768), "layers": ("n_layers", 6),
                "heads": ("n_heads", 12), "intermediate": ("hidden_dim", 3072), "activation": ("activation", "gelu"),
                "positions": ("max_position_embeddings", 512), "padding": ("pad_token_id", 0),
            },
        ),
    )
}  # fmt: skip


def of(kind: object, where: str = "") -> Architecture:
    """The architecture of a `model_type`. Raises UnsupportedError, with `where` in front, for an unknown one."""
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}model_type must be one of {', '.join(ARCHITECTURES)}, got {shown(kind)}",
            fix="use one of these architectures",
        )
    return ARCHITECTURES[kind]


@dataclass(frozen=True)
class Facts:
    """The facts of config.json about the forward pass. embedding: width of the word vectors. types: token types, 0 if
    the architecture has none. padding: the padding token's id, or None. labels: outputs of the classifier.
    """

    architecture: Architecture
    vocabulary: int
    embedding: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int
    padding: int | None
    activation: str
    eps: float
    labels: int

    @property
    def position_offset(self) -> int:
        """The position number of a text's first token."""
        return self.padding + 1 if self.architecture.counted_from_padding else 0

    @property
    def max_length(self) -> int:
        """Max number of tokens of a text."""
        return self.positions - self.position_offset

    def encoder_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the encoder, layer by layer."""
        names, at = self.architecture, self.architecture.embeddings
        yield f"{at}.word_embeddings.weight", (self.vocabulary, self.embedding)
        yield f"{at}.position_embeddings.weight", (self.positions, self.embedding)
        if self.types:
            yield f"{at}.token_type_embeddings.weight", (self.types, self.embedding)
        yield from _norm(f"{at}.LayerNorm", self.embedding)
        if self.embedding != self.hidden:
            yield from _linear(f"{names.base}.embeddings_project", self.hidden, self.embedding)
        for i in range(self.layers):
            at = names.layer(i)
            for name in (*names.attention, names.attention_out):
                yield from _linear(at + name, self.hidden, self.hidden)
            yield from _norm(at + names.attention_norm, self.hidden)
            yield from _linear(at + names.up, self.intermediate, self.hidden)
            yield from _linear(at + names.down, self.hidden, self.intermediate)
            yield from _norm(at + names.norm, self.hidden)

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the head's tensors, which classify a text from the encoder's first output."""
        names = self.architecture
        return dict(
            [*_linear(names.pooler, self.hidden, self.hidden), *_linear(names.classifier, self.labels, self.hidden)]
        )


def _linear(name: str, rows: int, cols: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, cols)
    yield f"{name}.bias", (rows,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


# Setting -> test of its value, and the rule in words. The shapes of the weights are a further check.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{
        name: (_count, "a whole number from 1 to 2,147,483,647")
        for name in ("vocabulary", "embedding", "hidden", "layers", "heads", "intermediate", "positions", "types")
    },
    "padding": (lambda v: v is None or (type(v) is int and v >= 0), "null or a token's id"),
    "activation": (lambda v: isinstance(v, str), "an activation's name"),
    "eps": (lambda v: type(v) in (int, float) and math.isfinite(v) and 0 < v < 1, "a number above 0 and below 1"),
}


def _is_off(value: Any) -> bool:
    return value is None or value is False


def _is_empty(value: Any) -> bool:
    return value is None or value == {} or (isinstance(value, dict) and all(part == [] for part in value.values()))


# Fields that change the logits unless they have these values -> test of the value, the rule in words, and the fix.
REFUSED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "is_decoder": (_is_off, "false: a decoder's attention sees no later tokens", "train it as an encoder"),
    "add_cross_attention": (_is_off, "false", "train it as an encoder"),
    "is_encoder_decoder": (_is_off, "false", "save its encoder alone, and train a classifier on that"),
    "position_embedding_type": (
        lambda v: v in (None, "absolute"), "absolute: relative positions are not computed", "train with absolute ones",
    ),
    "pruned_heads": (
        _is_empty, "empty: layers whose heads were cut out have other shapes",
        "prune the model as it was before prune_heads; the engine skips the zeros anyway",
    ),
    "quantization_config": (_is_empty, "absent: quantized weights are not read", "save the model in float32"),
    "auto_map": (
        _is_empty, "absent: code that comes with a model is not run",
        "if the model is a stock one, remove the field",
    ),
    "problem_type": (
        lambda v: v in (None, "regression", "single_label_classification", "multi_label_classification"),
        "regression, single_label_classification, multi_label_classification or null", RESTORE,
    ),
    "chunk_size_feed_forward": (lambda v: v is None or (type(v) is int and v >= 0), "a number of tokens", RESTORE),
    "id2label": (lambda v: v is None or isinstance(v, dict), "an object", RESTORE),
    "label2id": (lambda v: v is None or isinstance(v, dict), "an object", RESTORE),
    "num_labels": (lambda v: v is None or _count(v), "a whole number from 1 to 2,147,483,647", RESTORE),
    "sparsebert": (lambda v: v is None or isinstance(v, dict), "an object", RESTORE),
    "dtype": (lambda v: v is None or v in DTYPES, "float32, float16, bfloat16 or float64", RESTORE),
    "torch_dtype": (lambda v: v is None or v in DTYPES, "float32, float16, bfloat16 or float64", RESTORE),
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "float64")  # in which the weights may be stored; they are read as float32

# Fields that no forward pass of these classifiers reads in evaluation, whatever their value.
NEUTRAL = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "bos_token_id", "classifier_dropout",
    "cross_attention_hidden_size", "decoder_start_token_id", "dropout", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout_prob", "initializer_range", "model_type", "output_attentions",
    "output_hidden_states", "output_past", "prefix", "qa_dropout", "return_dict", "sep_token_id",
    "seq_classif_dropout", "sinusoidal_pos_embds", "summary_activation", "summary_first_dropout",
    "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_weights_", "tie_word_embeddings", "tokenizer_class", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache",
})  # fmt: skip
MOST_LABELS = 100_000


def facts(config: dict, path: Path) -> Facts:
    """The facts of config.json at `path` about the forward pass, with every field checked against its rule.

    Raises UnsupportedError for a setting that is not computed here and CheckpointError for a value that no model can
    have, naming the field.
    """
    architecture = of(config.get("model_type"), f"{path}: ")
    found: dict[str, Any] = {"types": 0, "eps": 1e-12}  # DistilBERT's, which its config.json does not hold
    for ours, (name, default) in architecture.fields.items():
        value = config.get(name, default)
        holds, rule = _RULES[ours]
        if not holds(value):
            raise CheckpointError(f"{path}: {name} must be {rule}, got {shown(value)}", fix=RESTORE)
        found[ours] = value
    for name in sorted(REFUSED.keys() & config.keys()):
        holds, rule, fix = REFUSED[name]
        if not holds(config[name]):
            kind = CheckpointError if fix is RESTORE else UnsupportedError
            raise kind(f"{path}: {name} must be {rule}, got {shown(config[name])}", fix=fix)
    found.setdefault("embedding", found["hidden"])
    found["eps"] = float(found["eps"])
    facts = Facts(architecture=architecture, labels=_labels(config, path), **found)
    if facts.hidden % facts.heads:
        names = [architecture.fields[ours][0] for ours in ("hidden", "heads")]
        raise CheckpointError(
            f"{path}: {names[0]} must be a multiple of {names[1]}, got {facts.hidden} and {facts.heads}", fix=RESTORE
        )
    if facts.padding is None and architecture.counted_from_padding:
        raise CheckpointError(f"{path}: pad_token_id must be a token's id, positions follow it, got null", fix=RESTORE)
    if facts.padding is not None and facts.padding >= facts.vocabulary:
        raise CheckpointError(
            f"{path}: pad_token_id must be below vocab_size {facts.vocabulary}, got {facts.padding}", fix=RESTORE
        )
    if facts.max_length < 3:  # one token and the two special ones around it
        raise CheckpointError(
            f"{path}: max_position_embeddings must leave positions for 3 tokens, got {facts.positions}", fix=RESTORE
        )
    return facts


def max_length(config) -> int:
    """Max number of tokens of a text, from a config object of transformers."""
    offset = config.pad_token_id + 1 if of(config.model_type).counted_from_padding else 0
    return config.max_position_embeddings - offset


def _labels(config: dict, path: Path) -> int:
    """The number of labels, counted as transformers does: the names, else the number, else two."""
    names, number = config.get("id2label"), config.get("num_labels")
    labels = label_count(config)
    if labels > MOST_LABELS:
        raise CheckpointError(f"{path}: id2label must name at most {MOST_LABELS} labels, has {labels}", fix=RESTORE)
    if names and number and len(names) != number:
        raise CheckpointError(f"{path}: id2label names {len(names)} labels, num_labels is {number}", fix=RESTORE)
    if names and sorted(names) != sorted(map(str, range(labels))):
        raise CheckpointError(
            f"{path}: id2label must have the keys 0 to {labels - 1}, has {shown(list(names))}", fix=RESTORE
        )
    for name in (names or {}).values():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: id2label must hold strings, has {shown(name)}", fix=RESTORE)
    return labels
