"""CUDA graphs, and the stream on which a GPU runs them: one per GPU, for all engines of the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sparsebert.errors import UnsupportedError

_CAPTURE = threading.RLock()  # torch allows one capture at a time in a process


class Queue:
    """The stream of a device, used by one call at a time.

    One stream serves all engines and all their graphs: cuBLAS keeps a workspace for each stream until the process ends,
    and graphs that share a pool of memory must be captured on one stream. Whatever streams the callers use, no two
    graphs run at once, so none overwrites the workspace of another. Nothing may be launched on a stream that another
    thread captures, hence one lock for both.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock, self._busy, self._process = threading.RLock(), False, os.getpid()

    def follow(self) -> None:
        """Lets the stream wait for what the current stream of its device was given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the other threads' calls; the stream and its device are the current ones meanwhile. Raises
        UnsupportedError in a child of a fork, and in a signal handler that has interrupted a call.
        """
        if os.getpid() != self._process:
            raise UnsupportedError(
                "an engine on a GPU must run in the process that loaded it, this is a child of its fork",
                fix="load the engine in the child, and start it by spawn",
            )
        with self._lock:
            if self._busy:
                raise UnsupportedError(
                    "engines on a GPU run one call at a time, a signal handler calls one during another call",
                    fix="call it outside the handler",
                )
            self._busy = True
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                self._busy = False


_QUEUES: dict[torch.device, Queue] = {}


def queue(device: torch.device) -> Queue:
    """The queue of a device."""
    return _QUEUES.get(device) or _QUEUES.setdefault(device, Queue(device))  # the same for threads that come at once


class Graphs:
    """CUDA graphs, one for each of `key`, captured when it is first replayed. They share the memory that they allocate,
    so only one may run at a time.
    """

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def replay(self, key: tuple[int, ...], work: Callable[[], object]) -> None:
        """Does what `work` launches, within a turn. It must launch the same on the same memory for the same key."""
        if key not in self._graphs:
            self._graphs[key] = captured(work, self._pool)
        self._graphs[key].replay()


def captured(work: Callable[[], object], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `work` launches, captured on the current stream, which must be that of a turn. It is run
    once before, which compiles its kernels. pool: of the memory that it allocates.
    """
    work()
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile, on streams of their own.
    stream = torch.cuda.current_stream()
    with _CAPTURE, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph
