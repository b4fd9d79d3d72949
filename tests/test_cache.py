"""The cache of packed models: which entries are trusted, made anew or removed first, and which folders are used."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from models import classifier, saved, stock

from sparsebert import checkpoint
from sparsebert.cli import main
from sparsebert.config import PruneConfig
from sparsebert.engine import Engine, architectures, cache, costs, engine
from sparsebert.errors import CheckpointError, InputError
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = classifier(labels=3, hidden_size=48, intermediate_size=80, num_attention_heads=3)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.8))
    return saved(tmp_path_factory.mktemp("cached") / "m", model)


def _classify(directory, queue) -> None:
    queue.put(Engine.load(directory).logits(["a text"]))


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_packed_form_is_kept_and_mapped(directory, fresh_cache, monkeypatch, dtype):
    first = Engine.load(directory, dtype=dtype)
    (entry,) = fresh_cache.glob("*.safetensors")
    monkeypatch.setattr(checkpoint.Files, "weights", None)  # the second load needs neither this
    monkeypatch.setattr(engine.architectures, "build", None)  # nor this
    again = Engine.load(directory, dtype=dtype)
    assert np.array_equal(first.logits(["a text"]), again.logits(["a text"]))
    for loaded in (first, again):
        values = loaded.encoder.layers[0].up.weight.values
        assert isinstance(values, np.memmap) and not values.flags.writeable
    assert sum(array.nbytes for array in checkpoint.mapped_arrays(entry).values()) > 0.9 * entry.stat().st_size


@pytest.mark.parametrize("damage", ["a byte", "its end", "all", "another's"])
def test_a_damaged_packed_form_is_made_anew(directory, fresh_cache, tmp_path, damage):
    want = Engine.load(directory).logits(["a text"])
    (entry,) = fresh_cache.glob("*.safetensors")
    good, arrays = entry.read_bytes(), checkpoint.mapped_arrays(entry)
    if damage == "another's":
        other = saved(tmp_path / "other", seed=1)
        Engine.load(other)
        (foreign,) = set(fresh_cache.glob("*.safetensors")) - {entry}
        bad = foreign.read_bytes()
    else:
        flipped = bytearray(good)
        flipped[-1000] ^= 1
        bad = {"a byte": bytes(flipped), "its end": good[: len(good) // 2], "all": b""}[damage]
    entry.unlink()  # the engine above keeps its mapped file
    entry.write_bytes(bad)
    assert np.array_equal(Engine.load(directory).logits(["a text"]), want)
    made = checkpoint.mapped_arrays(entry)
    assert made.keys() == arrays.keys() and all(np.array_equal(made[name], arrays[name]) for name in made)


def test_a_flipped_byte_in_the_checkpoint_is_refused_though_it_is_packed(directory, fresh_cache, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    Engine.load(copy)
    weights = copy / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor \S+ differs from its manifest"):
        Engine.load(copy)
    (copy / "tokenizer.json").write_text("{}")
    weights.write_bytes((directory / checkpoint.WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json differs from its manifest"):
        Engine.load(copy)


def test_two_processes_pack_once(directory, fresh_cache):
    context = multiprocessing.get_context("fork")  # both begin at once, and neither imports torch first
    queue = context.Queue()
    children = [context.Process(target=_classify, args=(directory, queue)) for _ in range(2)]
    for child in children:
        child.start()
    first, second = (queue.get(timeout=120) for _ in children)
    for child in children:
        child.join(60)
    assert np.array_equal(first, second)
    assert len(list(fresh_cache.glob("*.safetensors"))) == 1 and not list(fresh_cache.glob("*.tmp"))


def test_without_a_place_for_the_packed_form_it_stays_in_memory(directory, tmp_path, monkeypatch):
    want = Engine.load(directory).logits(["a text"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept in .*; set SPARSEBERT_CACHE"):
        assert np.array_equal(Engine.load(directory).logits(["a text"]), want)


def test_a_full_disk_leaves_nothing_half_written(directory, fresh_cache, monkeypatch):
    def full(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        Engine.load(directory).logits(["a text"])
    assert {path.suffix for path in fresh_cache.iterdir()} == {".json"}


def said(entry) -> tuple[dict, bytes]:
    """An entry's header and its arrays' bytes."""
    data = entry.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def damaged(entry, change) -> None:
    """Changes the entry's header by `change`; its arrays stay as they are."""
    header, arrays = said(entry)
    change(header)
    text = json.dumps(header).encode()
    entry.unlink()
    entry.write_bytes(struct.pack("<Q", len(text)) + text + arrays)


