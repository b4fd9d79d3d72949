from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import require
from models import classifier, saved, tokenizer

from sparsebert import checkpoint, data
from sparsebert.cli.timing import texts_of
from sparsebert.config import BenchConfig, PruneConfig
from sparsebert.engine import Engine, engine
from sparsebert.engine.rivals import compare
from sparsebert.errors import CheckpointError, InputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune

TOLERANCE = 2e-5  # fp32 sums in another order, through two layers, on logits of size about 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = classifier(labels=3, hidden_size=48, intermediate_size=80, num_attention_heads=3)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.8))
    return saved(tmp_path_factory.mktemp("engine") / "m", model)


@pytest.fixture(scope="module")
def texts():
    return data.load(data.get_task("mr"), "test", limit=40).texts


def stock_logits(directory, texts, max_length=128):
    model, tokenizer = checkpoint.load(directory)
    with torch.inference_mode():
        rows = []
        for text in texts:
            pair = text if isinstance(text, tuple) else (text,)
            rows.append(
                model(**tokenizer(*pair, return_tensors="pt", truncation=True, max_length=max_length)).logits[0]
            )
    return torch.stack(rows).numpy()


def test_logits_equal_transformers_on_every_isa(directory, texts, isa, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_ISA", isa)
    ours = Engine.load(directory, dtype="fp32").logits(texts)
    np.testing.assert_allclose(ours, stock_logits(directory, texts), atol=TOLERANCE)


def test_bf16_logits_are_near_transformers(directory, texts, tile_isa, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_ISA", tile_isa)
    loaded = Engine.load(directory, dtype="bf16")
    want = stock_logits(directory, texts)
    assert np.abs(loaded.logits(texts) - want).max() < engine.BF16_TOLERANCE * np.abs(want).max()
    assert {row["form"] for row in loaded.explain()} == {"tiles"}
    assert {row["kernel"] for row in loaded.explain()} == {f"{tile_isa} bf16"}


def test_auto_is_bf16_where_there_are_tiles(directory, monkeypatch):
    for cap in ("scalar", "avx512", "amx"):
        monkeypatch.setenv("SPARSEBERT_ISA", cap)
        assert Engine.load(directory).dtype == ("bf16" if _dispatch.isa() == "amx" else "fp32")


def test_another_dtype_is_refused(directory):
    with pytest.raises(InputError, match="dtype must be one of auto, fp32, bf16, got 'fp16'"):
        Engine.load(directory, dtype="fp16")


def test_explain_says_what_each_linear_runs_as(directory, tmp_path):
    rows = Engine.load(directory, dtype="fp32").explain()
    assert [(row["layer"], row["linear"]) for row in rows] == [
        (i, name) for i in range(2) for name in ("qkv", "attention_out", "up", "down")
    ]
    assert {row["form"] for row in rows} == {"rows"}
    assert rows[2]["shape"] == [80, 48] and rows[2]["density"] == pytest.approx(0.2, abs=0.01)
    assert {row["form"] for row in Engine.load(saved(tmp_path / "m"), dtype="fp32").explain()} == {"dense"}
    model = classifier(hidden_size=64)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.5, pattern="16x1"))
    assert {row["form"] for row in Engine.load(saved(tmp_path / "g", model), dtype="fp32").explain()} == {"groups"}


def test_pairs_and_truncation_equal_transformers(directory, texts):
    pairs = list(zip(texts[:10], texts[10:20], strict=True))
    loaded = Engine.load(directory, dtype="fp32")
    for max_length in (128, 16):
        ours = loaded.logits(pairs, max_length=max_length)
        np.testing.assert_allclose(ours, stock_logits(directory, pairs, max_length), atol=TOLERANCE)


def test_a_text_gets_the_same_logits_alone_and_in_a_batch(directory, texts):
    loaded = Engine.load(directory)
    together = loaded.logits(texts)
    alone = np.concatenate([loaded.logits([text]) for text in texts])
    assert np.array_equal(together, alone)


def test_threads_do_not_change_the_result(directory, texts):
    assert np.array_equal(
        Engine.load(directory, threads=1).logits(texts), Engine.load(directory, threads=2).logits(texts)
    )


def test_concurrent_callers_get_their_own_results(directory, texts):
    loaded = Engine.load(directory)
    want = [loaded.logits([text]) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda text: loaded.logits([text]), texts))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_threads_is_refused_not_taken_for_unset(directory):
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        Engine.load(directory, threads=0)


def test_an_empty_batch_is_an_empty_result(directory):
    assert Engine.load(directory).logits([]).shape == (0, 3)


@pytest.mark.parametrize(
    "bad", [["ok", ""], ["   "], [None], [("premise", "")], ["\udcff"], "a string", [("a", "b", "c")], [()]]
)
def test_what_is_no_text_is_refused(directory, bad):
    with pytest.raises(InputError, match="text"):
        Engine.load(directory).logits(bad)


@pytest.mark.parametrize("length", [2, 513])
def test_a_length_the_model_cannot_take_is_refused(directory, length):
    with pytest.raises(InputError, match="max_length must be 3 to 512"):
        Engine.load(directory).logits(["a"], max_length=length)


