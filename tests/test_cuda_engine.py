"""The engine on a GPU without one: its forms and their costs, what it refuses, and what it asks of torch.cuda, which is
faked. What its kernels compute is in test_sparse_encoder_triton.py and test_sparse_matmul_triton.py.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import require
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from triton_runs import prepare_interpreter, run_here

pytest.importorskip("triton", reason="triton is not installed")

from sparsebert.engine import Engine, costs, cuda, cuda_costs, cuda_graphs
from sparsebert.engine.cuda_forms import FORMS, chosen, grouped, hint, places, vnm_of
from sparsebert.errors import InputError, SparsebertWarning, UnsupportedError
from sparsebert.kernels import cuda_core
from sparsebert.patterns import VNM

CPU, KINDS = torch.device("cpu"), len(cuda_costs.TOKENS)
GPU = torch.device("cuda", 1)


# --- the machine ---


def a_gpu(monkeypatch, **facts: object) -> None:
    """Makes torch say that it has GPUs with these facts, which are answers of torch.cuda."""
    answers = {"current_device": 0, "get_device_capability": (9, 0), "init": None}
    answers |= {"get_device_name": "H200", "mem_get_info": (10**10, 10**11), "device_count": 2}
    answers |= {"memory_reserved": 0, "memory_allocated": 0} | facts
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)


def no_start(reason: str):
    """A fake of torch.cuda.init, which fails."""

    def init():
        raise RuntimeError(reason)

    return init


def current_gpu(monkeypatch) -> list[int]:
    """Makes torch keep the number of the current GPU here."""
    now = [0]

    @contextmanager
    def device(index):
        before, now[0] = now[0], index
        try:
            yield
        finally:
            now[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    return now


def test_a_machine_without_a_gpu_that_fits_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedError, match="needs a torch that is built for CUDA"):
        Engine.load("nowhere", device="cuda")
    for name, capability in (("Tesla T4", (7, 5)), ("Tesla V100", (7, 0))):
        a_gpu(monkeypatch, get_device_capability=capability, get_device_name=name)
        said = rf"compute capability 8\.0 or above, {name} has {capability[0]}\.{capability[1]}"
        with pytest.raises(UnsupportedError, match=said):
            Engine.load("nowhere", device="cuda")


REASONS = [
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
    "Found no NVIDIA driver on your system.",
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' method",
]


@pytest.mark.parametrize("reason", REASONS)
def test_why_cuda_cannot_start_is_told_in_one_line(monkeypatch, reason):
    a_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", no_start(f"{reason}\nand more lines"))
    with pytest.raises(UnsupportedError) as error:
        Engine.load("nowhere", device="cuda")
    assert f"torch for CUDA 13.0 says: {reason}" in str(error.value) and "more lines" not in str(error.value)
    assert cuda.forms_here() == f"off: {error.value}"


def test_the_gpu_that_is_named_is_used(monkeypatch):
    a_gpu(monkeypatch)
    now = current_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    with pytest.raises(UnsupportedError, match="GPU 1 has 7"):
        Engine.load("nowhere", device="cuda:1")
    used = []
    monkeypatch.setattr(Engine, "_read", lambda *given: used.append(cuda.require_device()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("cuda", "cuda:0", "cuda:1"):
        cuda.CudaEngine._read("nowhere", {"device": name})
    assert [device.index for device in used] == [0, 0, 1] and now == [0]
    with pytest.raises(InputError, match="one of the 2 GPUs that torch finds, cuda:0 to cuda:1, got cuda:2"):
        Engine.load("nowhere", device="cuda:2")


def test_too_little_memory_is_refused_before_anything_is_read(monkeypatch):
    a_gpu(monkeypatch, mem_get_info=(500_000_000, 10**9), memory_reserved=30_000_000, memory_allocated=20_000_000)
    device = torch.device("cuda", 0)
    cuda.require_memory(510_000_000 - cuda.SPARE, device)
    with pytest.raises(UnsupportedError, match=r"needs 510 MB on the GPU, 510 MB are free on H200"):
        cuda.require_memory(510_000_001 - cuda.SPARE, device)
    # 100 million weights take 400 MB in float32.
    files = SimpleNamespace(config={}, facts=SimpleNamespace(encoder_tensors=lambda: [("w", (10_000, 10_000))]))
    with pytest.raises(UnsupportedError, match=r"needs 668 MB on the GPU"):
        cuda.CudaEngine._plan(files, {"dtype": "fp32"}, None)
    assert cuda.CudaEngine._plan(files, {"dtype": "bf16"}, None)[0] == "bf16"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_running_out_of_memory_is_one_line_and_leaves_nothing(kind):
    class Memory:
        pass

    held = []

    def work():
        memory = Memory()
        held.append(weakref.ref(memory))
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines")

    with pytest.raises(UnsupportedError) as error, cuda._memory_told("a batch of 64 tokens"):
        work()
    assert str(error.value).startswith(
        "the GPU has too little memory for a batch of 64 tokens: CUDA out of memory. Tried to allocate 2.00 GiB.;"
    )
    gc.collect()
    assert held[0]() is None
    with pytest.raises(UnsupportedError, match="for a batch: CUDA out of memory"), cuda._memory_told("a batch"):
        try:
            raise kind("CUDA out of memory.")
        except kind as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
    with pytest.raises(kind, match="illegal"), cuda._memory_told("a batch"):
        raise kind("an illegal memory access was encountered")


def test_one_gpu_of_each_name_is_measured(monkeypatch):
    a_gpu(monkeypatch, device_count=4)
    now = current_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index == 1 else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["H200", "V100", "H200", "A100"][device.index])
    measured, steps = [], []

    def measure(forms, gpu, device, progress):
        measured.append((gpu, device.index, now[0]))
        progress(4, 4)

    monkeypatch.setattr(cuda_costs, "measure", measure)
    cuda.measure(lambda done, total: steps.append((done, total)))
    assert measured == [("H200", 0, 0), ("A100", 3, 3)] and steps == [(4, 8), (8, 8)]


def test_an_encoder_that_does_not_fit_leaves_nothing_of_itself(monkeypatch):
    class Memory:
        pass

    held = []

    def fill(self, *given):
        self.layers = Memory()
        held.append(weakref.ref(self.layers))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    linear = SimpleNamespace(weight=SimpleNamespace(n_in=8, n_out=8))
    words = np.zeros((3, 8), np.float32)
    encoder = SimpleNamespace(
        max_length=40, pooler=linear, projection=None, words=words, positions=words, layers=(), linears=()
    )
    monkeypatch.setattr(cuda.DeviceEncoder, "_fill", fill)
    with pytest.raises(UnsupportedError, match="too little memory for the model") as error:
        cuda.DeviceEncoder(encoder, torch.float32, CPU, {}, invariant=False)
    gc.collect()
    assert held[0]() is None and error.value is not None


# --- graphs ---


def test_one_queue_serves_all_engines_of_a_device_one_call_at_a_time():
    queue = cuda_graphs.queue(CPU)
    assert cuda_graphs.queue(torch.device("cpu")) is queue
    inside, most = [0], [0]

    def call():
        for _ in range(50):
            with queue.turn():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    with queue.turn(), pytest.raises(UnsupportedError, match="a signal handler calls one"), queue.turn():
        pass
    with queue.turn():  # the refused call has left the queue free
        pass


def capturing() -> bool:
    """Whether another thread would have to wait with a capture."""
    found = []

    def attempt():
        found.append(cuda_graphs._CAPTURE.acquire(blocking=False))
        if found[0]:
            cuda_graphs._CAPTURE.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return not found[0]


class Recorded:
    """A fake of what torch.cuda captures with."""

    def __init__(self, monkeypatch):
        self.stream, self.log = SimpleNamespace(synchronize=lambda: None), []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *given: self.stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capturing()
        self.log.append(("capture", pool, stream is self.stream, capture_error_mode))
        yield


def test_a_graph_is_captured_once_alone_and_on_the_queues_stream(monkeypatch):
    recorded, graphs = Recorded(monkeypatch), cuda_graphs.Graphs()
    capture = ("capture", (0, 1), True, "thread_local")
    graphs.replay((32, 0), lambda: recorded.log.append("work"))
    assert recorded.log == ["work", capture, "work", "replay"]
    graphs.replay((32, 0), lambda: recorded.log.append("work"))
    graphs.replay((48, 0), lambda: recorded.log.append("other"))
    assert recorded.log[4:] == ["replay", "other", capture, "other", "replay"]
    assert not capturing()


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch):
    recorded, graphs = Recorded(monkeypatch), cuda_graphs.Graphs()

    def work():
        if recorded.log:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.replay((32, 0), work)
    assert graphs._graphs == {} and not capturing()


# --- costs ---


def lines(**per_entry: float) -> cuda_costs.Costs:
    """A table of these costs per entry, whatever the number of tokens."""
    return {form: ((0.0, cost),) * KINDS for form, cost in per_entry.items()}


def test_costs_are_kept_for_one_gpu_and_dtype_and_a_damaged_file_counts_for_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    assert cuda_costs.costs("a GPU", "fp32") == {}
    measured = lines(dense=1.0, groups32=0.5) | {"bitmask": ((7.0, 0.5), None, None, None)}
    costs.store({cuda_costs._key("a GPU", "fp32"): measured})
    assert cuda_costs.costs("a GPU", "fp32") == measured
    assert cuda_costs.costs("a GPU", "bf16") == cuda_costs.costs("another", "fp32") == {}
    for bad in ([], 3, {"dense": 1}, {"dense": [[0, 1]]}, {"dense": [[0, -1]] * 4}, {"dense": [[0]] * 4},
                {"dense": [["a", "b"]] * 4}, {"dense": [[0, float("nan")]] * 4}):  # fmt: skip
        costs.store({cuda_costs._key("a GPU", "fp32"): bad})
        assert cuda_costs.costs("a GPU", "fp32") == {}


def test_a_cost_is_a_line_through_two_sizes():
    assert cuda_costs._line((100, 3000.0), (1100, 4000.0)) == (2900.0, 1.0)
    assert cuda_costs._line((100, 3000.0), (1100, 2000.0)) == (3000.0, 0.0)  # noise
    assert cuda_costs._line((100, 100.0), (200, 300.0)) == (0.0, 2.0)
    table = {"dense": ((2900.0, 1.0), None, None, None)}
    assert cuda_costs.cost(table, "dense", 0, 50) == 2950.0
    assert cuda_costs.cost(table, "dense", 1, 50) is None and cuda_costs.cost(table, "fused", 0, 50) is None


def test_64_tokens_are_a_short_batch():
    assert [cuda_costs.kind_of(tokens) for tokens in (1, 64, 65, 256, 257, 1024, 1025, 9999)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_each_measured_call_has_memory_of_its_own_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(cuda_costs, "_cache_bytes", lambda device: 100_000)
    weight = FORMS["groups32"].pack(FORMS["groups32"].sample(64, 64, np.random.default_rng(0)), torch.float32, CPU)
    calls = cuda_costs._rotated(weight, weight.values.numel(), (64, 64), 8, torch.float32, CPU)
    tensors = [
        tensor
        for call in calls
        for tensor in (call.args[0], call.args[1].values, call.args[1].cols, call.keywords["out"])
    ]
    assert len(calls) >= cuda_costs.CALLS
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 4 * len(calls)
    assert 200_000 <= sum(tensor.nbytes for tensor in tensors)
    assert torch.equal(calls[-1].args[1].values, weight.values)
    # 20 kB for each of these: ten of them, twice.
    dense = cuda_costs._rotated(torch.ones(64, 64), 4096, (64, 64), 8, torch.float32, CPU)
    assert len(dense) == cuda_costs.CALLS == 20 and len({call.args[1].data_ptr() for call in dense}) == 10


def test_a_weight_of_cusparselt_is_copied_by_a_torch_that_cannot_clone_it(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a prototype
        weight = SparseSemiStructuredTensorCUSPARSELT(torch.Size((16, 16)), torch.rand(144), *(None,) * 4)
    monkeypatch.delitem(type(weight).SPARSE_DISPATCH, torch.ops.aten.clone, raising=False)
    other = cuda_costs.copied(weight)
    assert type(other) is type(weight) and other.shape == weight.shape
    assert torch.equal(other.packed, weight.packed) and other.packed.data_ptr() != weight.packed.data_ptr()


def test_measuring_stores_a_line_for_each_form_that_is_here(monkeypatch, tmp_path):
    Recorded(monkeypatch)
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_costs, "sparse_matmul", lambda *given, **options: None)
    monkeypatch.setattr(cuda_costs, "fault", lambda form, *given: "it is slow" if form.name == "groups64" else None)
    for name, value in {"SIZES": (64, 128), "CALLS": 1, "ROUNDS": 2}.items():
        monkeypatch.setattr(cuda_costs, name, value)
    monkeypatch.setattr(cuda, "require_device", lambda: CPU)
    steps = []
    with pytest.warns(SparsebertWarning, match="groups64 in (fp32|bf16) is left out on interpreter: it is slow"):
        cuda.measure(lambda done, total: steps.append((done, total)))
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for dtype in ("fp32", "bf16"):
        found = cuda_costs.costs("interpreter", dtype)
        assert found.keys() == {"dense", "fused", "groups16", "groups32", "bitmask"}
        assert [line is None for line in found["bitmask"]] == [False, True, True, True]
        assert all(None not in by for form, by in found.items() if form != "bitmask")
    monkeypatch.setattr(cuda_costs, "sparse_matmul", lambda *given, **options: fail())

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cuda_costs, "fault", lambda *given: None)
    with pytest.raises(UnsupportedError, match="too little memory for measuring the forms"):
        cuda.measure()
    assert cuda_costs.costs("interpreter", "bf16") == found


def test_a_form_that_is_wrong_or_does_not_run_is_named(monkeypatch):
    recorded = Recorded(monkeypatch)
    dense_fault = partial(cuda_costs.fault, FORMS["dense"], device=CPU)

    def product(x, weight, *, out, factor=1.0):
        out.copy_(factor * (weight.float() @ x.float()))

    for name in ("fp32", "bf16"):
        monkeypatch.setattr(cuda_costs, "sparse_matmul", product)
        assert dense_fault(name) is None and recorded.log[-1] == "replay"
        monkeypatch.setattr(cuda_costs, "sparse_matmul", partial(product, factor=1.02))
        assert re.fullmatch(r"its result is off by 2\.\de-02 of the largest, .* is allowed", dense_fault(name))
        monkeypatch.setattr(cuda_costs, "sparse_matmul", partial(product, factor=torch.nan))
        assert dense_fault(name).startswith("its result is off by nan")

    def refuse(error):
        def call(x, weight, *, out):
            raise error

        monkeypatch.setattr(cuda_costs, "sparse_matmul", call)
        return dense_fault("fp32")

    assert refuse(UnsupportedError("no kernel image", fix="use another form")) == "no kernel image; use another form"
    said = "CUDA error: operation not permitted when stream is capturing"
    assert refuse(RuntimeError(f"{said}\nmore")) == f"it does not run in a CUDA graph: {said}"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        refuse(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_doctor_says_which_forms_are_here_and_why_others_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    a_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "sparsebert._cuda", None)
    monkeypatch.delattr("sparsebert._cuda", raising=False)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    costs.store({cuda_costs._key("H200", "bf16"): lines(dense=1.0, groups32=0.5)})
    found = cuda.forms_here()
    assert found.keys() == FORMS.keys()
    assert found["dense"].startswith("measured in bf16; any weight")
    assert found["fused"].startswith("not measured: sparsebert doctor --tune; any weight")
    assert found["vnm64"].startswith("off: the CUDA kernels sparsebert._cuda cannot be imported")
    assert found["two_four"] == "off: this torch is built without cuSPARSELt"


# --- forms ---


def test_a_form_that_was_not_measured_is_not_chosen():
    support = FORMS["groups32"].sample(768, 768, np.random.default_rng(0)) != 0
    for table in ({}, lines(groups32=0.001), {"dense": (None,) * KINDS} | lines(groups32=0.001)):
        forms, why = chosen(support, torch.bfloat16, CPU, table, invariant=False)
        assert set(forms) == {"dense"} and set(why) == {"no form is measured on this GPU: sparsebert doctor --tune"}


def test_which_form_may_pay_is_told_by_bytes():
    support = FORMS["groups32"].sample(768, 768, np.random.default_rng(0)) != 0
    told = hint(support, torch.bfloat16, CPU, invariant=False)
    assert told.startswith(" (groups32 may pay in short batches: by bytes 1.2 us, fused 2.3")
    assert hint(np.ones((768, 768), bool), torch.bfloat16, CPU, invariant=False) == ""


def test_a_form_is_the_cheapest_by_its_entries_and_cheaper_than_dense():
    table = lines(dense=1.0, fused=1.5, groups16=3.0, groups32=2.0, groups64=1.6)
    for height, kept, form in ((64, 0.9, "dense"), (64, 0.3, "groups64"), (32, 0.3, "groups32"), (16, 0.1, "groups16")):
        support = np.repeat(np.random.default_rng(0).random((4, 200)) < kept, height, axis=0)
        support = support[np.random.default_rng(1).permutation(len(support))]
        forms, why = chosen(support, torch.float32, CPU, table, invariant=False)
        assert set(forms) == {form}
        assert "us by the cost table, " + ("groups" if form == "dense" else "dense") in why[0]
    # As the table is a line through two sizes, a form must be cheaper by a margin.
    support = np.ones((64, 100), bool)
    assert set(chosen(support, torch.float32, CPU, lines(dense=1.0, groups64=0.95), invariant=False)[0]) == {"dense"}
    assert set(chosen(support, torch.float32, CPU, lines(dense=1.0, groups64=0.86), invariant=False)[0]) == {"groups64"}


def test_an_invariant_linear_has_one_form_that_does_not_depend_on_other_tokens():
    support, free = np.ones((64, 64), bool), lines(**dict.fromkeys(FORMS, 0.001)) | lines(fused=1.0)
    assert set(chosen(np.ones((64, 9), bool), torch.float32, CPU, lines(dense=0.1), invariant=True)[0]) == {"fused"}
    forms, _ = chosen(support, torch.float32, CPU, free | lines(dense=0.0, bitmask=0.0), invariant=True)
    assert len(set(forms)) == 1 and forms[0].startswith("groups")
    assert {form.name for form in FORMS.values() if not form.invariant} == {"dense", "two_four"}


def test_a_bitmask_is_for_short_batches():
    support = FORMS["bitmask"].sample(256, 256, np.random.default_rng(0)) != 0
    forms, _ = chosen(support, torch.float32, CPU, lines(dense=1.0, bitmask=1.0), invariant=False)
    assert forms == ("bitmask", "dense", "dense", "dense")
    # A tile costs as much with fewer values than were measured.
    assert FORMS["bitmask"].entries(np.zeros((64, 64), bool)) == FORMS["bitmask"].entries(np.eye(64, dtype=bool))


def test_a_form_that_is_not_here_or_not_of_the_dtype_is_not_chosen(monkeypatch):
    support = FORMS["two_four"].sample(64, 64, np.random.default_rng(0)) != 0
    table = lines(dense=1.0, two_four=0.1)
    assert set(chosen(support, torch.bfloat16, CPU, table, invariant=False)[0]) == {"dense"}
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert set(chosen(support, torch.bfloat16, GPU, table, invariant=False)[0]) == {"two_four"}
    assert set(chosen(support, torch.float32, GPU, table, invariant=False)[0]) == {"dense"}
    support[0, :3] = True
    assert set(chosen(support, torch.bfloat16, GPU, table, invariant=False)[0]) == {"dense"}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_holds_its_sample(name):
    form = FORMS[name]
    weight = form.sample(256, 128, np.random.default_rng(0))
    assert weight.shape == (256, 128) and weight.dtype == np.float32 and weight.any()
    assert 0 < form.entries(weight != 0) <= 1.2 * weight.size
    assert form.holds and form.tolerance.keys() <= cuda_costs.DTYPES.keys()
    if name in ("two_four", "vnm32", "vnm64", "vnm128"):
        assert form.entries(np.ones((256, 128), bool)) is None
        assert form.entries(weight[:-1] != 0) is None
        assert form.missing(CPU) == "it runs on a GPU only"


@pytest.mark.parametrize(("v", "m", "shape"), [(32, 16, (96, 48)), (64, 8, (64, 64)), (128, 12, (256, 24))])
def test_the_pattern_of_a_support_is_the_one_with_the_fewest_columns(v, m, shape):
    rng = np.random.default_rng(0)
    support = np.zeros((shape[0] // v, v, shape[1] // m, m), bool)
    cols = rng.permuted(np.arange(m)[None, None].repeat(shape[0] // v, 0).repeat(shape[1] // m, 1), axis=2)[..., :4]
    for g, row, block in np.ndindex(support.shape[:3]):
        support[g, row, block, rng.choice(cols[g, block], 2, replace=False)] = True
    support = support.reshape(shape)
    assert vnm_of(support, v) == VNM(v, 2, m)
    assert vnm_of(support, 2 * shape[0]) is None
    assert vnm_of(np.zeros(shape, bool), v) == VNM(v, 2, shape[1])
    assert vnm_of(rng.random(shape) < 0.1, v) is None


def test_v_2_m_is_packed_as_the_kernel_reads_it():
    try:
        cuda_core()
    except UnsupportedError as error:
        require("nvcc", str(error))
    for name in ("vnm32", "vnm64", "vnm128"):
        form = FORMS[name]
        weight = form.sample(256, 768, np.random.default_rng(0))
        packed = form.pack(weight, torch.bfloat16, CPU)
        assert (packed.pattern, packed.n_out, packed.n_in) == (VNM(int(name[3:]), 2, 16), 256, 768)
        assert form.entries(weight != 0) == 2 * packed.values.numel() + 2 * packed.metadata.numel()


@pytest.fixture(scope="module")
def multiplied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """form/dtype/tokens -> the difference from the exact result, as a share of the largest, interpreted."""
    file = tmp_path_factory.mktemp("forms") / "errors.json"
    run_here(__file__, "multiply", file, TRITON_INTERPRET="1")
    return json.loads(Path(file).read_text())


@pytest.mark.parametrize("name", [form.name for form in FORMS.values() if form.missing(CPU) is None])
def test_a_form_multiplies_within_its_tolerance(multiplied, name):
    for dtype, tolerance in FORMS[name].tolerance.items():
        for tokens in SHAPES:
            # The interpreter rounds to bfloat16 towards zero, twice as far as a GPU.
            assert multiplied[f"{name}/{dtype}/{tokens}"] <= tolerance * (2 if dtype == "bf16" else 1)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_on_a_gpu_is_right_or_says_why_it_is_missing(name):
    if not torch.cuda.is_available():
        require("cuda", "torch sees no CUDA device")
    device, form = torch.device("cuda", torch.cuda.current_device()), FORMS[name]
    why = form.missing(device)
    if why is not None:
        pytest.skip(f"{name}: {why}")
    for dtype in form.tolerance:
        assert cuda_costs.fault(form, dtype, device) is None


SHAPES = (1, 33, 64)  # tokens


def multiply(file: str) -> None:
    from sparsebert.kernels.sparse_matmul import sparse_matmul

    prepare_interpreter()
    errors = {}
    for form in FORMS.values():
        for name in form.tolerance if form.missing(CPU) is None else ():
            for tokens in SHAPES:
                rng, dtype = np.random.default_rng(tokens), cuda_costs.DTYPES[name]
                weight = form.sample(70, 131, rng)
                x = torch.from_numpy(rng.standard_normal((131, tokens), np.float32)).to(dtype)
                got = sparse_matmul(x, form.pack(weight, dtype, CPU)).double()
                want = torch.from_numpy(weight).to(dtype).double() @ x.double()
                errors[f"{form.name}/{name}/{tokens}"] = float((got - want).abs().max() / max(1, want.abs().max()))
    Path(file).write_text(json.dumps(errors))


@pytest.mark.parametrize("height", [16, 32, 64])
@pytest.mark.parametrize(("rows", "kept"), [(1, 0.5), (24, 0.3), (32, 0.2), (100, 0.0), (13, 1.0)])
def test_groups_hold_every_weight_once(height, rows, kept):
    rng = np.random.default_rng(rows)
    mask = np.repeat(rng.random((3, 50)) < kept, rows, axis=0)[rng.permutation(3 * rows)]
    weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
    for whole in (False, True):
        made = grouped(weight, height, torch.float32, torch.device("cpu"), whole=whole)
        back = np.zeros_like(weight)
        for g, own in enumerate(made.rows.numpy()):
            begin, end = made.begin[g : g + 2].tolist()
            cols = np.arange(50) if whole else made.cols[begin:end].numpy()
            back[np.ix_(own[own >= 0], cols)] = made.values[begin:end].numpy().T[own >= 0]
        assert np.array_equal(back, weight)
        assert sorted(made.rows[made.rows >= 0].tolist()) == list(range(len(weight)))
    assert places(weight != 0, height) == grouped(weight, height, torch.float32, torch.device("cpu")).values.numel()


def test_a_batch_runs_in_the_next_size_and_long_ones_are_cut():
    sizes = cuda.buckets(8192)
    assert sizes[:5] == (32, 48, 64, 96, 128) and sizes[-1] == 8192
    assert all(size % 16 == 0 for size in sizes) and all(b <= 1.5 * a for a, b in pairwise(sizes))
    assert cuda.buckets(8193)[-1] > 8192
    assert list(cuda._cuts([], 10)) == []
    assert list(cuda._cuts([10, 1, 9, 5, 6], 10)) == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert list(cuda._cuts([1] * 11, 10)) == [(0, 5), (5, 10), (10, 11)]


if __name__ == "__main__":
    {"multiply": multiply}[sys.argv[1]](*sys.argv[2:])
