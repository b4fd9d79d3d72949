from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import models
import numpy as np
import pytest
import torch
import transformers
from conftest import require
from models import classifier, saved

import sparsebert
from sparsebert import checkpoint, data, environment
from sparsebert.cli.timing import texts_of
from sparsebert.config import BenchConfig, PruneConfig
from sparsebert.engine import Engine, costs, engine, formats
from sparsebert.engine.rivals import time_rivals
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
    assert np.abs(loaded.logits(texts) - want).max() < formats.DTYPES["bf16"].tolerance * np.abs(want).max()
    assert {row["form"] for row in loaded.explain()} == {"tiles"}
    assert {row["kernel"] for row in loaded.explain()} == {f"{tile_isa} bf16"}


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_auto_is_bf16_only_for_a_checkpoint_made_for_it(directory, tmp_path):
    stock = models.stock(shutil.copytree(directory, tmp_path / "stock"))
    config = json.loads((stock / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        for declared in ("float32", "float16", "bfloat16", None):
            written = {k: v for k, v in config.items() if k != "dtype"} | ({name: declared} if declared else {})
            (stock / "config.json").write_text(json.dumps(written))
            fast = declared == "bfloat16"
            files = checkpoint.read(stock)
            assert engine.dtype_of(files, "amx") == ("bf16" if fast else "fp32")
            assert engine.dtype_of(files, "avx512_bf16") == "fp32"  # no faster there
            assert Engine.load(stock).dtype == ("bf16" if fast and _dispatch.isa() == "amx" else "fp32")
    assert Engine.load(directory).dtype == "fp32"


def test_another_dtype_is_refused(directory):
    with pytest.raises(InputError, match="dtype must be one of auto, fp32, bf16, int8, got 'fp16'"):
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
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.1))
    light = Engine.load(saved(tmp_path / "l", model), dtype="fp32").explain()  # zeros that cost more than they save
    assert {row["form"] for row in light} == {"dense"} and light[0]["density"] < 0.95
    model = classifier(hidden_size=64)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.5, pattern="16x1"))
    assert {row["form"] for row in Engine.load(saved(tmp_path / "g", model), dtype="fp32").explain()} == {"groups"}


def test_pairs_and_truncation_equal_transformers(directory, texts):
    pairs = list(zip(texts[:10], texts[10:20], strict=True))
    loaded = Engine.load(directory, dtype="fp32")
    for max_length in (128, 16):
        ours = loaded.logits(pairs, max_length=max_length, truncate=True)
        np.testing.assert_allclose(ours, stock_logits(directory, pairs, max_length), atol=TOLERANCE)


def test_a_text_gets_the_same_logits_alone_and_in_a_batch(directory, texts, monkeypatch):
    monkeypatch.setitem(costs.SHIPPED, _dispatch.with_kernels(costs.ISAS)[-1], ROWS_WHEN_LONG)
    loaded = Engine.load(directory, batch_invariant=True)
    together = loaded.logits(texts)
    alone = np.concatenate([loaded.logits([text]) for text in texts])
    assert np.array_equal(together, alone)


def test_threads_do_not_change_the_result(directory, texts):
    assert np.array_equal(
        Engine.load(directory, threads=1).logits(texts), Engine.load(directory, threads=2).logits(texts)
    )


def test_an_engine_has_the_threads_that_were_asked_for(directory):
    assert [Engine.load(directory, threads=n).threads for n in (1, 2, None)] == [1, 2, _dispatch.threads(None)]
    with pytest.raises(InputError, match="threads must be"):
        Engine.load(directory, threads=0)


def test_concurrent_callers_get_their_own_results(directory, texts):
    loaded = Engine.load(directory)
    want = [loaded.logits([text]) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda text: loaded.logits([text]), texts))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


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
        ours = loaded.logits(some, truncate=True)
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