ARCHITECTURES = {
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {},
    "electra": {},
    "electra with narrow embeddings": {"embedding_size": 20},
    "bert with relu": {"hidden_act": "relu"},
    "bert of one head": {"num_attention_heads": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_transformers(tmp_path, texts, name):
    made = saved(tmp_path / "m", kind=name.split()[0], **ARCHITECTURES[name])
    pairs = list(zip(texts[:3], texts[3:6], strict=True))
    for some in (texts[:6], pairs, ["long " * 600]):
        loaded = Engine.load(made, dtype="fp32")
        limit = loaded.encoder.max_length
        ours = loaded.logits(some, max_length=limit)
        np.testing.assert_allclose(ours, stock_logits(made, some, limit), atol=TOLERANCE)


def test_another_activation_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedError, match=r"activations gelu, relu .*got 'silu'"):
        Engine.load(saved(tmp_path / "b", hidden_act="silu"))


def test_a_wrong_kernel_is_caught_by_the_golden_logits(directory, monkeypatch):
    right = engine.sparse_encoder
    monkeypatch.setattr(engine, "sparse_encoder", lambda *args, **kwargs: right(*args, **kwargs) * np.float32(1.01))
    with pytest.raises(CheckpointError, match="golden logits"):
        Engine.load(directory, dtype="fp32")


def test_falling_back_to_the_portable_path_is_said(directory, monkeypatch):
    monkeypatch.delenv("SPARSEBERT_ISA", raising=False)
    monkeypatch.setattr(_dispatch, "supported_isas", lambda: ("scalar",))
    with pytest.warns(UserWarning, match="portable path"):
        Engine.load(directory)


def test_density_is_that_of_the_manifest(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())["tensors"]
    inside = [t for name, t in manifest.items() if ".layer." in name and len(t["shape"]) == 2]
    want = sum(t["nnz"] for t in inside) / sum(np.prod(t["shape"]) for t in inside)
    assert Engine.load(directory).density == pytest.approx(want)


def encoded(directory, **settings) -> tuple[list[dict], BenchConfig]:
    config = BenchConfig(**{"n": 5, "dtype": "fp32", "threads": 1} | settings)
    return texts_of(directory, config), config


def test_compare_checks_the_output_and_restores_threads(directory):
    before = torch.get_num_threads()
    rows = compare(directory, *encoded(directory, batch=2, rounds=6, rivals="torch,torch-bf16"))["rows"]
    assert torch.get_num_threads() == before
    assert [row["engine"] for row in rows] == ["sparsebert", "torch", "torch-bf16"]
    assert all(row["match"] and row["p50_ms"] > 0 and row["p99_ms"] >= row["p50_ms"] for row in rows)
    assert rows[0]["error"] < TOLERANCE and rows[0]["ratio"] == 1 and rows[1]["error"] < 1e-6
    assert all(row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1] for row in rows)


def test_texts_of_one_length_are_timed(directory):
    texts, config = encoded(directory, seq="40")
    assert [len(text["input_ids"]) for text in texts] == [40] * 5
    assert compare(directory, texts, config)["tokens"] == 200
    with pytest.raises(InputError, match="seq must be at most 512 tokens, got 600"):
        encoded(directory, seq="600")


@pytest.mark.parametrize(
    ("name", "needs"),
    [("onnxruntime", "onnx onnxruntime"), ("onnxruntime-int8", "onnx onnxruntime"), ("openvino", "onnx openvino")],
)
def test_other_runtimes_give_the_same_logits(directory, name, needs):
    for package in needs.split():
        if importlib.util.find_spec(package) is None:
            require(package, f"{package} is not installed")
    rows = compare(directory, *encoded(directory, batch=3, rounds=1, rivals=name))["rows"]
    assert rows[1]["match"]


def test_a_rival_that_is_not_installed_is_named(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match="needs the package"):
        compare(directory, *encoded(directory, rounds=1, rivals="openvino"))
    with pytest.raises(InputError, match=r"rivals must be of torch, .*got 'tensorrt'"):
        compare(directory, *encoded(directory, rivals="torch,tensorrt"))


def test_compare_refuses_a_wrong_output(directory, tmp_path, monkeypatch):
    stock = shutil.copytree(directory, tmp_path / "stock")
    shutil.rmtree(stock / "sparsebert")  # no golden logits to catch it first
    right = engine.sparse_encoder
    for factor in (1.5, np.nan):
        monkeypatch.setattr(engine, "sparse_encoder", lambda *a, f=factor, **k: right(*a, **k) * np.float32(f))
        with pytest.raises(CheckpointError, match="must be torch's"):
            compare(stock, *encoded(stock, rounds=1))


def test_missing_fields_of_config_take_the_architectures_defaults(directory, texts, tmp_path):
    stock = shutil.copytree(directory, tmp_path / "stock")
    shutil.rmtree(stock / "sparsebert")
    config = json.loads((stock / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps", "max_position_embeddings"):
        config.pop(name)
    (stock / "config.json").write_text(json.dumps(config))
    assert np.array_equal(Engine.load(stock).logits(texts), Engine.load(directory).logits(texts))


def test_the_length_a_model_was_trained_at_is_the_default(tmp_path):
    model = classifier()
    long = ["good " * 60]
    checkpoint.save(model, tokenizer(), tmp_path / "m", recipe={}, key="k", figures={}, summary={"max_length": 16})
    loaded = Engine.load(tmp_path / "m")
    assert np.array_equal(loaded.logits(long), loaded.logits(long, max_length=16))
    assert not np.array_equal(loaded.logits(long), loaded.logits(long, max_length=64))
