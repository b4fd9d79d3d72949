"""An engine in a process of its own: the same logits, and an end that is told, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import until
from models import saved

from sparsebert import Engine
from sparsebert.errors import CheckpointError, InputError
from sparsebert.serving.process import EngineProcess, Gone

TEXTS = ["a gripping film", ("it rained", "it was wet"), "no " * 60, "so so"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def engine(model):
    process = EngineProcess(model, threads=1)
    yield process
    process.close()


def test_it_gives_the_logits_of_the_engine(model, engine):
    here = Engine.load(model, threads=1)
    ids, types, _ = here.encode(TEXTS)
    assert np.array_equal(engine.forward(ids, types), here.forward(ids, types))
    assert engine.forward(ids[:1], types[:1]).shape == (1, len(here.labels))
    assert engine.facts["labels"] == here.labels and engine.facts["truncates_at"] == here.truncates_at
    assert engine.facts["problem"] == here.problem.name and engine.alive


def test_threads_ask_one_after_another(model, engine):
    here = Engine.load(model, threads=1)
    asked = [here.encode([f"film number {i}"] * (1 + i % 3)) for i in range(12)]
    found: dict[int, np.ndarray] = {}

    def ask(i: int) -> None:
        found[i] = engine.forward(*asked[i][:2])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], here.forward(*asked[i][:2])) for i in range(12))


def test_it_brings_no_torch(engine):
    assert "libtorch" not in Path(f"/proc/{engine.pid}/maps").read_text()


def test_what_the_engine_refuses_is_refused_here(model, engine, tmp_path):
    with pytest.raises(InputError, match="type_ids must have as many tokens as ids"):
        engine.forward([[1, 2]], [[0]])
    with pytest.raises(InputError, match="ids must be at least 0 and below"):
        engine.forward([[10**6]], [[0]])
    assert engine.alive
    damaged = saved(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged/model\.safetensors"):
        EngineProcess(damaged)


def test_a_killed_process_is_told_at_once_and_another_one_answers(model, engine):
    ids, types, _ = Engine.load(model).encode(TEXTS)
    wanted = engine.forward(ids, types)
    os.kill(engine.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(Gone, match="has ended"):
        engine.forward(ids, types)
    with pytest.raises(Gone, match="has ended"):
        engine.forward(ids, types)
    assert time.monotonic() - start < 2 and not engine.alive
    again = EngineProcess(model, threads=1)
    assert np.array_equal(again.forward(ids, types), wanted)
    again.close()


def test_a_process_that_hangs_is_ended(model, engine):
    ids, types, _ = Engine.load(model).encode(TEXTS)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(Gone, match=r"did not answer for 0\.5 s"):
        engine.forward(ids, types, timeout=0.5)
    engine._process.join(5)
    assert not engine.alive


def test_it_ends_with_the_server_that_was_killed(model):
    code = (
        "import sys, time; from sparsebert.serving.process import EngineProcess\n"
        "if __name__ == '__main__':\n"
        "    print(EngineProcess(sys.argv[1]).pid, flush=True); time.sleep(60)\n"
    )
    script = model.parent / "server.py"
    script.write_text(code)
    server = subprocess.Popen([sys.executable, script, model], stdout=subprocess.PIPE, text=True)
    pid = int(server.stdout.readline())
    server.kill()
    server.wait()
    stat = Path(f"/proc/{pid}/stat")
    until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", 20.0)
