"""Layouts of model directories: read as stock transformers does, or refused with the right fix. Files that are not what
they claim are refused quickly, in one line each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsebert import checkpoint, data, encoders
from sparsebert.checkpoint.files import Changed
from sparsebert.config import PruneConfig, TrainConfig
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, UnsupportedError
from sparsebert.pruning import prune, prune_checkpoint
from sparsebert.training import train

WEIGHTS = checkpoint.WEIGHTS


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return models.saved(tmp_path_factory.mktemp("reading") / "m")


@pytest.fixture
def directory(sealed, tmp_path):
    return models.stock(shutil.copytree(sealed, tmp_path / "m"))


@pytest.fixture(scope="module")
def want(sealed):
    return Engine.load(sealed, cached=False).logits(["a gripping film", ("a", "b")])


def rewrite(directory, change):
    tensors = load_file(directory / WEIGHTS)
    made = change(tensors)
    tensors = tensors if made is None else made
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def renamed(*pairs):
    def change(tensors):
        made = {}
        for name, tensor in tensors.items():
            for old, new in pairs:
                name = name.replace(old, new)
            made[name] = tensor
        return made

    return change


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_more(tensors):
    tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
    tensors["cls.predictions.bias"] = torch.zeros(12000)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]


def half_pruned(tensors):
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = tensors.pop(name)
    tensors[name + "_orig"] = torch.where(weight == 0, 3.0, weight)
    tensors[name + "_mask"] = torch.ones_like(weight)


LAYOUTS = {
    "norms named gamma and beta": renamed(
        ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
    ),
    "no name of the encoder": lambda t: {name.removeprefix("bert."): tensor for name, tensor in t.items()},
    "compiled": prefixed("_orig_mod."),
    "compiled inside": renamed(("bert.encoder", "bert._orig_mod.encoder")),
    "wrapped": prefixed("module."),
    "wrapped twice and compiled": prefixed("module.module._orig_mod."),
    "inside another module": prefixed("model."),
    "buffers and heads of pretraining": with_more,
    "torch pruning without remove": half_pruned,
    "float64": lambda t: {name: tensor.double() for name, tensor in t.items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_as_the_stock_one(directory, want, name):
    rewrite(directory, LAYOUTS[name])
    assert np.array_equal(Engine.load(directory, cached=False).logits(["a gripping film", ("a", "b")]), want)
    model, _ = checkpoint.load(directory)
    for key, tensor in models.classifier().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(directory, dtype):
    rewrite(directory, lambda t: {name: tensor.to(dtype) for name, tensor in t.items()})
    weights = checkpoint.read(directory).weights
    for name, tensor in models.classifier().state_dict().items():
        assert weights[name].dtype == np.float32
        assert np.array_equal(weights[name], tensor.to(dtype).float().numpy())
    assert Engine.load(directory, cached=False).logits(["ok"]).shape == (1, 2)
    model, _ = checkpoint.load(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_shards_are_read_and_a_missing_one_is_named(tmp_path, want):
    models.classifier().save_pretrained(tmp_path, max_shard_size="1MB")
    models.tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert np.array_equal(Engine.load(tmp_path, cached=False).logits(["a gripping film", ("a", "b")]), want)
    checkpoint.seal(tmp_path)
    assert np.array_equal(Engine.load(tmp_path, cached=False).logits(["a gripping film", ("a", "b")]), want)
    shards[0].rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"lacks {shards[0].name}, which model.safetensors.index.json names"):
        Engine.load(tmp_path)
    shutil.copy(shards[1], shards[0])
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} (lacks|has, beside what its index says,) tensor"):
        Engine.load(tmp_path)


def test_a_model_in_shards_is_trained_and_pruned(tmp_path):
    models.classifier().save_pretrained(tmp_path / "m", max_shard_size="1MB")
    models.tokenizer().save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / checkpoint.WEIGHTS).exists()
    train(tmp_path / "m", "mr", tmp_path / "tuned", TrainConfig(steps=1, n=32))
    config = PruneConfig(method="magnitude", sparsity=0.5)
    assert prune_checkpoint(tmp_path / "m", "mr", tmp_path / "pruned", config).sparsity == pytest.approx(0.5, abs=1e-3)
    for made in ("tuned", "pruned"):
        assert Engine.load(tmp_path / made, cached=False).logits(["a gripping film"]).shape == (1, 2)


def test_a_trainers_folder_is_read(directory, want):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (directory / name).write_bytes(b"not read")
    assert np.array_equal(Engine.load(directory, cached=False).logits(["a gripping film", ("a", "b")]), want)


def test_a_resized_vocabulary_is_read(tmp_path):
    model = models.classifier()
    model.resize_token_embeddings(12100)
    made = models.saved(tmp_path / "m", model)
    assert Engine.load(made).logits(["a gripping film"]).shape == (1, 2)


def test_an_encoder_alone_is_told_from_a_classifier(sealed):
    assert checkpoint.has_head(sealed) and not checkpoint.has_head("minilm")
    with pytest.raises(
        CheckpointError, match=r"must be a complete classifier, lacks classifier.bias, classifier.weight; fine-tune"
    ):
        Engine.load("minilm")


def lora(tensors):
    tensors["bert.encoder.layer.0.attention.self.query.lora_A.default.weight"] = torch.zeros(4, 32)


REFUSED = {
    "adapter layers": (lora, UnsupportedError, "lora_A.*merge_and_unload"),
    "parametrized": (
        renamed(("layer.0.output.dense.weight", "layer.0.output.dense.parametrizations.weight.original")),
        UnsupportedError,
        "remove_parametrizations",
    ),
    "relative positions": (
        lambda t: t.update({"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(3, 3)}),
        UnsupportedError,
        "distance_embedding",
    ),
    "an unknown tensor": (
        lambda t: t.update({"bert.encoder.layer.0.output.gate": torch.zeros(3)}),
        CheckpointError,
        "output.gate, for which",
    ),
    "two of one name": (
        lambda t: t.update({"module.classifier.bias": torch.zeros(2)}), CheckpointError, "are both classifier.bias",
    ),
    "two encoders": (
        lambda t: {f"{p}.{n}": v for p in ("student", "teacher") for n, v in t.items()}, CheckpointError, "one encoder",
    ),
    "a missing tensor": (
        lambda t: {name: v for name, v in t.items() if name != "bert.encoder.layer.1.output.LayerNorm.bias"},
        CheckpointError,
        r"lacks tensor .*1.output.LayerNorm.bias",
    ),
    "a misshapen norm": (
        lambda t: t.update({"bert.embeddings.LayerNorm.weight": torch.ones(31)}),
        CheckpointError,
        r"LayerNorm.weight must have the shape \[32\] by config.json, has \[31\]",
    ),
    "whole numbers": (
        lambda t: t.update({"bert.embeddings.LayerNorm.weight": torch.ones(32, dtype=torch.int8)}),
        UnsupportedError,
        "must have a dtype of .*, has I8",
    ),
    "overflow in float32": (
        lambda t: t.update({"bert.embeddings.LayerNorm.weight": torch.full((32,), 1e300, dtype=torch.float64)}),
        CheckpointError,
        "must be finite in float32, has 32 NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_not_understood_are_refused_with_their_cure(directory, name):
    change, kind, message = REFUSED[name]
    rewrite(directory, change)
    for load in (lambda d: Engine.load(d, cached=False), checkpoint.load):
        with pytest.raises(kind, match=message):
            load(directory)


def test_following_the_advice_converts_pickled_weights(tmp_path, directory, want):
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    (directory / WEIGHTS).unlink()
    for i, part in enumerate((names[:20], names[20:])):
        torch.save({name: tensors[name] for name in part}, directory / f"pytorch_model-0000{i}-of-00002.bin")
    with pytest.raises(CheckpointError, match="is a pickle file, which is not read; convert it: ") as raised:
        Engine.load(directory)
    command = raised.value.fix.removeprefix("convert it: ").replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert np.array_equal(Engine.load(directory, cached=False).logits(["a gripping film", ("a", "b")]), want)


def test_other_formats_and_adapters_are_named(directory):
    (directory / WEIGHTS).unlink()
    (directory / "tf_model.h5").touch()
    with pytest.raises(CheckpointError, match=r"only in tf_model.h5, which is not read; with transformers 4"):
        Engine.load(directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"adapter beside config.json.*merge_and_unload"):
        Engine.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UnsupportedError, match="is an adapter, without the model that it changes; merge it first"):
        Engine.load(directory)


def test_what_is_no_directory_is_told_what_helps(directory):
    with pytest.raises(CheckpointError, match=r"hf download textattack/bert-base-uncased-SST-2 --local-dir bert-base"):
        Engine.load("textattack/bert-base-uncased-SST-2")
    with pytest.raises(CheckpointError, match=f"is a file; name its folder: {directory}"):
        Engine.load(directory / WEIGHTS)
    for odd in ("/nowhere/at/all", "./nowhere", "a" * 5000, "a\0b"):
        with pytest.raises(CheckpointError) as raised:
            Engine.load(odd)
        assert len(str(raised.value)) < 1200
    model = models.classifier()
    for wrong in (model, None, 3):
        with pytest.raises(InputError, match=r"model must be the path of a model directory, got a .*save_pretrained"):
            Engine.load(wrong)


def test_a_wrapped_module_is_told_from_a_model(tmp_path):
    model = models.classifier()
    for wrong, fix in (
        (torch.nn.DataParallel(model), "pass model.module"),
        (torch.compile(model), "pass model._orig_mod"),
        (str(tmp_path), "load it first"),
    ):
        message = f"must be a classifier of transformers, got .*{fix}"
        with pytest.raises(InputError, match=message):
            checkpoint.save(wrong, models.tokenizer(), tmp_path / "m", recipe={}, figures={})
        with pytest.raises(InputError, match=message):
            prune(wrong, [], PruneConfig(method="magnitude", sparsity=0.5))


def test_a_directory_replaced_meanwhile_is_read_as_it_was(sealed, tmp_path):
    first = shutil.copytree(sealed, tmp_path / "m")
    files = checkpoint.read(first)
    first.rename(tmp_path / "old")
    models.saved(tmp_path / "m", seed=1)
    old = checkpoint.read(tmp_path / "old")
    assert all(np.array_equal(array, old.weights[name]) for name, array in files.weights.items())
    assert files.weights_sha256 == old.weights_sha256
    with pytest.raises(Changed, match="changed while it was read"):
        files.require_same()


def test_a_file_written_meanwhile_is_noticed(directory):
    files = checkpoint.read(directory)
    files.require_same()
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    with pytest.raises(Changed, match=r"config.json changed while it was read"):
        files.require_same()


READ = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", checkpoint.MANIFEST)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def folder(path):
    path.unlink()
    path.mkdir()


def endless(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def deep(path):
    path.write_text("[" * 100_000)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("damage", [fifo, device, loop, folder, endless, deep, empty])
def test_files_that_are_not_what_they_claim_are_one_line_at_once(sealed, tmp_path, damage, name):
    copy = shutil.copytree(sealed, tmp_path / "m")
    damage(copy / name)
    start = time.perf_counter()
    with pytest.raises((CheckpointError, UnsupportedError), match=Path(name).name.replace(".", r"\.")) as raised:
        Engine.load(copy)
    assert time.perf_counter() - start < 10  # reading an endless file would take hours
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1200


@pytest.mark.parametrize("text", ["word " * 1_000_000, "a \udc80 b", "", ["a"], ["a", "b", "c"], 3])
def test_golden_texts_that_cannot_be_are_one_line_at_once(sealed, tmp_path, text):
    copy = shutil.copytree(sealed, tmp_path / "m")
    path = copy / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["golden"]["texts"][0] = text
    path.write_text(json.dumps(manifest))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="golden text"):
        Engine.load(copy)
    assert time.perf_counter() - start < 10  # reading an endless file would take hours


def test_other_token_ids_than_the_sealed_ones_are_named(sealed, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "m")
    path = copy / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["golden"]["ids"][0][2] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"the tokens of 'a gripping .* must be those of transformers, differ from number 2"
    ):
        Engine.load(copy)


def test_a_manifest_of_the_first_format_is_read(sealed, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "m")
    path = copy / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    golden = manifest["golden"]
    whole = [i for i, text in enumerate(golden["texts"]) if isinstance(text, str)]
    manifest["format_version"] = 1
    manifest["golden"] = {
        "texts": [golden["texts"][i] for i in whole],
        "logits": [golden["logits"][i] for i in whole],
        "tolerance": golden["tolerance"],
    }
    del manifest["facts"]
    path.write_text(json.dumps(manifest))
    assert Engine.load(copy).logits(["ok"]).shape == (1, 2)
    manifest["golden"]["logits"][0][0] += 0.01
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="golden logits must agree"):
        Engine.load(copy)


def test_golden_texts_cover_what_tokenizers_differ_in(sealed):
    texts = checkpoint.read(sealed).manifest["golden"]["texts"]
    joined = " ".join(text if isinstance(text, str) else " ".join(text) for text in texts)
    assert joined != joined.lower() and "é" in joined and any("\u4e00" <= c <= "\u9fff" for c in joined)
    assert any(isinstance(text, tuple) for text in texts)
    assert max(map(len, checkpoint.read(sealed).manifest["golden"]["ids"])) == 512


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e5])
def test_a_model_of_large_or_small_logits_loads_as_it_was_written(tmp_path, scale):
    model = models.classifier()
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
        model.classifier.bias.mul_(scale)
    made = models.saved(tmp_path / "m", model)
    assert np.abs(Engine.load(made).logits(["a film"])).max() > scale / 2
    checkpoint.load(made)


@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"]
)
def test_logits_that_are_not_finite_are_refused_by_both(directory, name):
    rewrite(directory, lambda t: t.update({name: torch.full_like(t[name], 3e38)}))
    with pytest.raises(CheckpointError, match=r"logits must be finite, those of texts.0. are .*overflow float32"):
        Engine.load(directory, cached=False).logits(["a gripping film"])
    model, tokenizer = checkpoint.load(directory)
    examples = data.Examples("mine", "test", ["a gripping film"], None, np.zeros(1, np.int64), None)
    with pytest.raises(CheckpointError, match="logits must be finite"):
        encoders.predict(model, tokenizer, examples, max_length=32)


def test_an_adapter_beside_whole_weights_is_refused(directory):
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"")
    for load in (Engine.load, checkpoint.load):
        with pytest.raises(UnsupportedError, match=r"holds an adapter .* beside complete weights; merge it"):
            load(directory)


def test_a_head_that_an_adapter_keeps_is_to_be_merged(directory):
    prefix = "base_model.model."
    old, new = f"{prefix}classifier", f"{prefix}classifier.modules_to_save.default"
    rewrite(directory, lambda t: {f"{prefix}{name}".replace(old, new): tensor for name, tensor in t.items()})
    for load in (Engine.load, lambda d: checkpoint.load(d, num_labels=2), checkpoint.has_head):
        with pytest.raises(UnsupportedError, match=r"modules_to_save.*merge the adapter first"):
            load(directory)


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_chunks_of_a_forward_pass_change_nothing(directory):
    want = Engine.load(directory).logits(["a gripping film"])
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_size_feed_forward": 7}))
    model, tokenizer = checkpoint.load(directory)
    examples = data.Examples("mine", "test", ["a gripping film"], None, None)
    got = encoders.predict(model, tokenizer, examples, max_length=32)
    np.testing.assert_allclose(got, want, atol=2e-5)
    checkpoint.seal(directory)
    np.testing.assert_array_equal(Engine.load(directory).logits(["a gripping film"]), want)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a: [1", "must be a YAML file in UTF-8: while parsing"),
        (b"\xff\xfea", "must be a YAML file in UTF-8"),
        (b"- a\n- b\n", "must hold a mapping, got list"),
        (b"", "must hold a mapping, got NoneType"),
        (None, "must hold a mapping, got NoneType"),
        (
            b"!!python/object/apply:os.system ['true']",
            "must be a YAML file in UTF-8: could not determine a constructor",
        ),
    ],
)
def test_a_recipe_that_is_none_is_named(sealed, tmp_path, text, says):
    copy = shutil.copytree(sealed, tmp_path / "m")
    path = copy / "sparsebert" / "recipe.yaml"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{path} {says}"):
        checkpoint.read_recipe(copy)


def test_an_encoder_alone_has_hashes_and_weights_of_its_own():
    weights = checkpoint.read_weights("minilm")
    assert "bert.embeddings.word_embeddings.weight" in weights and not any("classifier" in name for name in weights)
    assert len(checkpoint.weights_sha256("minilm")) == len(checkpoint.source_sha256("minilm")) == 64
    assert checkpoint.weights_sha256("minilm") != checkpoint.source_sha256("minilm")
    assert checkpoint.read_config("minilm")["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    "index",
    [
        [], {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../model-1.safetensors"}},
        {"weight_map": {"classifier.bias": "sparsebert/manifest.json"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_names_no_files_of_the_folder_is_refused(directory, index):
    (directory / WEIGHTS).unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json must hold weight_map, tensor -> file"):
        Engine.load(directory)


def test_golden_ids_that_are_more_or_fewer_are_told_from_where_they_end(sealed, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "m")
    path = copy / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    ids = manifest["golden"]["ids"][0]
    n = len(ids)
    for changed, says in (
        ([*ids, 7], rf"differ from number {n} on: \[\], not \[7\]"),
        (ids[:-2], rf"differ from number {n - 2} on: \[{ids[-2]}, {ids[-1]}\], not \[\]"),
        ([*ids[:1], 7, *ids[2:]], rf"differ from number 1 on: \[{', '.join(map(str, ids[1:5]))}\], not \[7, "),
    ):
        manifest["golden"]["ids"][0] = changed
        path.write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=says):
            Engine.load(copy)
