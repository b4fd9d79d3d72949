"""The table of architectures against stock transformers: tensors, defaults, and every field that its code reads."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers

from sparsebert import architectures, checkpoint
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, UnsupportedError

KINDS = sorted(architectures.ARCHITECTURES)
PATH = Path("config.json")


def config_of(model) -> dict:
    return json.loads(model.config.to_json_string(use_diff=False))


def edited(directory, tmp_path, **fields):
    copy = shutil.copytree(directory, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return {kind: models.stock(models.saved(root / kind, kind=kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [{}, {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "labels": 5}]
)
def test_the_table_names_every_tensor_of_the_stock_model(kind, sizes):
    if kind == "electra":
        sizes = sizes | {"embedding_size": 24}
    model = models.classifier(kind, **sizes)
    facts = architectures.facts(config_of(model), PATH)
    named = dict(facts.encoder_tensors()) | facts.head_tensors()
    assert named == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert facts.max_length == architectures.max_length(model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(kind):
    stock = transformers.AutoConfig.for_model(kind)
    for name, default in architectures.ARCHITECTURES[kind].fields.values():
        assert getattr(stock, name) == default, name
    facts = architectures.facts({"model_type": kind}, PATH)
    assert facts == architectures.facts(json.loads(stock.to_json_string(use_diff=False)), PATH)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_the_stock_code_reads_is_in_the_table(kind):
    model = models.classifier(kind)
    code = inspect.getsource(inspect.getmodule(type(model)))
    read = set(re.findall(r"config\.([a-z_]\w*)", code))
    fields = {name for name, _ in architectures.ARCHITECTURES[kind].fields.values()}
    known = fields | architectures.REFUSED.keys() | architectures.NEUTRAL | {"hidden_size"}  # DistilBERT's other name
    assert read - known - {"num_labels"} == set() and len(read) > 10
    written = set(config_of(model))
    assert written - known - {"num_labels", "id2label", "label2id", "dtype"} == set()


NEUTRAL = {
    "use_cache": False, "chunk_size_feed_forward": 1, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
    "classifier_dropout": 0.5, "initializer_range": 3.0, "tie_word_embeddings": False, "output_hidden_states": True,
    "summary_type": "last", "summary_use_proj": False, "summary_activation": "tanh", "sinusoidal_pos_embds": True,
    "seq_classif_dropout": 0.9, "qa_dropout": 0.9, "dropout": 0.9, "attention_dropout": 0.9, "bos_token_id": 5,
    "gradient_checkpointing": True, "torchscript": False, "finetuning_task": "x", "return_dict": False,
    "_name_or_path": "nowhere/at-all", "transformers_version": "3.0.2", "output_past": True, "pooler_fc_size": 3,
    "torch_dtype": "float16", "a_field_of_mine": {"x": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_fields_leave_the_logits_of_both_readers_alone(directories, tmp_path, kind):
    texts = ["a gripping film", ("Stocks FELL", "they rose")]
    want = Engine.load(directories[kind], cached=False).logits(texts)
    made = edited(directories[kind], tmp_path, **NEUTRAL)
    assert np.array_equal(Engine.load(made, cached=False).logits(texts), want)
    model, tokenizer = checkpoint.load(made)
    _, logits = checkpoint.golden_logits(model, tokenizer, texts)
    np.testing.assert_allclose(logits, want, atol=2e-5)


REFUSED = [
    ({"is_decoder": True}, UnsupportedError, "is_decoder must be false"),
    ({"add_cross_attention": True}, UnsupportedError, "add_cross_attention must be false"),
    ({"is_encoder_decoder": True}, UnsupportedError, "is_encoder_decoder must be false"),
    ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type must be absolute"),
    ({"pruned_heads": {"0": [1]}}, UnsupportedError, "pruned_heads must be empty.*as it was before prune_heads"),
    ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config must be absent"),
    ({"auto_map": {"AutoModel": "a.B"}}, UnsupportedError, "auto_map must be absent"),
    ({"problem_type": "ranking"}, CheckpointError, "problem_type must be regression"),
    ({"num_hidden_layers": 1}, CheckpointError, "holds 2 layers, config.json says num_hidden_layers 1"),
    ({"num_hidden_layers": 3}, CheckpointError, "holds 2 layers, config.json says num_hidden_layers 3"),
    ({"num_hidden_layers": 10**9}, CheckpointError, "holds 2 layers"),
    (
        {"num_attention_heads": 4.0},
        CheckpointError,
        "num_attention_heads must be a whole number from 1 to 2,147,483,647, got 4.0",
    ),
    (
        {"num_attention_heads": 3},
        CheckpointError,
        "hidden_size must be a multiple of num_attention_heads, got 32 and 3",
    ),
    ({"hidden_size": 2**40}, CheckpointError, "hidden_size must be a whole number"),
    ({"hidden_size": 64}, CheckpointError, r"must have the shape \[12000, 64\] by config.json, has \[12000, 32\]"),
    ({"vocab_size": 10**9}, CheckpointError, r"word_embeddings.weight must have the shape \[1000000000, 32\]"),
    ({"max_position_embeddings": 10**9}, CheckpointError, r"position_embeddings.weight must have the shape"),
    ({"intermediate_size": 2**30}, CheckpointError, r"intermediate.dense.weight must have the shape"),
    ({"type_vocab_size": 3}, CheckpointError, r"token_type_embeddings.weight must have the shape \[3, 32\]"),
    ({"layer_norm_eps": float("inf")}, CheckpointError, "layer_norm_eps must be a number above 0 and below 1, got inf"),
    ({"layer_norm_eps": 1e30}, CheckpointError, "layer_norm_eps must be"),
    ({"layer_norm_eps": 0}, CheckpointError, "layer_norm_eps must be"),
    ({"hidden_act": {"a": 1}}, CheckpointError, "hidden_act must be an activation's name"),
    ({"pad_token_id": -1}, CheckpointError, "pad_token_id must be null or a token's id, got -1"),
    ({"pad_token_id": 10**6}, CheckpointError, "pad_token_id must be below vocab_size 12000, got 1000000"),
    ({"id2label": {"0": None, "1": {"a": 1}}}, CheckpointError, "id2label must hold strings"),
    ({"id2label": {"0": "a", "2": "b"}}, CheckpointError, "id2label must have the keys 0 to 1"),
    ({"id2label": {str(i): "x" for i in range(200_000)}}, CheckpointError, "id2label must name at most 100000"),
    ({"id2label": {"0": "a", "1": "b", "2": "c"}}, CheckpointError, r"classifier.weight must have the shape \[3"),
    ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, CheckpointError, "id2label names 2 labels, num_labels is 3"),
    ({"model_type": "gpt2"}, UnsupportedError, "model_type must be one of bert"),
    ({"model_type": "roberta"}, CheckpointError, "has the tensors of model_type bert, config.json says roberta"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), REFUSED, ids=lambda v: str(v)[:40].replace("\\", ""))
def test_fields_that_change_the_logits_are_refused_by_all_readers(directories, tmp_path, fields, kind, message):
    made = edited(directories["bert"], tmp_path, **fields)
    for load in (Engine.load, checkpoint.load, checkpoint.shapes):
        if load is checkpoint.shapes and "classifier" in message:
            continue  # it reads the encoder alone, as the head is made anew
        with pytest.raises(kind, match=message) as raised:
            load(made)
        assert "\n" not in str(raised.value)


def test_positions_that_follow_the_padding_token_need_one(directories, tmp_path):
    with pytest.raises(CheckpointError, match="pad_token_id must be a token's id, positions follow it, got null"):
        Engine.load(edited(directories["roberta"], tmp_path, pad_token_id=None))


def test_an_offset_of_another_padding_token_is_honoured(tmp_path):
    made = models.stock(models.saved(tmp_path / "m", models.classifier("roberta", pad_token_id=7)))
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(made).eval()
    text = "a gripping film"
    with torch.inference_mode():
        want = stock(**models.tokenizer("roberta")(text, return_tensors="pt")).logits.numpy()
    engine = Engine.load(made, cached=False)
    np.testing.assert_allclose(engine.logits([text]), want, atol=2e-5)
    assert engine.encoder.max_length == 514 - 8


def test_the_padding_token_inside_a_text_is_refused_where_it_moves_positions(directories):
    engine = Engine.load(directories["roberta"], cached=False)
    with pytest.raises(InputError, match=r"texts\[1\] holds the padding token, id 1, which roberta"):
        engine.logits(["fine", "a <pad> b"])
    assert Engine.load(directories["bert"], cached=False).logits(["a [PAD] b"]).shape == (1, 2)
