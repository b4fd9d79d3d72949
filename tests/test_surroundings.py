"""The process that an engine runs in: its user, folders, forks, signals, threads, end, and share of the CPUs."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle  # only tests use it, as `multiprocessing` pickles arguments
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from models import classifier, saved

from sparsebert import cli, environment, machine
from sparsebert.config import PruneConfig
from sparsebert.engine import Engine
from sparsebert.errors import InputError, OutputError
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
LONG = ["a gripping , quietly devastating film . " * 400] * 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = classifier(hidden_size=64, num_attention_heads=4, intermediate_size=256)
    prune(model, [], PruneConfig(method="magnitude", sparsity=0.8))
    return saved(tmp_path_factory.mktemp("surroundings") / "m", model)


@pytest.fixture(scope="module")
def loaded(directory):
    return Engine.load(directory, dtype="fp32", threads=2)


def homeless(monkeypatch) -> None:
    """No HOME, and a user id without a name, as on OpenShift and with `docker run -u 12345`."""
    for name in ("HOME", "XDG_CACHE_HOME", "SPARSEBERT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


def test_without_a_home_the_engine_warns_and_works(directory, loaded, monkeypatch, capsys):
    homeless(monkeypatch)
    assert environment.cache_dir() is None
    with pytest.warns(UserWarning, match=r"not kept in the user's cache: there is no HOME.*; set SPARSEBERT_CACHE"):
        assert np.array_equal(Engine.load(directory, dtype="fp32").logits(["a"]), loaded.logits(["a"]))
    assert machine.describe()["cache"].startswith("none: the user has no home")
    assert cli.main(["cache", "--json"]) == 0
    said = capsys.readouterr()
    assert '"folder": null' in said.out and said.err.startswith("warning: ") and "there is no HOME" in said.err
    assert cli.main(["doctor", "--tune"]) == 2
    assert (
        capsys.readouterr().err == "error: there is no home directory for the costs; set SPARSEBERT_CACHE to a folder\n"
    )
    with pytest.raises(OutputError, match="no home"):
        from sparsebert.engine.costs import measure

        measure()


@pytest.mark.parametrize("home", ["/dev/null", "/proc", ""])
def test_a_home_that_cannot_be_written_is_said_once_and_no_matter(directory, loaded, monkeypatch, home):
    homeless(monkeypatch)
    monkeypatch.setenv("HOME", home or "/dev/null/x")
    with pytest.warns(UserWarning, match="set SPARSEBERT_CACHE") as said:
        assert np.array_equal(Engine.load(directory, dtype="fp32").logits(["a"]), loaded.logits(["a"]))
    assert len(said) == 1


AS_NOBODY = """
import os, sys, warnings
import sparsebert.engine.engine, sparsebert.cli.commands
from sparsebert.engine import Engine

