from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from models import classifier, saved, tokenizer

from sparsebert import checkpoint, data
from sparsebert.config import BenchConfig, PruneConfig
from sparsebert.engine import Engine, engine
from sparsebert.engine.rivals import compare_with_torch
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
    ours = Engine.load(directory).logits(texts)
    np.testing.assert_allclose(ours, stock_logits(directory, texts), atol=TOLERANCE)


def test_pairs_and_truncation_equal_transformers(directory, texts):
    pairs = list(zip(texts[:10], texts[10:20], strict=True))
    loaded = Engine.load(directory)
    for max_length in (128, 16):
        ours = loaded.logits(pairs, max_length=max_length)
        np.testing.assert_allclose(ours, stock_logits(directory, pairs, max_length), atol=TOLERANCE)


def test_a_text_gets_the_same_logits_alone_and_in_a_batch(directory, texts):
    loaded = Engine.load(directory)
    together = loaded.logits(texts)
    alone = np.concatenate([loaded.logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)


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


def test_other_architectures_and_activations_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="model_type bert"):
        Engine.load(saved(tmp_path / "r", kind="roberta"))
    with pytest.raises(UnsupportedError, match="got bert with relu"):
        Engine.load(saved(tmp_path / "b", hidden_act="relu"))


def test_a_wrong_kernel_is_caught_by_the_golden_logits(directory, monkeypatch):
    right = engine.sparse_matmul
    monkeypatch.setattr(engine, "sparse_matmul", lambda *args, **kwargs: right(*args, **kwargs) * np.float32(1.01))
    with pytest.raises(CheckpointError, match="golden logits"):
        Engine.load(directory)


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


def test_compare_with_torch_checks_the_output_and_restores_threads(directory):
    before = torch.get_num_threads()
    examples = data.load(data.get_task("mr"), "test", limit=5)
    result = compare_with_torch(directory, examples, BenchConfig(batch=2, rounds=6, threads=1), max_length=64)
    assert torch.get_num_threads() == before
    assert result["max_logit_error"] < TOLERANCE
    assert all(
        result[part][name] > 0 for part in ("latency_ms", "p50_ms", "p99_ms") for name in ("torch", "sparsebert")
    )
    assert result["speedup_ci"][0] <= result["speedup"] <= result["speedup_ci"][1]


def test_compare_with_torch_refuses_a_wrong_output(directory, tmp_path, monkeypatch):
    stock = shutil.copytree(directory, tmp_path / "stock")
    shutil.rmtree(stock / "sparsebert")  # no golden logits to catch it first
    right = engine.sparse_matmul
    examples = data.load(data.get_task("mr"), "test", limit=5)
    for factor in (1.5, np.nan):
        monkeypatch.setattr(engine, "sparse_matmul", lambda *a, f=factor, **k: right(*a, **k) * np.float32(f))
        with pytest.raises(CheckpointError, match="must be torch's"):
            compare_with_torch(stock, examples, BenchConfig(rounds=1), max_length=64)


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
