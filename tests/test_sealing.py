"""Seals of stock directories, lost seals, and corrected label names."""

from __future__ import annotations

import json
import shutil

import models
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsebert import checkpoint
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError

TEXTS = ["a gripping film", ("a", "b")]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return models.saved(tmp_path_factory.mktemp("sealing") / "m")


@pytest.fixture
def directory(sealed, tmp_path):
    return shutil.copytree(sealed, tmp_path / "m")


def configured(directory, **fields):
    path = directory / "config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | fields).items() if value is not None}
    path.write_text(json.dumps(config))


def flip(directory):
    tensors = {name: array.copy() for name, array in load_file(directory / checkpoint.WEIGHTS).items()}
    tensors["classifier.bias"][0] += 1
    save_file(tensors, directory / checkpoint.WEIGHTS, {"format": "pt"})


def test_a_stock_directory_says_that_it_is_unsealed_and_following_the_advice_seals_it(directory):
    models.stock(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.warns(UserWarning, match=f"is unsealed: damage would go unnoticed; run sparsebert seal {directory}"):
        want = Engine.load(directory, cached=False).logits(TEXTS)
    found = checkpoint.seal(directory)
    assert found == {
        "directory": str(directory), "weights_sha256": checkpoint.weights_sha256(directory),
        "tensors": len(load_file(directory / checkpoint.WEIGHTS)),
    }  # fmt: skip
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
    assert np.array_equal(Engine.load(directory, cached=False).logits(TEXTS), want)
    flip(directory)
    with pytest.raises(CheckpointError, match=r"tensor classifier.bias differs from its manifest"):
        Engine.load(directory)


def test_tokenizer_files_of_a_stock_directory_are_sealed_and_later_ones_refused(directory):
    models.stock(directory)
    (directory / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    checkpoint.seal(directory)
    assert "special_tokens_map.json" in checkpoint.read(directory).manifest["files"]
    checkpoint.load(directory)
    (directory / "added_tokens.json").write_text('{"[PAD]": 0}')
    for refused in (checkpoint.load, checkpoint.reseal):
        with pytest.raises(CheckpointError, match=r"added_tokens.json must be among the files of its manifest"):
            refused(directory)


@pytest.mark.filterwarnings("error")
def test_a_sealed_directory_loads_without_a_word(directory):
    Engine.load(directory)
    checkpoint.load("minilm", num_labels=2)  # an encoder to fine-tune gives no warning either


def test_a_directory_is_sealed_once(directory):
    with pytest.raises(
        InputError, match=r"is sealed already; if label names in config.json were changed: sparsebert reseal"
    ):
        checkpoint.seal(directory)


def test_a_lost_manifest_is_refused_and_sealed_anew_where_the_weights_are_the_same(directory, tmp_path):
    shutil.rmtree(directory / "sparsebert")
    for load in (Engine.load, checkpoint.load, lambda d: checkpoint.load(d, num_labels=2)):
        with pytest.raises(CheckpointError, match=r"has lost sparsebert/manifest.json.*sparsebert seal"):
            load(directory)
    changed = shutil.copytree(directory, tmp_path / "changed")
    flip(changed)
    with pytest.raises(CheckpointError, match=r"weights must have the sha256 in config.json"):
        checkpoint.seal(changed)
    configured(changed, sparsebert=None)  # the advice of the message, if the change was on purpose
    checkpoint.seal(changed)
    checkpoint.seal(directory)
    Engine.load(directory)


def test_corrected_names_break_the_seal_and_following_the_advice_mends_it(directory):
    names = {"0": "bad", "1": "good"}
    configured(directory, id2label=names, label2id={"bad": 0, "good": 1}, finetuning_task="mine")
    with pytest.raises(CheckpointError, match="if only label names were changed: sparsebert reseal"):
        Engine.load(directory)
    assert checkpoint.reseal(directory) == {"directory": str(directory), "labels": ["bad", "good"], "changed": True}
    assert Engine.load(directory).labels == ["bad", "good"]
    assert not checkpoint.reseal(directory)["changed"]


def test_two_lists_of_names_that_contradict_each_other_are_refused(directory):
    configured(directory, id2label={"0": "positive", "1": "negative"}, label2id={"negative": 0, "positive": 1})
    for read in (checkpoint.reseal, Engine.load):
        with pytest.raises((InputError, CheckpointError), match=r"label2id says that 'negative' is 0|reseal"):
            read(directory)
    assert checkpoint.reseal(directory, labels=["positive", "negative"])["changed"]
    assert Engine.load(directory).labels == ["positive", "negative"]


def test_names_are_written_by_reseal(directory):
    before = json.loads((directory / "config.json").read_text())
    assert checkpoint.reseal(directory, labels=["negativ", "größer"])["labels"] == ["negativ", "größer"]
    after = json.loads((directory / "config.json").read_text())
    assert after.pop("label2id") == {"negativ": 0, "größer": 1} and after.pop("id2label")["1"] == "größer"
    assert after == {name: value for name, value in before.items() if name not in ("id2label", "label2id")}
    assert Engine.load(directory).labels == ["negativ", "größer"]
    checkpoint.load(directory)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], "names 1"),
        (["a", "b", "c"], "names 3"),
        (["a", "a"], "different"),
        (["a", " "], "different"),
        (["a", "A"], "different"),
        (["NEG", "neg!"], "different"),
    ],
)
def test_names_that_do_not_fit_are_refused(directory, labels, message):
    before = (directory / "config.json").read_bytes()
    with pytest.raises(InputError, match=message):
        checkpoint.reseal(directory, labels=labels)
    assert (directory / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": 1e-5}, "eps was 1e-12 when it was sealed, is 1e-05"),
        ({"hidden_act": "relu"}, "activation was 'gelu'"),
        ({"problem_type": "multi_label_classification"}, "problem_type was None"),
        ({"pad_token_id": 3}, "padding was 0"),
        ({"dtype": "bfloat16"}, "dtype was 'float32'"),
        ({"num_attention_heads": 4}, "heads was 2"),
    ],
)
def test_more_than_names_is_not_resealed(directory, fields, message):
    configured(directory, **fields)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.reseal(directory)


def test_changed_weights_or_tokenizers_are_not_resealed(directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    flip(directory)
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        checkpoint.reseal(directory, labels=["a", "b"])
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"tokenizer.json differs from its manifest"):
        checkpoint.reseal(other, labels=["a", "b"])


def test_a_stock_directory_is_not_resealed(directory):
    with pytest.raises(InputError, match="is not sealed; seal it: sparsebert seal"):
        checkpoint.reseal(models.stock(directory))


def test_a_first_manifest_is_resealed_by_its_golden_logits(directory):
    path = directory / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["facts"]
    path.write_text(json.dumps(manifest))
    configured(directory, layer_norm_eps=0.5)
    with pytest.raises(CheckpointError, match="golden logits must agree"):
        checkpoint.reseal(directory)
