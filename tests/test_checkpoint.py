from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models import classifier, saved, stock, tokenizer
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsebert
from sparsebert import checkpoint
from sparsebert.checkpoint import manifest, tensors
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, OutputError, UnsupportedError
from sparsebert.jobs import Job, files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "m")


def rewrite(directory, change):
    tensors = dict(load_file(directory / checkpoint.WEIGHTS))
    change(tensors)
    save_file(tensors, directory / checkpoint.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "xlm-roberta"])
def test_stock_transformers_loads_identical_logits(tmp_path, kind):
    model = classifier(kind)
    saved(tmp_path / "m", model)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    ours, _ = checkpoint.load(tmp_path / "m")
    batch = AutoTokenizer.from_pretrained(tmp_path / "m")(
        ["a film", "a longer film , twice"], padding=True, return_tensors="pt"
    )
    if kind in {"roberta", "xlm-roberta", "distilbert"}:
        batch.pop("token_type_ids", None)
    with torch.inference_mode():
        want = model(**batch).logits
        assert torch.equal(stock(**batch).logits, want) and torch.equal(ours(**batch).logits, want)


def test_manifest_counts_and_hashes_every_tensor(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    tensors = load_file(directory / checkpoint.WEIGHTS)
    assert manifest["tensors"].keys() == tensors.keys()
    for name, array in tensors.items():
        assert manifest["tensors"][name]["nnz"] == np.count_nonzero(array)
        assert manifest["tensors"][name]["shape"] == list(array.shape)
    assert len(manifest["golden"]["logits"]) == len(manifest["golden"]["texts"]) == 6
    assert (
        json.loads((directory / "config.json").read_text())["sparsebert"]["weights_sha256"]
        == manifest["weights_sha256"]
    )


def test_weights_hash_follows_content_not_layout(directory, tmp_path):
    stock(directory)
    before = checkpoint.weights_sha256(directory)
    tensors = load_file(directory / checkpoint.WEIGHTS)
    save_file(
        dict(reversed(tensors.items())), directory / checkpoint.WEIGHTS, metadata={"format": "pt", "note": "moved"}
    )
    assert checkpoint.weights_sha256(directory) == before
    rewrite(directory, lambda t: t["classifier.bias"].__setitem__(0, 9.0))
    assert checkpoint.weights_sha256(directory) != before


def test_any_flipped_bit_is_refused(directory):
    path = directory / checkpoint.WEIGHTS
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    positions = [rng.randrange(header) for _ in range(30)] + [rng.randrange(header, len(whole)) for _ in range(30)]
    for position in [*positions, len(whole) - 1]:
        broken = bytearray(whole)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            weights = checkpoint.read_weights(directory)
        except (CheckpointError, UnsupportedError) as error:
            assert "model.safetensors" in str(error) or "dtype" in str(error)
        else:  # the bit is in the header's free-form metadata: no tensor may have changed
            assert position < header
            path.write_bytes(whole)
            assert all(
                np.array_equal(weights[name], array) for name, array in checkpoint.read_weights(directory).items()
            )


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(directory, keep):
    path = directory / checkpoint.WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        checkpoint.load(directory)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"),
            "tensor bert.encoder.layer.1.output.dense.weight",
        ),
        (lambda t: t.update({"bert.pooler.dense.weight": np.zeros((3, 32), np.float32)}), "bert.pooler.dense.weight"),
        (lambda t: t["bert.embeddings.LayerNorm.bias"].__setitem__(3, np.nan), "LayerNorm.bias"),
        (lambda t: t["bert.embeddings.LayerNorm.bias"].__setitem__(3, np.inf), "LayerNorm.bias"),
        (lambda t: t.pop("classifier.weight"), "classifier.weight"),
    ],
    ids=["missing", "wrong shape", "nan", "inf", "no classifier"],
)
def test_damaged_tensors_are_named_with_and_without_a_manifest(directory, change, message, with_manifest):
    rewrite(directory, change)
    if not with_manifest:
        stock(directory)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(directory)


