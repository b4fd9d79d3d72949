"""An engine in a process of its own: if it crashes or hangs, the server that asked it lives and begins another one."""

from __future__ import annotations

import json
import multiprocessing
import signal
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, errors
from sparsebert.engine import Engine
from sparsebert.errors import CheckpointError, SparsebertError, SparsebertWarning

HEAD = struct.Struct("<q")  # number of texts in a question
OK, REFUSED = b"+", b"-"  # first byte of an answer
START_SECONDS = 60.0
_LOOK = "look whether memory is short, and at what it printed"


class Gone(SparsebertError):
    """The process has ended, or was ended because it did not answer in time."""


Forward = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], np.ndarray]
Load = Callable[..., tuple[Forward, dict]]  # (directory, dtype, threads) -> what computes logits, and facts about it


def load_engine(directory: str, dtype: str, threads: int | None) -> tuple[Forward, dict]:
    """Our engine, and what `EngineProcess.facts` says of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SparsebertWarning)
        before = checkpoint.read(directory).content_sha256
        engine = Engine.load(directory, dtype=dtype, threads=threads)
        content = checkpoint.read(directory).content_sha256
    if content != before:
        raise CheckpointError(f"{directory} changed while it was loaded", fix="load it again when it rests")
    kernels = Counter(f"{row['form']}, {row['kernel']}" for row in engine.explain())
    return engine.forward, {
        "labels": engine.labels, "problem": engine.problem.name, "dtype": engine.dtype, "isa": engine.isa,
        "threads": engine.threads, "max_length": engine.encoder.max_length, "truncates_at": engine.truncates_at,
        "density": engine.density, "kernels": dict(kernels.most_common()), "content_sha256": content,
        "warnings": [str(each.message) for each in said if issubclass(each.category, SparsebertWarning)],
    }  # fmt: skip


class EngineProcess:
    """Loads a model directory in a new process, and asks it for logits. load: of a module, since it runs in there.

    facts: of the engine there: labels, problem, dtype, isa, threads, max_length (positions), truncates_at, density,
    kernels (linears by form and kernel, in batches of many tokens), warnings, content_sha256 (of weights, config and
    tokenizer).
    pid: of the process.

    Raises what `Engine.load` raises; Gone if the process ends before the engine is loaded.
    """

    def __init__(
        self, directory: str | Path, *, dtype: str = "auto", threads: int | None = None, load: Load = load_engine
    ):
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._pipe, theirs = context.Pipe()
        given = (theirs, load, str(directory), dtype, threads)
        self._process = context.Process(target=_answer, args=given, daemon=True, name="sparsebert-engine")
        self._process.start()
        theirs.close()  # so that a read of ours ends when the process does
        self._asking = threading.Lock()
        self.pid = self._process.pid
        self.facts: dict = json.loads(self._receive(START_SECONDS))

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def forward(
        self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], *, timeout: float | None = None
    ) -> np.ndarray:
        """`Engine.forward` in the process. One question is asked at a time; other threads wait. timeout: seconds after
        which the process is taken to hang, and is killed. Raises what `Engine.forward` raises, and Gone.
        """
        with self._asking:
            self.ask(ids, type_ids)
            return self.answer(timeout)

    def ask(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]) -> None:
        """The first half of `forward`, for a caller that has other things to do: asks, and does not wait."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = [np.fromiter(chain.from_iterable(rows), np.int32) for rows in (ids, type_ids)]
        try:
            self._pipe.send_bytes(b"".join([HEAD.pack(len(ids)), lengths.tobytes(), *(row.tobytes() for row in flat)]))
        except OSError as error:
            raise Gone(f"the engine process {self.pid} has ended", fix=_LOOK) from error

    def answer(self, timeout: float | None = None) -> np.ndarray:
        """The second half: what was asked for, float32 [texts, labels]. Does not wait once `fileno` can be read."""
        answer = self._receive(timeout)
        return np.frombuffer(answer, np.float32).reshape(-1, len(self.facts["labels"]))

    def fileno(self) -> int:
        """The file descriptor that can be read when there is an answer, or the process has ended."""
        return self._pipe.fileno()

    def kill(self) -> None:
        """Ends the process at once; `answer` says so."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process, whatever it does. Once more changes nothing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout: float | None) -> bytes:
        try:
            if not self._pipe.poll(timeout):
                self._process.kill()
                raise Gone(f"the engine process {self.pid} did not answer for {timeout:g} s", fix=_LOOK)
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            code = self._process.exitcode
            raise Gone(f"the engine process {self.pid} has ended, exit code {code}", fix=_LOOK) from error
        if answer[:1] == OK:
            return answer[1:]
        told = json.loads(answer[1:])
        kind = getattr(errors, told["kind"], SparsebertError)
        raise kind(told["problem"], fix=told["fix"])


def _answer(pipe: Connection, load: Load, *settings) -> None:
    """The work of the process, until the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server is interrupted, and ends it
    try:
        try:
            forward, facts = load(*settings)
        except SparsebertError as error:
            return pipe.send_bytes(_refusal(error))
        pipe.send_bytes(OK + json.dumps(facts).encode())
        while True:
            ids, types = _read(pipe.recv_bytes())
            try:
                answer = OK + forward(ids, types).tobytes()
            except SparsebertError as error:
                answer = _refusal(error)
            pipe.send_bytes(answer)
    except (EOFError, OSError):  # the server has ended
        return None


def _read(question: bytes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(token ids, token types) of each text."""
    (count,) = HEAD.unpack_from(question)
    lengths = np.frombuffer(question, np.int64, count, HEAD.size)
    tokens = int(lengths.sum())
    begin = HEAD.size + lengths.nbytes
    ids = np.frombuffer(question, np.int32, tokens, begin)
    types = np.frombuffer(question, np.int32, -1, begin + ids.nbytes)  # the engine says if they are not as many
    ends = np.cumsum(lengths)[:-1]
    return np.split(ids, ends), np.split(types, ends)


def _refusal(error: SparsebertError) -> bytes:
    return REFUSED + json.dumps({"kind": type(error).__name__, "problem": error.problem, "fix": error.fix}).encode()
