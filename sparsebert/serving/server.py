"""Runs a server until it is told to stop. SIGTERM or Ctrl-C: is not ready, refuses new requests after a delay, answers
those in flight, exits; the second one exits at once. SIGHUP: loads the model directory anew, and swaps it in between
two requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from sparsebert import checkpoint
from sparsebert.config import ServeConfig
from sparsebert.serving.application import Application
from sparsebert.serving.listening import BACKLOG, allowed_key, listening
from sparsebert.serving.process import Load, load_engine
from sparsebert.serving.protocol import Protocol

LARGE = 64 * 1024  # bytes
_MALLOPT = {-8: 2, -3: LARGE, -1: LARGE}  # glibc's M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
GRACE = 5  # seconds in which the last answers are sent


def serve(
    directory: str | Path,
    config: ServeConfig,
    *,
    ready: Callable[[dict], None],
    log: Callable[[dict], None],
    load: Load = load_engine,
) -> None:
    """Serves the classifier in `directory` until SIGTERM or Ctrl-C. ready: is called once, with ready, url, model and
    pid. log: takes a line for every request and fault. load: what computes logits, as for `EngineProcess`.

    Raises InputError for an address without a key, a key that cannot be read and a port that is taken, and what
    `Engine.load` raises; before anything is served.
    """
    directory = checkpoint.resolve(directory)
    key = allowed_key(config)
    give_memory_back()
    with listening(config.host, config.port) as listener:
        uvloop.run(_serve(Application(directory, config, key, log, load), config, listener, ready))


def give_memory_back() -> None:
    """Lets the C library return what a large body or text took as soon as it is freed. By default it keeps such blocks
    for later ones of their size, between which small ones settle: a server then grows with the odd requests it gets.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in _MALLOPT.items():
            mallopt(name, value)


class _ToLog(logging.Handler):
    """uvicorn's own errors as lines of the log."""

    def __init__(self, log: Callable[[dict], None]):
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self._log({"level": "error", "error": record.getMessage().split("\n")[0], "cause": repr(cause)})


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    def install_signal_handlers(self) -> None:
        pass

    @contextlib.contextmanager
    def capture_signals(self):
        yield


async def _serve(app: Application, config: ServeConfig, listener: socket.socket, ready) -> None:
    await app.begin()
    state, loop = app.state, asyncio.get_running_loop()

    def told(status: int, request_id: str, error: str) -> None:
        state.metrics.requests.labels("none", str(status)).inc()
        state.log({"level": "info", "request_id": request_id, "route": "none", "status": status, "error": error})

    logging.getLogger("uvicorn").handlers = [_ToLog(state.log)]
    server = _Server(
        uvicorn.Config(
            app, http=partial(Protocol, head_seconds=config.read_timeout, told=told), ws="none", log_config=None,
            access_log=False, lifespan="off", timeout_keep_alive=30, server_header=False, backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE,
        )
    )  # fmt: skip

    def stop() -> None:
        state.log({"level": "info", "stopping": "at once" if state.stopping else "when requests are answered"})
        if state.stopping:
            server.force_exit = server.should_exit = True
            app.give_up()
        else:
            state.stopping = True
            state.beside(drain())

    async def drain() -> None:
        """Listens on: first as before, for balancers that have not heard yet, then to say that it stops."""
        await asyncio.sleep(config.stop_delay)
        state.refusing, end = True, loop.time() + config.drain_timeout
        while state.busy and loop.time() < end:
            await asyncio.sleep(0.02)
        app.give_up()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: state.beside(app.reload()))
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    state.log(
        {"level": "info", "serving": url, "model": state.name, "content_sha256": state.served.facts["content_sha256"]}
    )
    ready({"ready": True, "url": url, "model": state.name, "pid": os.getpid()})
    await server.serve(sockets=[listener])
    await app.end(0.0)