def test_another_file_of_the_directory_changed_is_refused(directory):
    (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text().replace('"the"', '"hte"', 1))
    with pytest.raises(CheckpointError, match=r"tokenizer.json differs"):
        checkpoint.load(directory)


def test_golden_logits_catch_a_wrong_forward_pass(directory):
    files = checkpoint.read(directory)
    want = np.array(files.manifest["golden"]["logits"])
    allowed = files.manifest["golden"]["tolerance"] * np.abs(want).max()
    assert np.abs(want).max() > 1
    files.verify_golden(lambda ids, types: want + 0.9 * allowed)
    for wrong in (1.1 * allowed, np.nan):
        with pytest.raises(CheckpointError, match="golden logits"):
            files.verify_golden(lambda ids, types, wrong=wrong: want + wrong)


def test_no_weights_and_pickled_weights_are_told_apart(directory):
    stock(directory)
    (directory / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        checkpoint.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle file"):
        checkpoint.load(directory)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"model_type": "gpt2"}', UnsupportedError),
        ("{}", UnsupportedError),
        ("[1]", UnsupportedError),
        ("{", CheckpointError),
        ("\xff", CheckpointError),
    ],
)
def test_a_config_that_is_not_ours_is_named(directory, config, error):
    (directory / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(error, match=r"config\.json"):
        checkpoint.load(directory)


def test_a_damaged_manifest_is_named(directory):
    (directory / checkpoint.MANIFEST).write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(directory)


def test_an_encoder_gets_a_fresh_head_only_when_asked():
    with pytest.raises(CheckpointError, match="fine-tune it first"):
        checkpoint.load("minilm")
    model, _ = checkpoint.load("minilm", num_labels=3)
    assert model.classifier.out_features == 3


def test_the_golden_tolerance_is_far_above_rounding_and_far_below_a_fault(tmp_path):
    model, tok = checkpoint.load("minilm", num_labels=2)
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # logits of a trained model's size
    texts = manifest.golden_texts(512)
    _, golden = checkpoint.golden_logits(model, tok, texts)
    _, rounded = checkpoint.golden_logits(model.double(), tok, texts)
    allowed = checkpoint.GOLDEN_TOLERANCE * max(1, np.abs(golden).max())
    assert np.abs(golden).max() > 0.5
    assert np.abs(golden - rounded).max() < allowed / 20
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[:, 100] = 0
    _, wrong = checkpoint.golden_logits(model.float(), tok, texts)
    assert np.abs(golden - wrong).max() > allowed


def test_bfloat16_weights_are_read_exactly(tmp_path):
    model = classifier().bfloat16()
    model.save_pretrained(tmp_path)
    arrays = checkpoint.read_weights(tmp_path)
    for name, parameter in model.state_dict().items():
        assert np.array_equal(arrays[name], parameter.float().numpy())


def test_saved_files_can_be_read_by_the_group_the_umask_allows(directory):
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("read-only parent", "parent is read-only"),
        ("read-only target", "out is read-only"),
        ("read-only ancestor", "parent is read-only"),
        ("foreign folder", "out exists and is no model directory of this package"),
        ("a file", "out must be a folder"),
        ("below a file", "out/a cannot be a path: Not a directory"),
        ("working directory", "out is or holds the working directory"),
        ("above the working directory", "out is or holds the working directory"),
        ("no such device", "/proc is read-only"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch, place, says):
    target = tmp_path / "parent" / "out"
    target.parent.mkdir()
    if place == "read-only parent":
        target.parent.chmod(0o555)
    elif place == "read-only target":
        target.mkdir(mode=0o555)
    elif place == "foreign folder":
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    elif place == "read-only ancestor":
        target.parent.chmod(0o555)
        target = target / "a" / "b"
    elif place == "a file":
        target.write_text("mine")
    elif place == "below a file":
        target.write_text("mine")
        target = target / "a"
    elif place == "working directory":
        target.mkdir()
        monkeypatch.chdir(target)
    elif place == "above the working directory":
        (target / "inside").mkdir(parents=True)
        monkeypatch.chdir(target / "inside")
    else:
        target = type(target)("/proc/nowhere/out")
    with pytest.raises(OutputError, match=says):
        checkpoint.check_output(target)
    if place == "foreign folder":
        assert (target / "thesis.tex").read_text() == "mine"


def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path):
    directory = saved(tmp_path / "m", seed=0)
    old = checkpoint.weights_sha256(directory)
    context = multiprocessing.get_context("fork")  # a fresh interpreter takes seconds to import torch
    begun = context.Event()

    def save_again_and_again(model):
        begun.set()
        while True:
            saved(directory, model)

    new = None
    rng = random.Random(0)
    for _ in range(4):
        begun.clear()
        process = context.Process(target=save_again_and_again, args=(classifier(seed=1),))
        process.start()
        assert begun.wait(60)
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoint.load(directory)  # whole and verified, golden logits included
        sha256 = checkpoint.weights_sha256(directory)
        assert sha256 == old or new is None or sha256 == new
        new = sha256 if sha256 != old else new
    for path in tmp_path.glob(".m.tmp-*"):
        os.utime(path, (0, 0))  # old enough to be an orphan
    saved(directory, classifier(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "what the killed processes left is cleaned up"
    assert checkpoint.weights_sha256(directory) != old


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_settle", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save(classifier(), tokenizer(), tmp_path / "m", recipe={}, figures={})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_when_the_tokenizer_is_saved_is_one_line(tmp_path):
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    model = classifier(hidden_size=2, num_attention_heads=1, intermediate_size=4)

    def save_on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # the weights fit, the tokenizer does not
        try:
            saved(tmp_path / "m", model)
        except OutputError as error:
            said.put(str(error))

    process = context.Process(target=save_on_a_full_disk)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not said.empty()
    full = f"{tmp_path}/m cannot be written: File too large; free space or choose another output directory"
    assert said.get() == full
    assert not list(tmp_path.iterdir())


def test_finished_needs_the_same_job_and_whole_weights(tmp_path):
    model, made = classifier(), partial(Job, "test", code="sparsebert.patterns", output=tmp_path / "m")
    job = made(inputs={"settings": {"seed": 0}})
    assert checkpoint.finished(job) is None
    sha256 = checkpoint.save(model, tokenizer(), tmp_path / "m", recipe={}, job=job, figures={"steps": 3})
    assert checkpoint.finished(made(inputs={"settings": {"seed": 0}})) == {"steps": 3, "weights_sha256": sha256}
    other = {"inputs": {"settings": {"seed": 1}}}
    with pytest.raises(OutputError, match=r"m was made with --seed 0, not 1; .*--overwrite"):
        checkpoint.finished(made(**other))
    assert checkpoint.finished(made(**other, overwrite=True)) is None
    rewrite(tmp_path / "m", lambda t: t["classifier.bias"].__setitem__(0, 9.0))
    with pytest.raises(OutputError, match=r"tensor classifier\.bias differs from .*--overwrite to make it anew"):
        checkpoint.finished(job)


def test_a_model_of_unknown_settings_is_not_replaced(directory):
    job = Job("test", {}, "sparsebert.patterns", directory)
    with pytest.raises(OutputError, match="by a version of this package that did not record its settings") as caught:
        checkpoint.finished(job)
    assert caught.value.fix == "choose another -o, or give --overwrite to replace it"


def test_checking_an_output_makes_nothing(tmp_path):
    checkpoint.check_output(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_its_own_source_is_refused(directory):
    for target in (directory.parent / "x" / ".." / "m", directory.parent):
        with pytest.raises(OutputError, match="is or holds what it starts from"):
            checkpoint.check_output(target, sources=[directory], overwrite=True)


def test_a_link_to_an_older_model_is_followed(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    before = checkpoint.weights_sha256(directory)
    saved(tmp_path / "link", classifier(seed=1))
    assert (tmp_path / "link").is_symlink() and checkpoint.weights_sha256(directory) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m"]


def test_a_live_processs_staging_folder_is_left_alone(directory, tmp_path):
    staging = tmp_path / ".m.tmp-live"
    staging.mkdir()
    os.utime(staging, (0, 0))
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    saved(directory, classifier(seed=1))
    assert staging.exists()
    os.close(descriptor)
    saved(directory, classifier(seed=2))
    assert not staging.exists()


def test_without_an_exchange_the_directory_is_replaced_all_the_same(directory, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    before = checkpoint.weights_sha256(directory)
    saved(directory, classifier(seed=1))
    assert checkpoint.weights_sha256(directory) != before
    assert [path.name for path in directory.parent.iterdir()] == ["m"]


def test_a_model_that_is_not_finite_is_never_saved(tmp_path):
    model = classifier()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"classifier\.bias"):
        saved(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_a_directory_without_tokenizer_is_refused(directory):
    stock(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        checkpoint.load(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"num_attention_heads": "x"}, {"num_attention_heads": 5}, {"hidden_size": "x"},
        {"num_hidden_layers": -1}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_act": 5},
        {"hidden_act": "nope"}, {"layer_norm_eps": "x"}, {"id2label": "x"}, {"dtype": "nope"}, {"vocab_size": 100},
        {"attn_implementation": "nope"}, {"quantization_config": {"quant_method": "nope"}}, {"model_type": ["bert"]},
        {"sparsebert": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_cannot_be_is_one_error(directory, change):
    stock(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((CheckpointError, UnsupportedError)):
        checkpoint.load(directory)


TENSOR = {"dtype": "F32", "shape": [1], "nnz": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tensors": []}, "tensors"), ({"tensors": {"x": {}}}, "tensor x"), ({"tensors": {"x": 3}}, "tensor x"),
        *(({"tensors": {"x": TENSOR | {name: None}}}, "tensor x") for name in TENSOR),
        ({"files": []}, "files"), ({"files": {"config.json": 3}}, "file config.json"), ({"figures": None}, "figures"),
        ({"files": {"../m/config.json": "0" * 64}}, "file ../m/config.json"), ({"key": 3}, "key"),
        ({"weights_sha256": None}, "weights_sha256"), ({"golden": None}, "golden"), ({"golden": {}}, "golden texts"),
        ({"golden": {"texts": [], "logits": [], "tolerance": 0.1}}, "golden texts"),
        ({"golden": {"texts": ["a"] * 65, "logits": [[0.1]] * 65, "tolerance": 0.1}}, "golden texts"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, 0.2]], "tolerance": "x"}}, "golden tolerance must be"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, 2]], "tolerance": 0.1}}, "golden logits must be finite"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, np.nan]], "tolerance": 0.1}}, "golden logits must be finite"),
        ({"golden": {"texts": ["a"], "logits": ["ab"], "tolerance": 0.1}}, "golden logits"),
        ({"golden": {"texts": ["a"], "logits": [[]], "tolerance": 0.1}}, "golden logits"),
        ({"golden": {"texts": ["a"], "logits": [[0.1], [0.2]], "tolerance": 0.1}}, "golden logits"),
        ({"golden": {"texts": ["a", "b"], "logits": [[0.1], [0.2, 0.3]], "tolerance": 0.1}}, "golden logits"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, 0.2]], "tolerance": 0.1}}, "golden ids"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, 0.2]], "tolerance": 0.1, "ids": []}}, "golden ids"),
        ({"golden": {"texts": ["a"], "logits": [[0.1, 0.2]], "tolerance": 0.1, "ids": [3]}}, "golden ids"),
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_one_error(directory, change, fault):
    path = directory / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(directory)
    assert refused.value.problem.startswith(
        f"{path} must hold valid tensors, files, golden, figures, key and weights_sha256: {fault}"
    )


