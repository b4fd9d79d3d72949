"""A model that is being served: its tokenizer, the queue, and the engine in a process of its own, which is begun again
if it ends. For one event loop; no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import checkpoint
from sparsebert.engine.inputs import Inputs
from sparsebert.errors import CheckpointError, SparsebertError
from sparsebert.serving.batcher import Batch, Batcher, Limits, Refused, Request
from sparsebert.serving.process import EngineProcess, Gone, Load, load_engine

HUNG = 30.0  # seconds after which a batch that did not come back ends its process
AGAIN = (0.1, 0.5, 1.0, 2.0, 5.0)  # seconds before a process is begun again, after each failure in a row
FITS = 4_000  # tokens of a question that a pipe takes though nobody reads it; a longer one is sent by a thread
TICK = 0.05  # seconds between looks for deadlines that have passed
INLINE = 4_000  # characters that are tokenized at once; more would keep others waiting, and go to a thread
TOKENIZERS = 2  # texts above that which are tokenized at the same time
STOPPING = "the server is stopping"

Text = str | tuple[str, str]


class Unavailable(Exception):
    """The engine is not there at present, or no request is taken any more. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.retry_after = retry_after


class TooLate(Exception):
    """The deadline passed before there was an answer."""


@dataclass(frozen=True)
class Windows:
    """How a long text is read whole: in windows of `size` tokens at most, each beginning `step` tokens after the one
    before. Its logits are the mean over its windows. most: windows of a request.
    """

    size: int
    step: int
    most: int


@dataclass(frozen=True)
class Answer:
    """logits: float32 [texts, labels]. facts: of the engine that computed them, as `EngineProcess.facts`. tokens: that
    were computed. cut: which texts were cut. windows: of each text. Seconds, one after the other: tokenizing, queue
    (until the first text began), inference (until the last one was done).
    """

    logits: np.ndarray
    facts: dict
    tokens: int
    cut: list[int]
    windows: list[int]
    tokenizing: float
    queue: float
    inference: float


@dataclass(eq=False)
class _Pending:
    """What an answer is waiting for."""

    future: asyncio.Future
    ids: list[list[int]]
    types: list[list[int]]
    logits: np.ndarray | None = None
    began: float = 0.0


@dataclass
class Counts:
    """What the engine did so far, and how often it was begun again."""

    batches: int = 0
    texts: int = 0
    restarts: int = 0


