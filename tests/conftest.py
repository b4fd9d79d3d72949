"""Shared by all tests: no network, fresh memory full of NaN, and one way to require an instruction set or a device."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
# Likewise before torch: test models are small; a second thread would only wait, on a busy machine for minutes.
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsebert import environment, errors
from sparsebert.ops import _dispatch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `bench`, which is not installed


# The files that take longest. If one of them began last, all workers but one would wait for it.
LONGEST = (
    "test_knowledge", "test_build", "test_training", "test_on_gpu", "test_labels", "test_cli", "test_pruning",
    "test_srnets", "test_engine", "test_subnets", "test_adaptive", "test_max_length", "test_gpu_report",
    "test_attack_runs",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)  # a run by hand needs no pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: one per core this process may use, if each has 2 GiB (after many files a worker holds 1.5,
    its subprocesses 0.5); at most 8, since more would only wait for the longest file.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # the limit of a container, in bytes or "max"
    if limit.exists() and limit.read_text().strip().isdecimal():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(_dispatch.cores(), memory // 2**31, 8))


def require(needed: str, reason: str) -> None:
    """Skips the test because `needed` is missing: an instruction set, browser, cuda, nvcc, triton, onnx, objdump, g++,
    sanitizers, docs, or data (the local data sets). Fails it if SPARSEBERT_REQUIRE lists `needed`.
    """
    if needed in os.environ.get("SPARSEBERT_REQUIRE", "").split(","):
        pytest.fail(f"SPARSEBERT_REQUIRE lists {needed}, but {reason}")
    pytest.skip(f"{needed}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of one file together, in whatever order they are named (tests/mutants.py names the fastest
    first), so that their shared fixtures are made once. With several workers the longest files begin.
    """
    place = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    if "PYTEST_XDIST_WORKER" in os.environ:
        place |= {path: LONGEST.index(path.stem) - len(LONGEST) for path in place if path.stem in LONGEST}
    items.sort(key=lambda item: place[item.path])


local_data = pytest.mark.usefixtures("data_at_hand")  # marks a test that reads the real data sets


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small classifier with random weights, to train from."""
    from models import saved

    return saved(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small encoder with random weights and no head."""
    import models

    place = tmp_path_factory.mktemp("encoder") / "tiny"
    models.classifier().base_model.save_pretrained(place)
    models.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tuned(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a short fine-tuning."""
    from sparsebert.config import TrainConfig
    from sparsebert.training import train

    output = tmp_path_factory.mktemp("tuned") / "m"
    train(start, "mr", output, TrainConfig(n=64, batch_size=8, epochs=1, precision="fp32"))
    return output


@pytest.fixture
def data_at_hand() -> None:
    if environment.data_dir() is None:
        require("data", "SPARSEBERT_DATA is not set")


@pytest.fixture(params=environment.FLOAT32_ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each float32 instruction set. The test skips (or fails) with the reason for those that this machine lacks."""
    return _supported(request)


@pytest.fixture(params=["scalar", *environment.BF16_ISAS])
def tile_isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of bf16 tiles, likewise."""
    return _supported(request)


@pytest.fixture(params=environment.INT8_ISAS)
def int8_isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that multiplies int8, likewise."""
    return _supported(request)


def _supported(request: pytest.FixtureRequest) -> str:
    if request.param not in _dispatch.supported_isas():
        require(request.param, _dispatch.why_off()[request.param])
    return request.param


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the tests a cache apart from the user's; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def errors_say_what_is_wrong_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which an error of the package is raised without a rule or without a fix."""
    made = errors.SparsebertError.__init__

    def checked(self, problem: str, *, fix: str) -> None:
        assert isinstance(problem, str) and problem.strip(), "an error names the rule and the value"
        assert isinstance(fix, str) and fix.strip(), "an error says what to do next"
        made(self, problem, fix=fix)

    monkeypatch.setattr(errors.SparsebertError, "__init__", checked)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that reading it too early shows: numpy's and torch's empty, the core's memory.

    torch has a switch for this, but it comes with use_deterministic_algorithms, which refuses or slows ordinary
    training.
    """
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, _filled_numpy(getattr(np, name)))
    torch = sys.modules.get("torch")
    if torch is not None:
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _filled_torch(getattr(torch, name)))
    core = _dispatch.core()
    core.poison_scratch(True)
    yield
    core.poison_scratch(False)


def _filled_numpy(make):
    def filled(*args, **kwargs):
        array = make(*args, **kwargs)
        if isinstance(array, np.ndarray) and array.dtype.kind in "fc":
            array.fill(np.nan)
        return array

    return filled


def _filled_torch(make):
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        # A meta tensor has no memory and a sparse one no fresh values; detached, as a leaf may not be written in place.
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.is_sparse:
            tensor.detach().fill_(float("nan"))
        return tensor

    return filled