@pytest.mark.parametrize(
    ("manifest", "got"), [({"format_version": 99}, "'99'"), ({"format_version": "9" * 99}, repr("9" * 40)),
                          ({}, "'None'"), ([], "'None'")],
)  # fmt: skip
def test_a_manifest_of_another_format_is_refused(directory, manifest, got):
    path = directory / checkpoint.MANIFEST
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(directory)
    assert refused.value.problem == f"{path}: format_version must be 1 or 2, got {got}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_source_hash_sees_every_file_that_matters(directory, name):
    stock(directory)
    before = checkpoint.source_sha256(directory)
    if name == "model.safetensors":
        rewrite(directory, lambda t: t["classifier.bias"].__setitem__(0, 9.0))
    else:
        (directory / name).write_text((directory / name).read_text() + " ")
    assert checkpoint.source_sha256(directory) != before


def test_what_overwrite_and_an_empty_folder_allow(directory, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert checkpoint.check_output(foreign) == foreign, "nothing is lost there"
    (foreign / "thesis.tex").write_text("mine")
    assert checkpoint.check_output(foreign, overwrite=True) == foreign
    assert checkpoint.check_output(directory) == directory, "a model of this package is replaced"
    with pytest.raises(OutputError, match="foreign exists and is no model directory"):
        checkpoint.save(classifier(), tokenizer(), foreign, recipe={}, figures={})
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    checkpoint.save(classifier(), tokenizer(), foreign, recipe={}, figures={}, overwrite=True)
    assert not (foreign / "thesis.tex").exists() and checkpoint.has_head(foreign)


def test_a_saved_model_says_what_made_it(tmp_path):
    model = classifier().train()
    job = Job("test", {"settings": {"seed": 0}}, "sparsebert.patterns", tmp_path / "m")
    recipe, summary = {"command": "test", "z": 1, "a": [2, "é"]}, {"method": "mine", "sparsity": 0.5}
    sha256 = checkpoint.save(
        model, tokenizer(), tmp_path / "m", recipe=recipe, figures={"f1": 0.25}, job=job, summary=summary
    )
    assert model.training, "the model is left as it was"
    assert checkpoint.read_recipe(tmp_path / "m") == recipe
    assert list(checkpoint.read_recipe(tmp_path / "m")) == ["command", "z", "a"], "in the order it was given"
    written = json.loads((tmp_path / "m" / checkpoint.MANIFEST).read_text())
    assert written["figures"] == {"f1": 0.25} and written["key"] == job.key and written["job"] == job.record
    assert written["versions"] == {
        "sparsebert": sparsebert.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    assert written["weights_sha256"] == sha256 == checkpoint.weights_sha256(tmp_path / "m")
    said = checkpoint.read_config(tmp_path / "m")["sparsebert"]
    assert said == {"format_version": written["format_version"], **summary, "weights_sha256": sha256}
    for name, digest in written["files"].items():
        assert hashlib.sha256((tmp_path / "m" / name).read_bytes()).hexdigest() == digest
    files = {path.name for path in (tmp_path / "m").iterdir() if path.is_file()}
    assert written["files"].keys() == files - {checkpoint.WEIGHTS}, "each file is in one of the two lists"


def test_a_second_directory_of_a_job_ends_no_job(tmp_path):
    made = partial(Job, "test", {"settings": {}}, "sparsebert.patterns", tmp_path / "m")
    for name in ("m", "teacher"):
        checkpoint.save(classifier(), tokenizer(), tmp_path / name, recipe={}, figures={"of": name}, job=made())
    with made() as job:
        job.value("step", lambda: 1)
    assert checkpoint.finished(made(), tmp_path / "teacher")["of"] == "teacher"
    assert (tmp_path / "m.partial").exists(), "there may be more to do"
    assert checkpoint.finished(made())["of"] == "m" and not (tmp_path / "m.partial").exists()


def test_what_is_damaged_or_no_model_is_made_anew_where_that_is_allowed(directory):
    made = partial(Job, "test", {}, "sparsebert.patterns", directory)
    (directory / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"manifest\.json must be a JSON file") as caught:
        checkpoint.finished(made())
    assert "--overwrite to make it anew" in caught.value.fix
    assert checkpoint.finished(made(overwrite=True)) is None
    stock(directory)
    assert checkpoint.finished(made()) is None, "which check_output refuses or allows"
    shutil.rmtree(directory)
    assert checkpoint.finished(made()) is None
    directory.write_text("a file")
    assert checkpoint.finished(made()) is None


def test_transformers_speaks_as_before_after_a_load(directory):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        for level, bars in ((logging.INFO, True), (logging.WARNING, False)):
            logging.set_verbosity(level)
            (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
            checkpoint.load(directory)
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_a_head_of_another_size_is_made_fresh_and_the_encoder_kept(directory):
    model, _ = checkpoint.load(directory, num_labels=5)
    assert model.config.num_labels == 5 and model.classifier.weight.shape == (5, 32) and not model.training
    weights = checkpoint.read_weights(directory)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert name.startswith("classifier.") or np.array_equal(tensor.numpy(), weights[name])
    same, _ = checkpoint.load(directory, num_labels=2)
    assert np.array_equal(same.classifier.weight.detach().numpy(), weights["classifier.weight"]), (
        "its own, where it fits"
    )


def test_golden_logits_of_another_arithmetic_may_differ_by_a_share_of_the_largest(directory):
    files = checkpoint.read(directory)
    want = np.array(files.manifest["golden"]["logits"])
    allowed = files.manifest["golden"]["tolerance"] * np.abs(want).max() + 0.05 * np.abs(want).max()
    files.verify_golden(lambda ids, types: want - 0.95 * allowed, relative=0.05)
    with pytest.raises(CheckpointError, match="golden logits must agree within"):
        files.verify_golden(lambda ids, types: want - 1.05 * allowed, relative=0.05)
    with pytest.raises(CheckpointError, match="differ by inf"):
        files.verify_golden(lambda ids, types: want[:, :1], relative=0.05)


def test_a_manifest_lists_its_tensors_and_no_others(directory):
    path = directory / checkpoint.MANIFEST
    whole = json.loads(path.read_text())
    name = "classifier.bias"
    for change, says in (
        (lambda t: t.pop(name), "has tensor classifier.bias, which its manifest does not name"),
        (lambda t: t.update(more=t[name]), r"lacks tensor more \[2\]"),
        (lambda t: t[name].update(shape=[1, 2]), r"classifier.bias must be F32 \[1, 2\], is F32 \[2\]"),
        (lambda t: t[name].update(dtype="I32"), r"classifier.bias must be I32 \[2\], is F32 \[2\]"),
        (lambda t: t[name].update(sha256="0" * 64), r"classifier.bias differs from its manifest \(sha256\)"),
    ):
        changed = json.loads(json.dumps(whole))
        change(changed["tensors"])
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=says):
            checkpoint.read_weights(directory)


def test_a_file_that_the_manifest_names_may_not_be_absent(directory):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"m lacks tokenizer_config\.json"):
        checkpoint.load(directory)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("special_tokens_map.json", '{"additional_special_tokens": ["ovie"]}'), ("added_tokens.json", "{}"),
        ("vocab.txt", ""), ("merges.txt", "a b"),
    ],
)  # fmt: skip
def test_a_file_that_is_read_and_that_the_manifest_does_not_name_is_refused(directory, name, held):
    (directory / name).write_text(held)
    for load in (checkpoint.load, checkpoint.read, Engine.load):
        with pytest.raises(
            CheckpointError, match=rf"m/{name} must be among the files of its manifest, was added after"
        ):
            load(directory)
    (directory / name).unlink()
    for other in ("README.md", "sparsebert/eval.json", "sparsebert/attacks-x.parquet", "sparsebert/int8.safetensors"):
        (directory / other).write_text("more")
    checkpoint.load(directory)


