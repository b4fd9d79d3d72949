"""A served model as an ASGI application: what any ASGI server, Ray Serve among them, can run. It loads the model when
it is told to start, and ends it when it is told to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

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
            Served.begin, self.directory, dtype=config.dtype, threads=config.threads, limits=limits, load=load,
            accept=self._accept, log=log,
        )  # fmt: skip
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
            if config.shadow is not None:
                shadow = Path(config.shadow)
                accept = partial(self._accept_shadow, shadow)
                self.state.shadow = await Served.begin(shadow, threads=config.threads, accept=accept, log=self._log)
        except BaseException:
            await self.end(0.0)
            raise
        self._app = app_of(self.state)

    def _accept(self, facts: dict) -> None:
        """Raises InputError for a model that cannot be served as was asked."""
        most = facts["max_length"]
        if self._config.max_tokens is not None and self._config.max_tokens > most:
            raise InputError(
                f"the model takes at most {most} tokens of a text, got --max-tokens {self._config.max_tokens}",
                fix="choose fewer, or leave it out",
            )
        if self.state is not None and self.state.shadow is not None:
            require_comparable(self.state.shadow.directory, self.state.shadow.facts, facts)

    def _accept_shadow(self, directory: Path, facts: dict) -> None:
        require_comparable(directory, facts, self.state.served.facts)

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
        except (SparsebertError, OSError) as error:
            state.log({"level": "error", "error": f"the model was not loaded anew: {error}"})
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


def require_comparable(directory: Path, shadow: dict, served: dict) -> None:
    """Raises InputError unless a shadow has the labels and the problem type of the served model. directory: its own.
    shadow, served: their facts.
    """
    if shadow["problem"] != served["problem"]:
        raise InputError(
            f"the shadow {directory} is a {shadow['problem']} model, the served one is {served['problem']}",
            fix="name the model that it was pruned from",
        )
    heads.columns(shadow["labels"], served["labels"], str(directory))
