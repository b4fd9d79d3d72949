"""The engine on a GPU and sparse_encoder's Triton kernels: interpreted on the CPU, compiled for sm_90 without a GPU,
and run on a GPU if there is one. Triton reads TRITON_INTERPRET when it is first imported, so the first two run in
separate processes.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import require
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton_runs import compiled_by, interpreted_by, prepare_interpreter, run_here, usage_on_sm_90

from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, InputError, UnsupportedError

DTYPES = ("float32", "bfloat16")
# Results are about 1. bfloat16 rounds by 2^-9 of a value's size, by 2^-8 in the interpreter, up to three times.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-2}
# Heads and their size; programs take 32 or 64 queries, and heads are padded to 16, 32, 64, 128.
HEADS = [(2, 7), (1, 16), (3, 33), (1, 64)]
LENGTHS = ([1], [3, 1, 40, 7, 70], [31, 33, 64, 1, 1, 2], [130])
WIDTHS = (1, 5, 20, 32, 129)  # of a layer norm
PADDED = 6  # tokens of a batch that are not real
MODELS = {
    "bert": {"labels": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3},
    "roberta": {},
    "distilbert": {},
    "electra": {"embedding_size": 20},
}
TEXTS = [("a premise", "its hypothesis"), "a gripping film", [4, 204, 5], "long " * 40, "ok"]
# Logits are about 1. float32: sums in another order. bfloat16: a share of the largest logit, as the engine's tolerance.
LOGITS_TOLERANCE = {"fp32": 2e-5, "bf16": 0.1}


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The arrays of a batch of these sequences, followed by PADDED tokens that are not real."""
    rng = np.random.default_rng(sum(lengths))
    starts = np.cumsum([0, *lengths])
    arrays = {
        "ids": rng.integers(0, 50, starts[-1]), "types": rng.integers(0, 2, starts[-1]),
        "first": np.repeat(starts[:-1], lengths), "stop": np.repeat(starts[1:], lengths),
    }  # fmt: skip
    found = {name: torch.from_numpy(np.pad(array, (0, PADDED))).to(torch.int32) for name, array in arrays.items()}
    return found | {"tokens": torch.tensor([starts[-1]], dtype=torch.int32)}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(getattr(torch, dtype))


def attended(
    lengths: list[int], heads: int, size: int, dtype: str, device: str, invariant: bool = False
) -> torch.Tensor:
    from sparsebert.kernels.sparse_encoder import attention

    given = {name: value.to(device) for name, value in batch(lengths).items()}
    width = sum(lengths) + PADDED
    qkv = normal(3 * heads * size, width, dtype=dtype).to(device)
    out = torch.full((heads * size, width), torch.nan, dtype=qkv.dtype, device=device)
    return attention(qkv, given["first"], given["stop"], given["tokens"], heads, out, invariant=invariant).cpu()


def attended_ref(lengths: list[int], heads: int, size: int, dtype: str) -> torch.Tensor:
    qkv = normal(3 * heads * size, sum(lengths) + PADDED, dtype=dtype).double()
    parts = []
    for start, stop in pairwise(np.cumsum([0, *lengths])):
        q, k, v = qkv[:, start:stop].view(3, heads, size, stop - start)
        weights = torch.softmax(q.transpose(1, 2) @ k / size**0.5, -1)
        parts.append((v @ weights.transpose(1, 2)).reshape(heads * size, stop - start))
    return torch.cat(parts, 1)


EPS = 1e-5