os.setgroups([]); os.setgid(12345); os.setuid(12345)
print(Engine.load(sys.argv[1]).logits(["a text"]).shape)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_an_unknown_user_gets_a_warning_and_an_answer(directory):
    plain = {name: value for name, value in os.environ.items() if name not in ("HOME", "SPARSEBERT_CACHE")}

    def run(**environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", AS_NOBODY, str(model)]
        return subprocess.run(command, env=plain | environment, capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as name:  # others may not read pytest's folder
        model, cache = shutil.copytree(directory, f"{name}/m"), f"{name}/cache"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEBERT_CACHE", cache)
            Engine.load(model)
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        done = run()
        assert done.stdout == "(1, 2)\n" and done.stderr.count("set SPARSEBERT_CACHE") == 1, done.stderr
        done = run(SPARSEBERT_CACHE=cache)  # a readable one made by root is used without a warning
        assert done.stdout == "(1, 2)\n" and done.stderr == ""


@needs_fork
def test_a_forked_child_runs_what_its_parent_loaded(loaded):
    want = loaded.logits(["a text"] * 40)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(loaded.logits(["a text"] * 40)))
    child.start()
    got = queue.get(timeout=60)
    child.join(60)
    assert np.array_equal(got, want)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_forked_while_other_threads_are_inside_answer(loaded):
    want = loaded.logits(["a text"] * 40)
    stop = threading.Event()

    def busy(texts: list[str], length: int) -> None:
        while not stop.is_set():
            loaded.logits(texts, truncate=True, max_length=length)

    # One thread is mostly in the tokenizer, the other mostly in the core.
    threads = [threading.Thread(target=busy, args=args) for args in ((LONG, 16), (["a gripping film"] * 64, 512))]
    for thread in threads:
        thread.start()
    outcomes = []
    for i in range(20):
        time.sleep(0.003 * (i % 7))
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            os._exit(0 if np.array_equal(loaded.logits(["a text"] * 40), want) else 3)
        outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert outcomes == [0] * 20


def test_a_signal_handler_may_call_what_it_interrupts(loaded):
    want, got = loaded.logits(["ok"]), []
    before = signal.signal(signal.SIGALRM, lambda *_: got.append(loaded.logits(["ok"])))
    try:
        for i in range(30):
            signal.setitimer(signal.ITIMER_REAL, 1e-4 * (i % 10 + 1))
            loaded.logits(LONG, truncate=True, max_length=64)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert got and all(np.array_equal(row, want) for row in got)


ENDS = """
import sys, threading, time
from sparsebert.engine import Engine

engine = Engine.load(sys.argv[1], threads=2)
started = threading.Barrier(3)

def busy(texts):
    started.wait()
    while True:
        engine.logits(texts, truncate=True, max_length=32)

for texts in (["a gripping film"] * 64, ["a gripping film " * 2000] * 4):
    threading.Thread(target=busy, args=(texts,), daemon=True).start()
started.wait()
time.sleep(0.1)
"""


def test_a_process_ends_well_while_daemon_threads_are_inside(directory):
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", ENDS, str(directory)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_pickled_engine_is_its_directory_and_settings(directory, loaded):
    engine = Engine.load(directory, dtype="bf16", threads=1, batch_invariant=True, cached=False)
    data = pickle.dumps(engine)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again._settings == engine._settings and again.dtype == "bf16" and len(again._encoders) == 1
    assert np.array_equal(again.logits(["a text"]), engine.logits(["a text"]))
    assert np.array_equal(copy.deepcopy(loaded).logits(["a text"]), loaded.logits(["a text"]))


def test_an_engine_travels_to_a_worker_process(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the engine's path is absolute
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(loaded.logits, ["a text"]).result(120), loaded.logits(["a text"]))


def test_too_many_threads_are_refused(directory):
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        Engine.load(directory, threads=0)
    for bad in (100_000, 10**5000):
        with pytest.raises(InputError, match=r"threads must be at most \d+ on this machine, got"):
            Engine.load(directory, threads=bad)
    for bad in (True, 1.5, "2"):
        with pytest.raises(InputError, match="threads must be an integer"):
            Engine.load(directory, threads=bad)
    assert Engine.load(directory, threads=np.int64(2)).threads == 2


MANY = """
import re, numpy
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_matmul import Linear, pack

linear = Linear(pack(numpy.ones((600, 64), numpy.float32)))
x = numpy.ones((48 * 600, 64), numpy.float32)
for threads in (2, 500):
    _dispatch.core().sparse_matmul(x, linear.core, "scalar", threads)
    print(re.search(r"Threads:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_the_core_keeps_no_more_threads_than_asked_and_than_have_a_use():
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True, env=environment)
    few, many = map(int, done.stdout.split())
    assert few == 2 and many <= _dispatch.MAX_THREADS


BLOCKED = """
import os, signal, time, numpy
from sparsebert.ops.sparse_matmul import Linear, pack, sparse_matmul

sparse_matmul(numpy.ones((960, 64), numpy.float32), Linear(pack(numpy.ones((64, 64), numpy.float32))), threads=2)
(worker,) = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
for _ in range(1000):  # on a busy machine it may begin after the work is done; glibc blocks every signal until then
    status = dict(line.split(":\t") for line in open(f"/proc/self/task/{worker}/status"))
    blocked = int(status["SigBlk"], 16)
    if not blocked >> signal.SIGSEGV - 1 & 1:
        break
    time.sleep(0.01)
print([name for name in ("SIGSEGV", "SIGBUS", "SIGINT", "SIGTERM") if blocked >> getattr(signal, name) - 1 & 1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_worker_blocks_the_programs_signals_but_not_those_of_its_own_faults():
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "['SIGINT', 'SIGTERM']\n"


def grant(root: Path, files: dict[str, str], groups: str) -> float:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root.parent / "cgroup").write_text(groups)
    return _dispatch.granted(root.parent / "cgroup", root)


@pytest.mark.parametrize(
    ("files", "groups", "cpus"),
    [
        ({"a/cpu.max": "150000 100000\n"}, "0::/a\n", 1.5),
        ({"a/cpu.max": "max 100000\n"}, "0::/a\n", math.inf),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "max 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b\n", 3.0),
        ({"cpu.max": "200000 100000"}, "0::/of/the/host\n", 2.0),  # inside a container
        ({"cpu.max": "nonsense"}, "0::/\n", math.inf),
        ({}, "0::/a\n", math.inf),
        ({"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
         "4:cpu,cpuacct:/a\n1:name=systemd:/\n0::/\n", 2.5),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, "1:cpu:/of/the/host\n", 2.0),
        ({"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, "1:cpu:/a\n", math.inf),
        ({"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"}, "1:cpuset:/a\n", math.inf),
    ],
)  # fmt: skip
def test_control_groups_of_both_versions_limit_the_cpus(tmp_path, files, groups, cpus):
    root = tmp_path / "sys"
    root.mkdir()
    assert grant(root, files, groups) == cpus


def test_threads_are_as_many_as_affinity_and_control_groups_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for cpus, threads in ((math.inf, 8), (3.0, 3), (2.1, 3), (0.2, 1), (64.0, 8)):
        monkeypatch.setattr(_dispatch, "granted", lambda cpus=cpus: cpus)
        assert _dispatch.threads(None) == threads


def test_torchs_threads_sleep_when_they_wait_unless_the_user_says_otherwise(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that the values set below are undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    environment.calm_openmp(math.inf)
    assert os.environ["GOMP_SPINCOUNT"] == "0" and "OMP_NUM_THREADS" not in os.environ
    environment.calm_openmp(2.5)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    environment.calm_openmp(2.5)
    assert "GOMP_SPINCOUNT" not in os.environ and os.environ["OMP_NUM_THREADS"] == "7"


def test_the_command_line_sets_them_before_torch_is_there_but_where_torch_is_timed():
    code = (
        "import sys, os; from sparsebert import cli; from sparsebert.cli import commands; "
        "commands.app = lambda *a, **k: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules); "
        "cli.main(sys.argv[1:])"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    for command, said in (("prune", "0 False"), ("bench", "None False")):
        done = subprocess.run([sys.executable, "-c", code, command], env=plain, capture_output=True, text=True)
        assert done.stdout.strip() == said, done.stderr


def test_the_command_line_runs_in_any_thread(capsys):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.main, ["cache", "--json"]).result() == 0


def test_a_name_of_5000_characters_is_cut_in_the_message(capsys):
    assert cli.main(["eval", "x" * 5000, "--task", "mr"]) == 2
    assert cli.main(["x" * 5000]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) < 1100 and len(second) < 1100