@pytest.mark.parametrize(
    ("wrong", "says", "fix"),
    [
        ("a/path", "the path a/path", "load it first: model, tokenizer = sparsebert.checkpoint.load(path)"),
        (Path("a/path"), "the path a/path", "load it first: model, tokenizer = sparsebert.checkpoint.load(path)"),
        (types.SimpleNamespace(_orig_mod=1), "a SimpleNamespace", "pass model._orig_mod"),
        (types.SimpleNamespace(merge_and_unload=1), "a SimpleNamespace", "pass model.merge_and_unload()"),
        (types.SimpleNamespace(module=1), "a SimpleNamespace", "pass model.module"),
        (torch.nn.Linear(2, 2), "a Linear", "pass the model inside of it"),
    ],
)
def test_what_is_no_model_is_told_how_to_pass_one(tmp_path, wrong, says, fix):
    with pytest.raises(InputError) as caught:
        checkpoint.save(wrong, tokenizer(), tmp_path / "m", recipe={}, figures={})
    assert caught.value.problem == f"model must be a classifier of transformers, got {says}"
    assert caught.value.fix == fix and not list(tmp_path.iterdir())


def test_mapped_tensors_are_those_of_the_file_and_cannot_be_written(tmp_path):
    path = tmp_path / "some.safetensors"
    made = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0]).bfloat16(), "c": torch.arange(3)}
    save_torch({**made, "none": torch.empty(0, 2)}, path)
    found = tensors.mapped_arrays(path)
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]], "b": [1.5, -2.0], "c": [0, 1, 2], "none": [],
    }  # fmt: skip
    assert found["b"].dtype == np.float32 and found["c"].dtype == np.int64 and found["none"].shape == (0, 2)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1
    save_torch({"none": torch.empty(0, 2)}, path)
    assert tensors.mapped_arrays(path)["none"].shape == (0, 2)
    save_torch(made, path)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole + b"x", whole[:5], b""):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"some\.safetensors must be a whole safetensors file"):
            tensors.mapped_arrays(path)