def in_tree(old: str, new: str, which: int):
    """Changes one occurrence of a text in an entry's tree."""

    def change(header: dict) -> None:
        parts = header["__metadata__"]["tree"].split(old)
        assert len(parts) > which + 1
        header["__metadata__"]["tree"] = old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])

    return change


def reshape(header: dict) -> None:
    name = next(name for name, entry in header.items() if len(entry.get("shape", ())) == 2)
    header[name]["shape"].reverse()


CHANGES = {
    "heads of the short batches' encoder": in_tree('"heads": 3', '"heads": 1', 0),
    "heads of the long batches' encoder": in_tree('"heads": 3', '"heads": 1', 2),
    "eps": in_tree("1e-12", "1e-02", 1),
    "an activation": in_tree("gelu", "relu", 1),
    "which array": in_tree('{"array": "1"}', '{"array": "2"}', 0),
    "no JSON": lambda header: header["__metadata__"].update(tree="{" * 10**5),
    "no sum": lambda header: header["__metadata__"].pop("sum"),
    "a shape": reshape,
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_entry_whose_tree_or_header_changed_is_made_anew(directory, fresh_cache, monkeypatch, name):
    # Short and long batches use different forms, so that the entry holds several encoders.
    table = costs.Costs(rows=(100.0, 100.0, 0.1), groups=(1.0, 1.0, 1.0), int8=(1.0, 1.0, 1.0))
    monkeypatch.setitem(costs.SHIPPED, _dispatch.with_kernels(costs.ISAS)[-1], table)
    batches = [["a text"], ["a text"] * 40]
    want = [Engine.load(directory, dtype="fp32").logits(batch) for batch in batches]
    (entry,) = fresh_cache.glob("*.safetensors")
    good = said(entry)
    damaged(entry, CHANGES[name])
    assert said(entry) != good
    loaded = Engine.load(directory, dtype="fp32")
    assert all(np.array_equal(loaded.logits(batch), right) for batch, right in zip(batches, want, strict=True))
    assert said(entry) == good


def test_each_encoder_of_an_engine_is_held_against_the_golden_logits(directory, fresh_cache, monkeypatch):
    table = costs.Costs(rows=(100.0, 100.0, 0.1), groups=(1.0, 1.0, 1.0), int8=(1.0, 1.0, 1.0))
    monkeypatch.setitem(costs.SHIPPED, _dispatch.with_kernels(costs.ISAS)[-1], table)
    run, right, wrong = [], engine.sparse_encoder, None

    def sparse_encoder(ids, types, starts, encoder, **options):
        run.append(encoder)
        return right(ids, types, starts, encoder, **options) * np.float32(1.01 if encoder is wrong else 1)

    monkeypatch.setattr(engine, "sparse_encoder", sparse_encoder)
    short, middling, long = Engine.load(directory, dtype="fp32")._encoders
    assert run == [short, long] and middling is short  # the same encoder runs once
    # A packed form that is wrong, though its sum is right, is packed once more; the second one is right.
    monkeypatch.setattr(
        cache, "_restored", lambda tree, arrays, restore=cache._restored: remember(restore(tree, arrays))
    )
    made = []

    def remember(value):
        nonlocal wrong
        if isinstance(value, tuple) and isinstance(value[0], type(long)):
            made.append(value)
            wrong = made[0][0]
        return value

    loaded = Engine.load(directory, dtype="fp32")
    assert len(made) == 2 and loaded._encoders[0] is made[1][0]


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_a_directory_replaced_during_a_load_is_loaded_once_more(directory, fresh_cache, tmp_path, monkeypatch):
    read = architectures.build
    for sealed in (True, False):
        other = saved(tmp_path / f"other {sealed}", classifier(labels=3, seed=5, hidden_size=48, num_attention_heads=3))
        place = shutil.copytree(directory, tmp_path / f"place {sealed}")
        if not sealed:
            stock(other), stock(place)
        want = Engine.load(other, cached=False).logits(["a text"])

        def replace(*args, place=place, other=other):
            monkeypatch.setattr(architectures, "build", read)
            place.rename(f"{place} before")
            other.rename(place)
            return read(*args)

        monkeypatch.setattr(architectures, "build", replace)
        assert np.array_equal(Engine.load(place).logits(["a text"]), want)
        assert np.array_equal(Engine.load(place).logits(["a text"]), want)  # the cache does not hold the old model


def test_a_directory_that_never_rests_is_refused(directory, fresh_cache, tmp_path, monkeypatch):
    place = shutil.copytree(directory, tmp_path / "place")
    inner = architectures.build
    monkeypatch.setattr(architectures, "build", lambda *args: (os.utime(place / "config.json"), inner(*args))[1])
    with pytest.raises(CheckpointError, match=r"config\.json changed while it was read"):
        Engine.load(place, cached=False)


@pytest.mark.parametrize("fault", ["writable folder", "sticky folder", "writable parent", "link", "another's"])
def test_a_cache_that_others_may_write_is_not_used_and_said(directory, fresh_cache, tmp_path, monkeypatch, fault):
    want = Engine.load(directory).logits(["a text"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if fault == "writable folder":
        fresh_cache.chmod(0o770)
    elif fault == "sticky folder":  # others could add an entry under the name of one that is not there yet
        fresh_cache.chmod(0o1777)
    elif fault == "writable parent":
        fresh_cache.parent.chmod(0o777)
    elif fault == "link":
        shutil.rmtree(fresh_cache)
        fresh_cache.symlink_to(elsewhere)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr(cache, "_ROOT", -1)
    before = {path.name: path.stat().st_mtime_ns for path in fresh_cache.iterdir()}
    says = {"link": "is a link", "another's": "belongs to user"}.get(fault, "others may write to .*: chmod go-w it")
    with pytest.warns(UserWarning, match=f"not kept in .*{says}.*; set SPARSEBERT_CACHE"):
        assert np.array_equal(Engine.load(directory).logits(["a text"]), want)
    assert {path.name: path.stat().st_mtime_ns for path in fresh_cache.iterdir()} == before
    with pytest.warns(UserWarning, match=says):  # the list does not silently look empty
        assert cache.entries() == []
    assert not list(elsewhere.iterdir())


def test_files_are_written_through_no_link(directory, fresh_cache, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Engine.load(directory)
    (entry,) = fresh_cache.glob("*.safetensors")
    (note,) = fresh_cache.glob("*.json")
    for path in (entry, note):
        path.unlink()
        path.symlink_to(victim)
    entry.with_suffix(".tmp").symlink_to(victim)
    Engine.load(directory)
    assert victim.read_text() == "precious" and not entry.is_symlink() and not note.is_symlink()
    assert entry.stat().st_mode & 0o077 == 0 and fresh_cache.stat().st_mode & 0o077 == 0


def test_the_cache_keeps_to_its_limit_and_what_was_used_last(fresh_cache, tmp_path, monkeypatch):
    models = [saved(tmp_path / f"m{i}", seed=i) for i in range(3)]
    for model in models[:2]:
        Engine.load(model)
        for path in fresh_cache.glob("*.safetensors"):  # as if time had passed
            os.utime(path, (path.stat().st_atime - 10, path.stat().st_mtime - 10))
    Engine.load(models[0])  # used again: the second is the oldest now
    size = cache.entries()[0]["bytes"]
    monkeypatch.setenv("SPARSEBERT_CACHE_MB", str(int(2.5 * size / 1e6)))
    left = fresh_cache / "left.tmp"
    left.touch()
    os.utime(left, (1, 1))
    Engine.load(models[2])
    assert [row["model"] for row in cache.entries()] == [str(models[2]), str(models[0])] and not left.exists()
    monkeypatch.setenv("SPARSEBERT_CACHE_MB", "1")
    with pytest.warns(UserWarning, match=r"it takes \d+ MB, SPARSEBERT_CACHE_MB is 1"):
        Engine.load(models[1])
    monkeypatch.setenv("SPARSEBERT_CACHE_MB", "0")  # no cache is wanted, so no warning
    Engine.load(models[1])
    assert len(cache.entries()) == 2
    for bad in ("-1", "many", "1.5"):
        monkeypatch.setenv("SPARSEBERT_CACHE_MB", bad)
        with pytest.raises(InputError, match=f"SPARSEBERT_CACHE_MB must be a whole number of megabytes, got '{bad}'"):
            Engine.load(models[1])


def test_the_command_lists_the_cache_and_empties_it(directory, fresh_cache, capsys):
    assert main(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(fresh_cache), "limit_mb": 10_000, "mb": 0.0, "removed": False, "entries": [],
    }  # fmt: skip
    loaded = Engine.load(directory, dtype="fp32")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    document = json.loads(shown.splitlines()[-1])
    (row,) = document["entries"]
    assert row["model"] == str(directory) and row["dtype"] == "fp32" and abs(row["used"] - time.time()) < 600
    assert document["mb"] == pytest.approx(row["bytes"] / 1e6) and "fp32" in shown
    want = loaded.logits(["a text"])
    assert main(["cache", "--prune", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["removed"] and document["entries"] == [row] and not list(fresh_cache.iterdir())
    assert np.array_equal(loaded.logits(["a text"]), want)  # an engine keeps what it mapped


TRUNCATED = """
import os, sys
from sparsebert.engine import Engine

engine = Engine.load(sys.argv[1], cached=sys.argv[2] == "cached")
before = engine.logits([[101, *range(1996, 5000, 10), 102]])
os.truncate(sys.argv[1] + "/model.safetensors", 1000)
after = engine.logits([[101, *range(1996, 5000, 10), 102], [101, 2204, 102]])
assert (before[0] == after[0]).all()
"""


@pytest.mark.parametrize("how", ["cached", "uncached", "no place"])
def test_an_engine_outlives_its_model_file(directory, fresh_cache, tmp_path, how):
    copy = shutil.copytree(directory, tmp_path / "copy")
    extra = {"SPARSEBERT_CACHE": "/dev/null"} if how == "no place" else {}
    command = [sys.executable, "-W", "ignore", "-c", TRUNCATED, str(copy), how.replace("no place", "cached")]
    done = subprocess.run(command, env=os.environ | extra, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_damaged_table_of_costs_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    isa = _dispatch.with_kernels(costs.ISAS)[-1]
    name = costs._machine(isa)
    for bad in ("NaN", "Infinity", "-1", "0", "null", '"many"', "[]", "1e999"):
        row = f"[{bad}, 1.0, 1.0]"
        (tmp_path / "costs.json").write_text(f'{{{json.dumps(name)}: {{"rows": {row}, "groups": [1.0, 1.0, 1.0]}}}}')
        assert costs.costs(isa) == costs.SHIPPED[isa]
    (tmp_path / "costs.json").write_text("[" * 10**5)
    assert costs.costs(isa) == costs.SHIPPED[isa]