# Denies the permission that Linux requires before a process may use tile registers, then loads a model.
WITHOUT_TILES = """
import ctypes, errno, struct, sys

prctl, syscall, arch_prctl = 157, ctypes.CDLL(None, use_errno=True).syscall, 158
request = 0x1023  # ARCH_REQ_XCOMP_PERM
code = [(0x20, 0, 0, 0), (0x15, 0, 3, arch_prctl), (0x20, 0, 0, 16), (0x15, 0, 1, request),
        (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
assert syscall(prctl, 38, 1, 0, 0, 0) == 0  # no new privileges
assert syscall(prctl, 22, 2, filters, 0, 0) == 0  # a filter of system calls
assert syscall(arch_prctl, request, 18) == -1 and ctypes.get_errno() == errno.EPERM

from sparsebert.engine import Engine
from sparsebert.ops import _dispatch

engine = Engine.load(sys.argv[1])
print(engine.dtype, engine.logits(["a text"]).shape, "amx" in _dispatch.supported_isas(), _dispatch.why_off()["amx"])
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the permission is Linux's, for x86_64"
)
def test_without_permission_for_tiles_the_engine_runs_fp32(directory):
    said = subprocess.run([sys.executable, "-c", WITHOUT_TILES, str(directory)], capture_output=True, text=True)
    assert said.stderr == "" and said.returncode == 0
    assert said.stdout.startswith("fp32 (1, 3) False not supported by this processor (x86_64) or its operating system")


def test_a_pipeline_gives_the_answers_of_transformers(directory, texts):
    ours = sparsebert.pipeline("text-classification", directory, dtype="fp32")
    stock = transformers.pipeline("text-classification", str(directory))
    near = partial(pytest.approx, abs=TOLERANCE)
    some = [*texts[:5], {"text": texts[5], "text_pair": texts[6]}, "long " * 600]
    for options in ({}, {"batch_size": 4, "top_k": None}):
        want = stock(some, truncation=True, max_length=512, **options)
        assert ours(some, truncation=True, max_length=512, **options) == [
            near(one) if isinstance(one, dict) else [near(each) for each in one] for one in want
        ]


def test_a_pipeline_of_another_task_or_device_is_refused(directory):
    with pytest.raises(InputError, match="task must be one of text-classification"):
        sparsebert.pipeline("fill-mask", directory)
    with pytest.raises(InputError, match="device must be cpu, got meta"):
        sparsebert.pipeline("text-classification", directory, device="meta")


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
    rows = time_rivals(directory, *encoded(directory, batch=2, rounds=6, rivals="torch,torch-bf16"))["rows"]
    assert torch.get_num_threads() == before
    assert [row["engine"] for row in rows] == ["sparsebert", "torch", "torch-bf16"]
    assert all(row["match"] and row["p50_ms"] > 0 and row["p99_ms"] >= row["p50_ms"] for row in rows)
    assert rows[0]["error"] < TOLERANCE and rows[0]["ratio"] == 1 and rows[1]["error"] < 1e-6
    assert all(row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1] for row in rows)


def test_another_model_is_timed_in_our_engine_and_its_logits_are_not_compared(directory, tmp_path):
    dense = saved(tmp_path / "dense")
    settings = {"rounds": 6, "rivals": "none"}
    ours, other = time_rivals(directory, *encoded(directory, **settings), vs=dense)["rows"]
    assert other["engine"] == f"sparsebert, {dense}" and other["sparsity"] == 0 < ours["sparsity"]
    assert other["p50_ms"] > 0 and other["ratio_ci"][0] <= other["ratio"] <= other["ratio_ci"][1]
    assert ours["match"] and other["match"] is None and other["error"] is None


def test_another_model_must_have_the_same_vocabulary(directory, tmp_path):
    dense = saved(tmp_path / "other", kind="roberta")
    with pytest.raises(InputError, match=f"{dense} must have the vocabulary of {directory}"):
        time_rivals(directory, *encoded(directory, rivals="none"), vs=dense)


def test_texts_of_one_length_are_timed(directory):
    texts, config = encoded(directory, seq="40")
    assert [len(text["input_ids"]) for text in texts] == [40] * 5
    assert time_rivals(directory, texts, config)["tokens"] == 200
    with pytest.raises(InputError, match="seq must be at most 512 tokens, got 600"):
        encoded(directory, seq="600")


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("onnxruntime", "onnx onnxruntime"),
        ("onnxruntime-int8", "onnx onnxruntime"),
        ("onnxruntime-int8-static", "onnx onnxruntime"),
        ("openvino", "onnx openvino"),
        ("openvino-int8", "onnx openvino nncf"),
    ],
)
def test_other_runtimes_give_the_same_logits(directory, name, needs):
    for package in needs.split():
        if importlib.util.find_spec(package) is None:
            require(package, f"{package} is not installed")
    rows = time_rivals(directory, *encoded(directory, batch=3, rounds=1, rivals=name))["rows"]
    assert rows[1]["match"]


def test_a_rival_that_is_not_installed_is_named(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match="needs the package"):
        time_rivals(directory, *encoded(directory, rounds=1, rivals="openvino"))
    with pytest.raises(InputError, match=r"rivals must be among torch, .*got 'tensorrt'"):
        time_rivals(directory, *encoded(directory, rivals="torch,tensorrt"))


def test_deepsparse_runs_in_an_environment_of_its_own(directory, tmp_path):
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        require("onnx", "onnx or onnxruntime is not installed")
    # A stand-in with the same interface, on onnxruntime: the test is about the other process, not about that library.
    (tmp_path / "deepsparse.py").write_text(
        "import onnxruntime\n"
        "class Engine:\n"
        "    def __init__(self, model, batch_size, num_cores, input_shapes):\n"
        "        print('a line of its own')\n"
        "        self.session, self.shapes = onnxruntime.InferenceSession(model), input_shapes\n"
        "    def run(self, arrays, val_inp):\n"
        "        assert [list(a.shape) for a in arrays] == self.shapes and arrays[0].shape[1] % 16 == 0\n"
        "        return self.session.run(None, dict(zip([i.name for i in self.session.get_inputs()], arrays)))\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"batch": 3, "rounds": 1, "rivals": "deepsparse"}
    rows = time_rivals(directory, *encoded(directory, **settings, deepsparse_python=str(python)))["rows"]
    assert rows[1]["match"] and rows[1]["p50_ms"] > 0
    for bad, says in ((None, "--deepsparse-python"), ("/no/python", "cannot be run"), ("/bin/false", "stopped")):
        with pytest.raises(UnsupportedError, match=says):
            time_rivals(directory, *encoded(directory, **settings, deepsparse_python=bad))


def test_rivals_are_held_to_the_same_instructions(monkeypatch):
    for name in environment._RIVAL_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the values set below are undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2")
    monkeypatch.setenv("SPARSEBERT_ISA", "amx")
    environment.cap_rivals()
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    monkeypatch.setenv("SPARSEBERT_ISA", "avx2")
    environment.cap_rivals()
    assert [os.environ[name] for name in environment._RIVAL_VARIABLES] == ["AVX2", "avx2", "SSE4_2"]


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_compare_refuses_a_wrong_output(directory, tmp_path, monkeypatch):
    stock = models.stock(shutil.copytree(directory, tmp_path / "stock"))  # no golden logits to catch it first
    right = engine.sparse_encoder
    for factor, says in ((1.5, "must match torch.s"), (np.nan, "logits must be finite")):
        monkeypatch.setattr(engine, "sparse_encoder", lambda *a, f=factor, **k: right(*a, **k) * np.float32(f))
        with pytest.raises(CheckpointError, match=says):
            time_rivals(stock, *encoded(stock, rounds=1))


@pytest.mark.filterwarnings("ignore:.*is unsealed")
def test_missing_fields_of_config_take_the_architectures_defaults(directory, texts, tmp_path):
    stock = models.stock(shutil.copytree(directory, tmp_path / "stock"))
    config = json.loads((stock / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps", "max_position_embeddings"):
        config.pop(name)
    (stock / "config.json").write_text(json.dumps(config))
    assert np.array_equal(Engine.load(stock).logits(texts), Engine.load(directory).logits(texts))


def costs_with(rows: tuple[float, float, float]) -> costs.Costs:
    """`rows`: cost of a non-zero in rows, in places of groups, for short, middling and long batches."""
    return costs.Costs(rows=rows, groups=(1.0, 1.0, 1.0), int8=(1.0, 1.0, 1.0))


ROWS_WHEN_LONG = costs_with((100.0, 100.0, 0.1))


def test_short_batches_may_take_another_form(directory, texts, monkeypatch):
    monkeypatch.setitem(costs.SHIPPED, _dispatch.with_kernels(costs.ISAS)[-1], ROWS_WHEN_LONG)
    loaded = Engine.load(directory, dtype="fp32")
    assert {(row["form"], row["short"]) for row in loaded.explain()} == {("rows", "dense")}
    want = stock_logits(directory, texts)
    np.testing.assert_allclose(loaded.logits(texts), want, atol=TOLERANCE)
    np.testing.assert_allclose(loaded.logits(texts[:1]), want[:1], atol=TOLERANCE)
    invariant = Engine.load(directory, dtype="fp32", batch_invariant=True)
    assert {row["short"] for row in invariant.explain()} == {None}
    assert np.array_equal(invariant.logits(texts)[:1], invariant.logits(texts[:1]))


def test_explain_measures(directory):
    for dtype in ("fp32", "bf16"):
        for row in Engine.load(directory, dtype=dtype).explain(measure=True):
            assert row["gflops"] > 0 and 0 < row["share_of_peak"] < 1.5


def test_costs_are_measured_stored_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    isa = _dispatch.with_kernels(costs.ISAS)[-1]
    assert costs.costs(isa) == costs.SHIPPED[isa]
    found = costs.measure()
    assert costs.costs(isa) == found[isa]
    for text in ("no json", "[]", json.dumps({costs._machine(isa): {"rows": [1.0], "groups": [1.0]}})):
        (tmp_path / "costs.json").write_text(text)
        assert costs.costs(isa) == costs.SHIPPED[isa]


@pytest.mark.parametrize(
    ("rows", "forms"),
    [
        # A quarter of the weight is kept, in groups of rows that share all columns, so places are as many as non-zeros.
        ((0.5, 0.5, 0.5), ["rows", "rows", "rows"]),
        ((2.0, 2.0, 2.0), ["groups", "groups", "groups"]),
        ((2.0, 0.5, 2.0), ["groups", "rows", "groups"]),
    ],
)
def test_the_cheapest_form_is_chosen_for_each_length_of_a_batch(rows, forms):
    weight = np.zeros((64, 64), np.float32)
    weight[:, :16] = 1
    packed = formats.pack_cheapest(weight, costs_with(rows))
    assert [formats.explained(form)[0] for form in packed] == forms
    assert all(form.nnz == 64 * 16 for form in packed)
    assert len({id(form) for form in packed}) == len(set(forms)), "packed once a form"


def test_a_full_weight_is_dense_unless_rows_are_cheaper():
    weight = np.ones((64, 64), np.float32)
    for cost, form in ((1.5, "dense"), (0.5, "rows")):
        packed = formats.pack_cheapest(weight, costs_with((cost,) * 3))
        assert {formats.explained(one)[0] for one in packed} == {form}


def test_explain_gives_the_reason_of_each_form_by_its_figures(tmp_path):
    whys = {}
    for name, sparsity, pattern in (
        ("dense", 0.25, "unstructured"), ("groups", 0.5, "16x1"), ("rows", 0.75, "unstructured"),
    ):  # fmt: skip
        model = classifier(hidden_size=64)
        prune(model, [], PruneConfig(method="magnitude", sparsity=sparsity, pattern=pattern))
        made = saved(tmp_path / name, model)
        row = Engine.load(made, dtype="fp32").explain()[3]
        kept = np.count_nonzero(checkpoint.read_weights(made)["bert.encoder.layer.0.output.dense.weight"]) / 64**2
        assert row["form"] == name and row["density"] == pytest.approx(kept) and row["short"] is None
        assert row["shape"] == [64, 64] and row["kernel"] == f"{_dispatch.float32_isas()[-1]} fp32"
        assert "gflops" not in row and "share_of_peak" not in row
        whys[name] = row["why"].replace(f"{kept:.0%}", "K")
    assert whys == {
        "dense": "K is kept: the dense form is cheaper",
        "groups": "groups of rows with the same columns; 100% of their places kept",
        "rows": "rows share too few kept columns for groups to be cheaper",
    }
    tiles = Engine.load(tmp_path / "groups", dtype="bf16").explain()[3]
    assert tiles["form"] == "tiles" and tiles["density"] == pytest.approx(0.5)
    found = [int(share) for share in re.findall(r"(\d+)%", tiles["why"])]
    assert len(found) == 2 and all(0 <= share <= 100 for share in found)


@pytest.mark.parametrize(("value", "stored"), [(1.0, "100%"), (0.0, "0%")])
def test_what_is_said_of_tiles(value, stored):
    weight = np.full((64, 64), value, np.float32)
    form, why = formats.explained(formats.pack_tiles(weight))
    assert form == "tiles" and why.startswith(f"{stored} of the matrix in tiles")


@pytest.mark.parametrize(
    ("dtype", "supported", "says"),
    [
        ("fp32", ("scalar",), "no AVX2 here: the engine runs fp32 on its portable path, see `sparsebert doctor`"),
        ("bf16", ("scalar",), "no AMX and no AVX-512 BF16 here: the engine runs bf16 on its portable path"),
        ("bf16", ("scalar", "avx2"), "no AMX and no AVX-512 BF16 here"),
        ("fp32", ("scalar", "avx2"), None),
    ],
)
def test_the_portable_path_is_warned_of_by_what_is_lacking(directory, monkeypatch, recwarn, dtype, supported, says):
    if set(supported) - set(_dispatch.supported_isas()):
        require("avx2", "not supported here")
    monkeypatch.delenv("SPARSEBERT_ISA", raising=False)
    monkeypatch.setattr(_dispatch, "supported_isas", lambda: supported)
    Engine.load(directory, dtype=dtype)
    assert [says in str(w.message) for w in recwarn] == ([True] if says else [])
    monkeypatch.setenv("SPARSEBERT_ISA", supported[-1])  # a user who sets it knows
    recwarn.clear()
    Engine.load(directory, dtype=dtype)
    assert not len(recwarn)