def header_of(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("entries", "size", "says"),
    [
        ([], 0, "its header must be an object"),
        ({"a": 3}, 0, "its header says of tensor 'a': 3"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "its header says of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "its header says of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "its header says of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "its header says of tensor 'a'"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "its header says of tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, r"a F32 \[2\] must have 8 bytes, has 4"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "one begins at 4, not 0"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8, "its tensors have 4 bytes, it has 8"),
        (
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
            4,
            "one begins at 0, not 4",
        ),
    ],
)
def test_headers_whose_tensors_do_not_fill_the_file_are_refused(tmp_path, entries, size, says):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header_of(entries) + bytes(size))
    with pytest.raises(CheckpointError, match=says):
        tensors.mapped_arrays(path)


def test_a_header_in_another_order_and_with_remarks_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    entries = {
        "z": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
        "__metadata__": {"format": "pt"},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
        "a": {"dtype": "BOOL", "shape": [2], "data_offsets": [1, 3]},
    }
    path.write_bytes(header_of(entries) + bytes([7, 1, 0]))
    found = tensors.mapped_arrays(path)
    assert list(found) == ["a", "empty", "z"] and found["a"].tolist() == [True, False] and found["z"] == 7
    entries["a"]["dtype"] = "F8_E4M3"
    path.write_bytes(header_of(entries) + bytes([7, 1, 0]))
    with pytest.raises(UnsupportedError, match=r"tensor a must have a dtype of F64, .*, has 'F8_E4M3'"):
        tensors.mapped_arrays(path)
