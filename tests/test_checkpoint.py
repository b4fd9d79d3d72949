from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from models import classifier, saved, stock, tokenizer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsebert import checkpoint
from sparsebert.checkpoint import manifest
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
        else:  # a bit of the header's free-form metadata: every tensor must be what it was
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
    with pytest.raises(CheckpointError, match="is pickle"):
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
    "place",
    [
        "read-only parent",
        "read-only target",
        "read-only ancestor",
        "foreign folder",
        "a file",
        "below a file",
        "working directory",
        "no such device",
    ],
)
def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch, place):
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
    else:
        target = type(target)("/proc/nowhere/out")
    with pytest.raises(OutputError):
        checkpoint.check_output(target)
    if place == "foreign folder":
        assert (target / "thesis.tex").read_text() == "mine"


def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path):
    directory = saved(tmp_path / "m", seed=0)
    old = checkpoint.weights_sha256(directory)
    context = multiprocessing.get_context("fork")  # a fresh interpreter imports torch for seconds
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
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # the weights fit, the tokenizer does not
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
    with pytest.raises(OutputError, match="by a version of this package that did not note its settings"):
        checkpoint.finished(job)


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


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": []}, {"tensors": {"x": {}}}, {"files": []}, {"files": {"config.json": 3}}, {"golden": {}},
        {"golden": None}, {"golden": {"texts": [], "logits": [], "tolerance": 0.1}},
        {"golden": {"texts": ["a"], "logits": [[0.1, 0.2]], "tolerance": "x"}},
        {"golden": {"texts": ["a"], "logits": [[0.1, 0.2, 0.3]], "tolerance": 0.1}},
        {"golden": {"texts": ["a"], "logits": ["ab"], "tolerance": 0.1}}, {"key": 3}, {"format_version": 99},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_one_error(directory, change):
    path = directory / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError):
        checkpoint.load(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_source_hash_sees_every_file_that_matters(directory, name):
    stock(directory)
    before = checkpoint.source_sha256(directory)
    if name == "model.safetensors":
        rewrite(directory, lambda t: t["classifier.bias"].__setitem__(0, 9.0))
    else:
        (directory / name).write_text((directory / name).read_text() + " ")
    assert checkpoint.source_sha256(directory) != before