def normed(width: int, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """What `add_norm` and `embed` give for a batch."""
    from sparsebert.kernels.sparse_encoder import add_norm, embed

    lengths = [5, 1, 61]
    given = batch(lengths)
    for name in ("ids", "types", "first"):
        given[name][-PADDED:] = 1 << 20  # far outside: nothing of a token that is not real may be looked up
    given = {name: value.to(device) for name, value in given.items()}
    tokens, shape = given["tokens"], (width, sum(lengths) + PADDED)
    x, residual = (normal(*shape, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
    norm = tuple(normal(width, seed=seed).to(device) for seed in (3, 4))
    words = normal(50, width, dtype=dtype, seed=5).to(device)
    positions = normal(2, 70, width, seed=6).to(device)
    new = torch.full(shape, torch.nan, dtype=x.dtype, device=device)
    embedded = embed(given["ids"], given["types"], given["first"], words, positions, norm, EPS, tokens, new)
    return {"add_norm": add_norm(x, residual, norm, EPS, tokens, residual).cpu(), "embed": embedded.cpu()}


def normed_ref(width: int, dtype: str) -> dict[str, torch.Tensor]:
    lengths = [5, 1, 61]
    given, shape = batch(lengths), (width, sum(lengths) + PADDED)
    x, residual = (normal(*shape, dtype=dtype, seed=seed).double() for seed in (1, 2))
    weight, bias = (normal(width, seed=seed).double() for seed in (3, 4))
    places = torch.arange(shape[1]) - given["first"]
    places[-PADDED:] = 0
    embedded = normal(50, width, dtype=dtype, seed=5).double()[given["ids"]]
    embedded += normal(2, 70, width, seed=6).double()[given["types"], places]
    return {
        name: torch.nn.functional.layer_norm(rows, (width,), weight, bias, EPS).T[:, :-PADDED]
        for name, rows in (("add_norm", (x + residual).T), ("embed", embedded))
    }


def near(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    assert str(got.dtype) == f"torch.{dtype}"
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got[:, :-PADDED].double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Results of the interpreted kernels for every case."""
    return interpreted_by(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, one of them pruned in groups; of few positions, as each golden text costs seconds to interpret."""
    import models

    from sparsebert.config import PruneConfig
    from sparsebert.pruning import prune

    folder = tmp_path_factory.mktemp("models")
    for kind, changes in MODELS.items():
        made = models.classifier(kind, max_position_embeddings=40, **changes)
        if kind == "bert":
            prune(made, [], PruneConfig(method="magnitude", sparsity=0.8, pattern="16x1"))
        models.saved(folder / kind, made)
    return folder


@pytest.fixture(scope="module")
def engines(models_folder: Path) -> dict:
    """What the engine says and gives with its kernels interpreted."""
    file = models_folder / "engines.json"
    run_here(__file__, "engines", models_folder, file, TRITON_INTERPRET="1")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Resources that the kernels use on a GPU of compute capability 9.0."""
    return compiled_by(__file__, tmp_path_factory.mktemp("compiled"))


def gpu() -> None:
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_interpreted_attention_is_that_of_each_sequence(interpreted, lengths, heads, dtype):
    near(interpreted[f"attention/{lengths}/{heads}/{dtype}"], attended_ref(lengths, *heads, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["add_norm", "embed"])
def test_the_interpreted_norms_are_the_references(interpreted, name, width, dtype):
    near(interpreted[f"{name}/{width}/{dtype}"], normed_ref(width, dtype)[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_on_a_gpu_give_the_references_results(dtype):
    gpu()
    for lengths in LENGTHS:
        for heads in HEADS:
            near(attended(lengths, *heads, dtype, "cuda"), attended_ref(lengths, *heads, dtype), dtype)
    for width in WIDTHS:
        for name, got in normed(width, dtype, "cuda").items():
            near(got, normed_ref(width, dtype)[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_invariant_attention_is_that_of_each_sequence(interpreted, dtype):
    lengths, heads = LENGTHS[1], HEADS[0]
    near(interpreted[f"invariant/{dtype}"], attended_ref(lengths, *heads, dtype), dtype)


def test_nan_stays_with_its_sequence(interpreted):
    got, clean = interpreted["nan"], interpreted["nan/clean"]
    assert got[:, 3:7].isnan().all()
    assert torch.equal(got[:, :3], clean[:, :3]) and torch.equal(got[:, 7:12], clean[:, 7:12])


@pytest.mark.parametrize("name", ["attend/64", "attend/64/exact", "attend/128", "add_norm/768", "embed/1024"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_compile_for_sm_90_and_spill_nothing(compiled, name, dtype):
    usage = compiled[f"{name}/{dtype}"]
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255
    assert usage["COPIES"] > 0 or not name.startswith("attend") or name.endswith("exact")


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "fp32") for kind in MODELS), ("bert", "bf16")])
def test_logits_are_those_of_the_engine_on_the_cpu(models_folder, engines, kind, dtype):
    want = Engine.load(models_folder / kind, dtype="fp32").logits(TEXTS, truncate=True)
    got = np.array(engines[f"{kind}/{dtype}"])
    assert np.abs(got - want).max() <= LOGITS_TOLERANCE[dtype] * max(1, np.abs(want).max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE)
def test_logits_on_a_gpu_are_those_of_the_engine_on_the_cpu(models_folder, kind, dtype):
    gpu()
    want = Engine.load(models_folder / kind, dtype="fp32").logits(TEXTS, truncate=True)
    loaded = Engine.load(models_folder / kind, dtype=dtype, device="cuda")
    for _ in range(2):  # the second call replays a graph
        got = loaded.logits(TEXTS, truncate=True)
        assert np.abs(got - want).max() <= LOGITS_TOLERANCE[dtype] * max(1, np.abs(want).max())


def test_engines_of_several_threads_on_a_gpu_do_not_disturb_each_other(models_folder):
    gpu()
    loaded = [Engine.load(models_folder / kind, dtype="fp32", device="cuda") for kind in ("bert", "electra")]
    batches = [TEXTS[:count] * times for count in range(1, len(TEXTS)) for times in (1, 3, 9)]  # of many graphs
    want = [[Engine.load(engine.directory).logits(batch, truncate=True) for batch in batches] for engine in loaded]
    found: list[list[np.ndarray]] = [[], []]

    def call(i: int) -> None:
        found[i] += [loaded[i].logits(batch, truncate=True) for batch in batches]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, right in zip(chain(*found), chain(*want), strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=LOGITS_TOLERANCE["fp32"] * max(1, np.abs(right).max()))


def test_an_engine_that_is_gone_leaves_no_memory_on_a_gpu(models_folder):
    gpu()
    left = []
    for _ in range(3):
        loaded = Engine.load(models_folder / "bert", device="cuda")
        loaded.logits(TEXTS, truncate=True)
        del loaded
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[0] == left[1] == left[2]


def test_explain_times_each_linear_where_the_engine_is(engines):
    told, shares = engines["explain/timed"]
    assert told == [["cpu", 4096]] and set(shares) == {None}
    for gflops, want in engines["explain/gflops"]:
        assert gflops == pytest.approx(want) and gflops > 0


def test_a_form_that_was_not_measured_is_not_chosen(engines):
    assert {row["form"] for row in engines["explain"]} == {"dense"}
    assert {row["why"] for row in engines["explain"]} == {"no form is measured on this GPU: sparsebert doctor --tune"}
    assert engines["explain"][0]["shape"] == [144, 48] and engines["explain"][0]["density"] == pytest.approx(0.2, 0.02)


def test_measured_costs_choose_the_forms_of_short_and_of_long_batches(models_folder, engines):
    rows = engines["explain/measured"]
    assert {(row["form"], row["short"]) for row in rows} == {("groups16", "bitmask")}
    assert rows[0]["kernel"] == "triton interpreter fp32" and "us by the cost table, dense" in rows[0]["why"]
    want = Engine.load(models_folder / "bert", dtype="fp32").logits(TEXTS, truncate=True)
    assert np.abs(np.array(engines["measured"]) - want).max() <= LOGITS_TOLERANCE["fp32"]


def test_an_invariant_engine_gives_a_text_the_same_bits_in_any_batch(engines):
    assert {row["form"] for row in engines["explain/invariant"]} == {"fused"}
    assert engines["invariant"] == engines["invariant/alone"]


def test_a_batch_runs_in_the_graph_of_its_size(engines):
    assert engines["graphs/keys"] == [[32, 0]]
    np.testing.assert_allclose(engines["graphs"], engines["bert/fp32"][1:3], rtol=0, atol=LOGITS_TOLERANCE["fp32"])


def test_the_last_layer_computes_first_tokens_only(engines):
    width, tokens = engines["normed"][0]
    assert engines["normed"] == [[width, tokens]] * 2 + [[width // 2, 2]] * 2 and tokens > 2


def test_a_graph_allocates_no_memory(engines):
    assert engines["graphs/allocated"] == []  # compute-sanitizer is run without torch's caching allocator


def test_a_batch_that_is_too_large_is_cut_between_sequences(engines):
    np.testing.assert_allclose(engines["cut"], engines["cut/alone"], rtol=0, atol=LOGITS_TOLERANCE["fp32"])
    assert engines["none"] == []


def test_fp32_is_refused_while_matmuls_may_round_to_tf32(engines):
    assert "torch.backends.cuda.matmul.fp32_precision is 'tf32'" in engines["tf32"]


def test_a_wrong_kernel_is_caught_by_the_golden_logits(engines):
    assert "golden logits must agree" in engines["wrong"] and "device='cpu'" in engines["wrong"]


def test_errors_name_the_text(engines):
    assert "texts[1] has 101" in engines["too long"]
    assert "ids must be at least 0 and below" in engines["bad id"]


def test_auto_is_bf16_only_for_a_checkpoint_that_declares_it(engines):
    assert engines["auto"] == ["bf16", "bf16", "fp32", "fp32"]


def test_a_pickled_engine_is_loaded_on_the_gpu_again(engines):
    assert engines["pickled"]["device"] == "cuda"


def test_an_engine_is_used_by_one_call_and_one_process_at_a_time(engines):
    assert "a signal handler calls one during another call" in engines["handler"]
    assert "this is a child of its fork" in engines["fork"]


REFUSALS = {
    "device must be cpu, cuda or cuda:N, got 'tpu'": {"device": "tpu"},
    "device must be cpu, cuda or cuda:N, got 'cuda:-1'": {"device": "cuda:-1"},
    "device must be cpu, cuda or cuda:N, got 1": {"device": 1},
    "threads must be None on device cuda, got 2": {"device": "cuda", "threads": 2},
    "device cuda runs fp32 and bf16, not int8": {"device": "cuda", "dtype": "int8"},
}


@pytest.fixture
def triton_here():
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("message", REFUSALS)
@pytest.mark.usefixtures("triton_here")
def test_arguments_that_no_gpu_runs_are_refused(message):
    with pytest.raises((InputError, UnsupportedError)) as error:
        Engine.load("nowhere", **REFUSALS[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_torch_or_triton_the_extra_is_named(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith(("sparsebert.engine.cuda", "sparsebert.kernels"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnsupportedError, match=rf"device cuda needs {missing}; pip install 'sparsebert\[triton\]'"):
        Engine.load("nowhere", device="cuda")


def interpret(file: str) -> None:
    from safetensors.torch import save_file

    from sparsebert.kernels.sparse_encoder import attention

    prepare_interpreter()
    found = {}
    for dtype in DTYPES:
        for lengths in LENGTHS:
            for heads in HEADS:
                found[f"attention/{lengths}/{heads}/{dtype}"] = attended(lengths, *heads, dtype, "cpu")
        found[f"invariant/{dtype}"] = attended(LENGTHS[1], *HEADS[0], dtype, "cpu", True)
        for width in WIDTHS:
            found |= {f"{name}/{width}/{dtype}": got for name, got in normed(width, dtype, "cpu").items()}
    given = batch([3, 4, 5])
    for name, value in (("nan", torch.nan), ("nan/clean", 0.0)):
        qkv = normal(3 * 16, 12 + PADDED)
        qkv[[3, 20, 40], 5] = value
        out = torch.empty(16, 12 + PADDED)
        found[name] = attention(qkv, given["first"], given["stop"], given["tokens"], 1, out)
    save_file(found, file)


class Allocations(TorchDispatchMode):
    """The operators of torch whose results are in fresh memory, but for those by which the interpreter runs kernels."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def apart(*given, **named):
            with _disable_current_modes():
                return run(*given, **named)

        self._restore = partial(setattr, GridExecutor, "__call__", run)
        GridExecutor.__call__ = apart
        return super().__enter__()

    def __exit__(self, *error):
        self._restore()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        got = func(*args, **kwargs or {})
        made = [part for part in tree_leaves(got) if isinstance(part, torch.Tensor)]
        at = {part.untyped_storage().data_ptr() for part in given}
        self.found += [str(func) for part in made if part.untyped_storage().data_ptr() not in at]
        return got


def said(call) -> str:
    """The message of the error that a call raises."""
    try:
        call()
    except (CheckpointError, InputError, UnsupportedError) as error:
        return str(error)
    return ""


def run_engines(folder: str, file: str) -> None:
    import os

    from bench.gpu_models import pretend_gpu
    from sparsebert.engine import costs, cuda, cuda_costs, cuda_forms

    prepare_interpreter()
    pretend_gpu()
    cuda.MOST_TOKENS = 64
    load = partial(Engine.load, device="cuda", cached=False)
    found = {}
    for kind in MODELS:
        for dtype in LOGITS_TOLERANCE if kind == "bert" else ("fp32",):
            loaded = load(f"{folder}/{kind}", dtype=dtype)
            found[f"{kind}/{dtype}"] = loaded.logits(TEXTS, truncate=True).tolist()
            if (kind, dtype) == ("bert", "fp32"):
                found["explain"] = loaded.explain()
                told, seconds = set(), cuda_costs.seconds

                def timed(weights, shape, tokens, dtype, device, told=told):
                    told.add((str(device), tokens))
                    assert dtype == torch.float32 and len(next(iter(weights.values()))[0]) == shape[0]
                    return dict.fromkeys(weights, 1.0)

                cuda_costs.seconds = timed
                rows = loaded.explain(measure=True)
                cuda_costs.seconds = seconds
                found["explain/timed"] = [sorted(told), [row["share_of_peak"] for row in rows]]
                found["explain/gflops"] = [
                    [row["gflops"], 2e-9 * row["density"] * np.prod(row["shape"]) * 4096] for row in rows
                ]
                long = [[2, *range(4, 36), 3], [2, 5, 3], [2, *range(7, 40), 3]]
                found["cut"] = loaded.forward(long, [[0] * len(row) for row in long]).tolist()
                found["cut/alone"] = [loaded.forward([row], [[0] * len(row)]).tolist()[0] for row in long]
                torch.backends.cuda.matmul.fp32_precision, before = "tf32", torch.backends.cuda.matmul.fp32_precision
                found["tf32"] = said(lambda loaded=loaded: loaded.logits(["ok"]))
                torch.backends.cuda.matmul.fp32_precision = before
                found["none"] = loaded.logits([]).tolist()
                keys: list[tuple[int, int]] = []
                allocations = Allocations()

                def replay(key, work, keys=keys, allocations=allocations):
                    keys.append(key)
                    with allocations:
                        work()

                loaded._device._graphs = SimpleNamespace(replay=replay)
                found["graphs"] = loaded.logits(TEXTS[1:3], truncate=True).tolist()
                found["graphs/allocated"] = allocations.found
                found["graphs/keys"], loaded._device._graphs = keys, None
                found["too long"] = said(lambda loaded=loaded: loaded.logits(["ok", "long " * 99]))
                found["bad id"] = said(lambda loaded=loaded: loaded.forward([[10**6]], [[0]]))
                found["pickled"] = loaded.__reduce__()[0].keywords
                with loaded._device._queue.turn():
                    found["handler"] = said(lambda loaded=loaded: loaded.logits(["ok"]))
                os.getpid, getpid = lambda: 1, os.getpid
                found["fork"] = said(lambda loaded=loaded: loaded.logits(["ok"]))
                os.getpid = getpid

    model = f"{folder}/bert"
    for declared in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float16"}, {}):
        facts = SimpleNamespace(encoder_tensors=list)
        plan = cuda.CudaEngine._plan(SimpleNamespace(config=declared, facts=facts), {"dtype": "auto"}, None)
        found.setdefault("auto", []).append(plan[0])
    invariant = load(model, batch_invariant=True)
    found["explain/invariant"] = invariant.explain()
    found["invariant"] = invariant.logits(TEXTS, truncate=True).tolist()
    found["invariant/alone"] = [invariant.logits([text], truncate=True).tolist()[0] for text in TEXTS]

    ns = dict.fromkeys(cuda_forms.FORMS, (9.0,) * len(cuda_costs.TOKENS))
    ns |= {"dense": (1.0, 8.0, 8.0, 8.0), "groups16": (8.0, 8.0, 8.0, 8.0), "bitmask": (0.5, 0.0, 0.0, 0.0)}
    lines = {form: [(0.0, per_entry) for per_entry in by] for form, by in ns.items()}
    costs.store({cuda_costs._key("interpreter", "fp32"): lines})
    measured = load(model)
    found["explain/measured"] = measured.explain()
    found["measured"] = measured.logits(TEXTS, truncate=True).tolist()

    normed, add_norm = [], cuda.add_norm

    def noted(*given):
        normed.append((given[0].shape[1], int(given[4])))
        return add_norm(*given)

    cuda.add_norm = noted
    measured.logits(TEXTS[1:3], truncate=True)
    cuda.add_norm = add_norm
    found["normed"] = normed

    right = cuda.attention
    cuda.attention = lambda *given, **options: right(*given, **options).mul_(1.05)
    found["wrong"] = said(lambda: load(model))
    Path(file).write_text(json.dumps(found))


def compile_all(file: str) -> None:
    from sparsebert.kernels import sparse_encoder as kernels

    binary = Path(file).with_suffix(".cubin")
    whole = ("first_ptr", "stop_ptr", "tokens_ptr", "ids_ptr", "types_ptr")
    usage = {}
    for dtype in DTYPES:
        own = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]

        def types(kernel, own=own) -> dict[str, str]:
            floats = {
                "positions_ptr": "*fp32",
                "weight_ptr": "*fp32",
                "bias_ptr": "*fp32",
                "scale": "fp32",
                "eps": "fp32",
            }
            floats |= dict.fromkeys(whole, "*i32")
            return {name: floats.get(name, own if name.endswith("ptr") else "i32") for name in kernel.arg_names}

        attends = {"64": (64, False), "64/exact": (64, True), "128": (128, False)}
        plans = {
            f"attend/{name}": kernels._attention_plan(size, getattr(torch, dtype)) | {"EXACT": exact}
            for name, (size, exact) in attends.items()
        }
        plans |= {"add_norm/768": kernels._norm_plan(768), "embed/1024": kernels._norm_plan(1024)}
        for name, plan in plans.items():
            kernel = getattr(kernels, "_" + name.partition("/")[0])
            options = {option: plan.pop(option) for option in ("num_warps", "num_stages") if option in plan}
            usage[f"{name}/{dtype}"] = usage_on_sm_90(kernel, types(kernel), plan, options, binary)
    Path(file).write_text(json.dumps(usage))


if __name__ == "__main__":
    {"interpret": interpret, "engines": run_engines, "compile": compile_all}[sys.argv[1]](*sys.argv[2:])
