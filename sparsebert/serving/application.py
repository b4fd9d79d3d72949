"""A served model as an ASGI application: what any ASGI server, Ray Serve among them, can run. It loads the model when
it is told to start, and ends it when it is told to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, heads
from sparsebert.config import ServeConfig
from sparsebert.errors import InputError, SparsebertError
from sparsebert.serving.batcher import Limits
from sparsebert.serving.http import app_of
from sparsebert.serving.process import Load, load_engine
from sparsebert.serving.served import Served
from sparsebert.serving.state import Rules, State
from sparsebert.serving.tracing import tracer


class Application:
    """`await begin()`, then requests, then `await end()`; or the same by ASGI's lifespan."""

    def __init__(
        self, directory: str | Path, config: ServeConfig, key: str | None, log: Callable[[dict], None],
        load: Load = load_engine,
    ):  # fmt: skip
        """key: that clients must send; None for no key. log: takes a line for every request and fault. load: what
        computes logits, as for `EngineProcess`.
        """
        self.directory, self._config, self._key, self._log = checkpoint.resolve(directory), config, key, log
        limits = Limits(config.max_in_flight, config.max_batch_tokens, wait=config.max_wait_ms / 1e3)
        self._load = partial(
            Served.begin, self.directory, dtype=config.dtype, threads=config.threads, limits=limits, load=load, log=log
        )
        self.state: State | None = None

    async def begin(self) -> None:
        """Raises what `Engine.load` raises, and InputError for a shadow with other labels."""
        config = self._config
        rules = Rules(
            config.max_body_kb * 1000, config.max_items, config.max_tokens, config.timeout, config.read_timeout,
            self._key,
        )  # fmt: skip
        traced = tracer()
        self.state = State(
            await self._load(), rules, config.name or self.directory.absolute().name, self._log, config.quiet,
            shadow_rate=config.shadow_rate, tracer=traced,
        )  # fmt: skip
        for warning in self.state.served.facts["warnings"]:
            self._log({"level": "warning", "warning": warning})
        try:
            most = self.state.served.facts["max_length"]
            if config.max_tokens is not None and config.max_tokens > most:
                raise InputError(
                    f"the model takes at most {most} tokens of a text, got --max-tokens {config.max_tokens}",
                    fix="choose fewer, or leave it out",
                )
            if config.shadow is not None:
                self.state.shadow = await Served.begin(Path(config.shadow), threads=config.threads, log=self._log)
                self.state.columns = columns_of(self.state.shadow, self.state.served)
        except BaseException:
            await self.end(0.0)
            raise
        self._app = app_of(self.state)

    async def end(self, seconds: float) -> None:
        """Answers the requests in flight, for so many seconds at most, and ends the engines."""
        for served in filter(None, (self.state.served, self.state.shadow)):
            await served.close(seconds)
        if self.state.tracer is not None:
            self.state.tracer.close()

    def give_up(self) -> None:
        """Tells requests that are in flight that there will be no answer."""
        for served in filter(None, (self.state.served, self.state.shadow)):
            served.give_up()

    async def reload(self) -> None:
        """Loads the directory anew and swaps it in between two requests. If that fails, it is logged, and the old model
        stays.
        """
        state = self.state
        try:
            fresh = await self._load()
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
        for name, count in vars(old.counts).items():  # they go on
            setattr(fresh.counts, name, getattr(fresh.counts, name) + count)
        told = {"reloaded": str(self.directory), "content_sha256": fresh.facts["content_sha256"]}
        state.log({"level": "info", **told})
        await old.close(self._config.drain_timeout)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        await self._app(scope, receive, send)

    async def _live(self, receive, send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.begin()
                except SparsebertError as error:
                    return await send({"type": "lifespan.startup.failed", "message": str(error)})
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.end(self._config.drain_timeout)
                return await send({"type": "lifespan.shutdown.complete"})


def columns_of(shadow: Served, served: Served) -> np.ndarray:
    """Where the shadow has the labels of the served model. InputError if it has others."""
    if shadow.facts["problem"] != served.facts["problem"]:
        raise InputError(
            f"the shadow {shadow.directory} is a {shadow.facts['problem']} model, the served one is "
            f"{served.facts['problem']}",
            fix="name the model that it was pruned from",
        )
    return heads.columns(shadow.facts["labels"], served.facts["labels"], str(shadow.directory))