class Served:
    """`await Served.begin(directory)`, then any number of `answer` at once, then `await close()`."""

    def __init__(
        self, directory: Path, begin: Callable[[], EngineProcess], limits: Limits | None,
        accept: Callable[[dict], None], log: Callable[[dict], None],
    ):  # fmt: skip
        self.directory, self._begin_process, self._accept, self._log = directory, begin, accept, log
        self.batcher, self.counts = Batcher(limits), Counts()
        self._process: EngineProcess | None = None
        self._closing = self._given_up = False
        self._entering = 0  # requests that are being tokenized
        self._tokenizers = asyncio.Semaphore(TOKENIZERS)
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    @classmethod
    async def begin(
        cls,
        directory: str | Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        limits: Limits | None = None,
        load: Load = load_engine,
        accept: Callable[[dict], None] = lambda facts: None,
        log: Callable[[dict], None] = lambda line: None,
    ) -> Served:
        """Loads the model and warms it up. Raises what `Engine.load` raises, Gone if the process ends before it is
        loaded, and what `accept` raises, which is given the facts of each model that is loaded, now or when the engine
        is begun again. load: as for `EngineProcess`. log: takes a line when the engine ends and when it is begun again.
        """
        directory = checkpoint.resolve(directory).absolute()
        begun = partial(EngineProcess, directory, dtype=dtype, threads=threads, load=load)
        self = cls(directory, begun, limits, accept, log)
        self._take(*await self._load())
        try:
            await asyncio.to_thread(self._warm_up)
        except BaseException:
            self._process.close()
            raise
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]
        return self

    async def _load(self) -> tuple[EngineProcess, Inputs]:
        """`_loaded` in a thread. If nobody waits for it any more, its process ends."""
        loading = asyncio.ensure_future(asyncio.to_thread(self._loaded))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result()[0].close())
            raise

    def _loaded(self) -> tuple[EngineProcess, Inputs]:
        """An engine, and the tokenizer of the same files."""
        process = self._begin_process()
        try:
            self._accept(process.facts)
            files = checkpoint.read(self.directory)
            if files.content_sha256 != process.facts["content_sha256"]:
                raise CheckpointError(
                    f"{self.directory} changed while it was loaded", fix="load it again when it rests"
                )
            return process, Inputs(files)
        except BaseException:
            process.close()
            raise

    def _take(self, process: EngineProcess, inputs: Inputs) -> None:
        self._process, self._inputs, self.facts = process, inputs, process.facts

    @property
    def ready(self) -> bool:
        return self._process is not None and not self._closing

    @property
    def in_flight(self) -> int:
        """Requests that have no answer yet."""
        return self.batcher.in_flight + self._entering

    @property
    def busy(self) -> bool:
        return self.in_flight > 0

    async def answer(
        self,
        texts: Sequence[Text],
        *,
        truncate: bool = False,
        max_length: int | None = None,
        windows: Windows | None = None,
        seconds: float = math.inf,
    ) -> Answer:
        """Logits of texts. truncate, max_length: as for `Engine.logits`. windows: in place of both. seconds: until the
        answer is of no use.

        Raises InputError for texts that the engine would refuse, Unavailable, batcher.Refused, TooLate. If the caller
        is cancelled, what is still in the queue is not run.
        """
        if not self.ready:
            raise Unavailable(STOPPING if self._closing else "the engine is being started", 1.0)
        if self.in_flight >= self.batcher.limits.in_flight:
            raise Refused(f"{self.batcher.limits.in_flight} requests are in flight", 1.0)
        start = time.monotonic()
        size = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)

        inputs, facts = self._inputs, self.facts

        def encode() -> tuple[list[list[int]], list[list[int]], list[int], list[int]]:
            if windows is not None:
                ids, types, counts = inputs.windows(texts, size=windows.size, step=windows.step, most=windows.most)
                return ids, types, [], counts
            return *inputs.encode(texts, truncate=truncate, max_length=max_length), [1] * len(texts)

        if size <= INLINE:
            ids, types, cut, counts = encode()
        else:
            self._entering += 1
            try:
                ids, types, cut, counts = await self._in_thread(encode, seconds)
            finally:
                self._entering -= 1
            if self._given_up:
                raise Unavailable(STOPPING, 1.0)
            if facts is not self.facts:
                raise Unavailable("the model was replaced", 1.0)
        lengths, now = [len(row) for row in ids], time.monotonic()
        if now >= start + seconds:
            raise TooLate("the text was not tokenized before the deadline")
        pending = _Pending(asyncio.get_running_loop().create_future(), ids, types)
        request = self.batcher.admit(lengths, now, deadline=start + seconds, payload=pending)
        self._work.set()
        try:
            logits, end = await pending.future
        finally:
            self.batcher.leave(request)  # one that has ended stays as it is
        if len(counts) < len(logits):
            ends = np.cumsum(counts)[:-1]
            logits = np.stack([part.mean(axis=0, dtype=np.float64) for part in np.split(logits, ends)]).astype("f4")
        return Answer(logits, facts, sum(lengths), cut, counts, now - start, pending.began - now, end - pending.began)

    async def _in_thread(self, encode: Callable, seconds: float):
        """What `encode` returns. TOKENIZERS run at the same time; one that takes too long runs on, for nobody."""

        def ended(running: asyncio.Future) -> None:
            self._tokenizers.release()
            _ = running.cancelled() or running.exception()  # it is told to whoever waits, if anybody does

        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._tokenizers.acquire()
                running = asyncio.get_running_loop().run_in_executor(None, encode)
                running.add_done_callback(ended)
                return await asyncio.shield(running)
        except TimeoutError as error:
            raise TooLate("the text was not tokenized before the deadline") from error

    async def close(self, seconds: float = 0.0) -> bool:
        """Takes no request any more, waits for those that it has, for so many seconds at most, and ends the process.
        Returns whether all were answered.
        """
        self._closing = True
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            await asyncio.sleep(0.01)
        answered = not self.busy
        self.give_up()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._process is not None:
            await asyncio.to_thread(self._process.close)
            self._process = None
        return answered

    def give_up(self) -> None:
        """Takes no request any more, and tells those that it has that there will be no answer."""
        self._closing = self._given_up = True
        self._end_all(Unavailable(STOPPING, 1.0))

    def _end_all(self, error: Exception) -> None:
        for request in self.batcher.all_failed():
            self._tell(request, error)

    def _warm_up(self) -> None:
        """The first calls are slower, as the process starts its threads and touches the weights."""
        ids, types, _ = self._inputs.encode(["a text to warm up on"] * 8)
        for _ in range(3):
            self._process.forward(ids, types, timeout=HUNG)

    async def _run(self) -> None:
        """Runs batches, one after another."""
        while True:
            if not self._process.alive:
                self._log({"level": "error", "error": f"the engine process {self._process.pid} has ended"})
                await self._begin_again()
            batch = self.batcher.next(time.monotonic())
            if batch is None:
                self._work.clear()
                await self._work.wait()
                continue
            for request, _ in batch.items:
                request.payload.began = request.payload.began or time.monotonic()
            try:
                try:
                    logits = await self._forward(self._process, batch)
                except Gone:
                    raise
                except SparsebertError:  # the engine is there, and refuses one of them
                    logits = await self._apart(batch)
            except Gone as error:
                self._log({"level": "error", "error": f"the engine failed: {error}"})
                self._fail(Unavailable(f"the engine failed: {error}", 1.0))
                await asyncio.to_thread(self._process.close)
                continue
            self._finish(batch, logits, time.monotonic())

    async def _apart(self, batch: Batch) -> list[np.ndarray | None]:
        """Logits of a batch, its requests one after the other. A request that the engine refuses ends; None for its
        texts.
        """
        logits: list[np.ndarray | None] = [None] * len(batch.items)
        for request in dict.fromkeys(request for request, _ in batch.items):
            at = [k for k, (whose, _) in enumerate(batch.items) if whose is request]
            items = [batch.items[k] for k in at]
            tokens = sum(request.lengths[i] for _, i in items)
            try:
                rows = await self._forward(self._process, Batch(items, tokens, batch.began))
            except Gone:
                raise
            except SparsebertError as error:
                self._log({"level": "error", "error": f"the engine refused a request: {error}"})
                self.batcher.leave(request)
                self._tell(request, error)
                continue
            for k, row in zip(at, rows, strict=True):
                logits[k] = row
        return logits

    async def _forward(self, process: EngineProcess, batch: Batch) -> np.ndarray:
        loop = asyncio.get_running_loop()
        rows = [(request.payload.ids[i], request.payload.types[i]) for request, i in batch.items]
        question = [ids for ids, _ in rows], [types for _, types in rows]
        ready = loop.create_future()
        loop.add_reader(process.fileno(), lambda: ready.done() or ready.set_result(None))
        try:
            async with asyncio.timeout(HUNG):
                if batch.tokens <= FITS:
                    process.ask(*question)
                else:
                    await asyncio.to_thread(process.ask, *question)
                await ready
        except TimeoutError:
            process.kill()
        finally:
            loop.remove_reader(process.fileno())
        return process.answer(HUNG)

    def _finish(self, batch: Batch, logits: Sequence[np.ndarray | None], now: float) -> None:
        self.counts.batches += 1
        self.counts.texts += len(batch.items)
        for (request, i), row in zip(batch.items, logits, strict=True):
            if row is None:
                continue
            pending = request.payload
            if pending.logits is None:
                pending.logits = np.empty((len(pending.ids), len(row)), np.float32)
            pending.logits[i] = row
        for request in self.batcher.done(now):
            self._tell(request, (request.payload.logits, now))

    def _fail(self, error: Exception) -> None:
        for request in self.batcher.failed():
            self._tell(request, error)

    @staticmethod
    def _tell(request: Request, result) -> None:
        future = request.payload.future
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    async def _begin_again(self) -> None:
        """Puts a new process in the place of one that has ended. If the directory holds another model by now, requests
        that were tokenized for the old one are ended.
        """
        gone, self._process = self._process, None
        await asyncio.to_thread(gone.close)
        for failures in range(1_000_000):
            await asyncio.sleep(0 if failures == 0 else AGAIN[min(failures, len(AGAIN)) - 1])
            try:
                process, inputs = await self._load()
                break
            except (SparsebertError, OSError) as error:
                self._log({"level": "error", "error": f"the engine was not begun again: {error}"})
        if process.facts["content_sha256"] != self.facts["content_sha256"]:
            self._log({"level": "warning", "warning": f"{self.directory} holds another model than before"})
            self._end_all(Unavailable("the model was replaced", 1.0))
            self._take(process, inputs)
        else:
            self._process = process
        self.counts.restarts += 1
        self._log({"level": "warning", "warning": f"the engine was begun again as process {process.pid}"})

    async def _watch(self) -> None:
        """Ends requests whose deadline has passed, and has an idle process looked at."""
        while True:
            await asyncio.sleep(TICK)
            if self._process is not None and not self._process.alive:
                self._work.set()
            for request in self.batcher.expired(time.monotonic()):
                self._tell(request, TooLate("there was no answer before the deadline"))
