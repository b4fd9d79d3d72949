"""Runs a server until it is told to stop. SIGTERM or Ctrl-C: takes no more requests, answers those in flight, exits;
the second one exits at once. SIGHUP: loads the model directory anew, and swaps it in between two requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import uvicorn
import uvloop

from sparsebert import checkpoint, heads
from sparsebert.config import ServeConfig
from sparsebert.errors import InputError, SparsebertError
from sparsebert.serving.batcher import Limits
from sparsebert.serving.http import app_of
from sparsebert.serving.key import key_of
from sparsebert.serving.process import Load, load_engine
from sparsebert.serving.protocol import Protocol
from sparsebert.serving.served import Served
from sparsebert.serving.state import Rules, State

BACKLOG = 2048  # connections that the kernel keeps while the loop is busy


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
    key = key_of(config.api_key_file)
    if key is None and not config.insecure and not _is_loopback(config.host):
        raise InputError(
            f"anybody who reaches {config.host} could use the server, and there is no API key",
            fix="give --api-key-file FILE, or --insecure, or --host 127.0.0.1",
        )
    with listening(config.host, config.port) as listener:
        uvloop.run(_serve(directory, config, key, listener, ready, log, load))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.contextmanager
def listening(host: str, port: int):
    """A socket that is bound to the address; InputError if it cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(
            f"there is no address {host}: {error.strerror or error}", fix="choose another --host"
        ) from error
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise InputError(f"{host}:{port} cannot be used: {error.strerror}", fix="choose another --port") from error
        yield listener


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    def install_signal_handlers(self) -> None:
        pass

    @contextlib.contextmanager
    def capture_signals(self):
        yield


async def _serve(
    directory: Path, config: ServeConfig, key: str | None, listener: socket.socket, ready, log, load
) -> None:
    limits = Limits(config.max_in_flight, config.max_batch_tokens, wait=config.max_wait_ms / 1e3)

    async def begin() -> Served:
        return await Served.begin(directory, dtype=config.dtype, threads=config.threads, limits=limits, load=load)

    rules = Rules(
        config.max_body_kb * 1000, config.max_items, config.max_tokens, config.timeout, config.read_timeout, key
    )
    state = State(await begin(), rules, directory.absolute().name, log, shadow_rate=config.shadow_rate)
    if config.shadow is not None:
        state.shadow = await _shadow(Path(config.shadow), config, state.served)
        state.columns = columns_of(state.shadow, state.served)
    server = _Server(
        uvicorn.Config(
            app_of(state), http=partial(Protocol, head_seconds=config.read_timeout), ws="none", log_config=None,
            access_log=False, lifespan="off",
            timeout_keep_alive=30, timeout_graceful_shutdown=max(1, int(config.drain_timeout)), server_header=False,
            backlog=BACKLOG,
        )
    )  # fmt: skip
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = state.stopping
        state.stopping = server.should_exit = True

    async def reload() -> None:
        try:
            fresh = await begin()
        except SparsebertError as error:
            state.log({"level": "error", "error": f"the model was not loaded anew: {error}"})
            return
        if state.shadow is not None:
            try:
                state.columns = columns_of(state.shadow, fresh)
            except SparsebertError as error:
                state.log({"level": "error", "error": f"the model was not swapped: {error}"})
                await fresh.close()
                return
        old, state.served = state.served, fresh
        state.log({"level": "info", "reloaded": str(directory)})
        await old.close(config.drain_timeout)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: state.beside(reload()))
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    ready({"ready": True, "url": url, "model": state.name, "pid": os.getpid()})
    await server.serve(sockets=[listener])
    for served in filter(None, (state.served, state.shadow)):
        await served.close(config.drain_timeout)


async def _shadow(directory: Path, config: ServeConfig, served: Served) -> Served:
    """The dense model; the served one is ended if it cannot be loaded."""
    try:
        return await Served.begin(directory, threads=config.threads)
    except BaseException:
        await served.close()
        raise


def columns_of(shadow: Served, served: Served) -> np.ndarray:
    """Where the shadow has the labels of the served model. InputError if it has others."""
    if shadow.facts["problem"] != served.facts["problem"]:
        raise InputError(
            f"the shadow {shadow.directory} is a {shadow.facts['problem']} model, the served one is "
            f"{served.facts['problem']}",
            fix="name the model that it was pruned from",
        )
    return heads.columns(shadow.facts["labels"], served.facts["labels"], str(shadow.directory))
