"""The same application on a Ray cluster: replicas behind Ray Serve's proxy."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from sparsebert import checkpoint, environment
from sparsebert.config import ServeConfig
from sparsebert.engine import Engine
from sparsebert.errors import UnsupportedError, first_line
from sparsebert.ops import _dispatch
from sparsebert.serving.application import Application
from sparsebert.serving.listening import allowed_key, listening

environment.send_no_usage()

import ray  # noqa: E402  which reads what that sets
from ray import serve  # noqa: E402

NAME = "sparsebert"
ONGOING = 16  # requests per replica that autoscaling aims at


def serve_on_ray(
    directory: str | Path, config: ServeConfig, *, ready: Callable[[dict], None], log: Callable[[dict], None]
) -> None:
    """Serves the classifier in `directory` on the Ray cluster of RAY_ADDRESS, else on one that is begun here, until
    SIGTERM or Ctrl-C. Every node must have the directory. ready: is called once, as by `server.serve`. log: takes a
    line, on the node of a replica.

    Raises what `server.serve` raises, and UnsupportedError if the replicas do not begin.
    """
    directory = checkpoint.resolve(directory).absolute()
    key = allowed_key(config)
    least, most = config.replica_range
    threads = config.threads or max(1, _dispatch.cores() // least)
    with listening(config.host, config.port) as listener:  # so that an address that cannot be used is said in one line
        port = listener.getsockname()[1]
    Engine.load(directory, dtype=config.dtype, threads=threads)  # and a model that cannot be served
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, logging_level="error")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            http_options=serve.HTTPOptions(host=config.host, port=port), logging_config={"log_level": "WARNING"}
        )
        alone = config.model_copy(
            update={"threads": threads, "shadow": config.shadow and str(Path(config.shadow).absolute())}
        )
        scaled = {"num_replicas": least}
        if most > least:
            scaled = {"autoscaling_config": {
                "min_replicas": least, "max_replicas": most, "target_ongoing_requests": ONGOING,
            }}  # fmt: skip

        def build() -> Application:  # a plain function, by which Ray knows that it makes the application on a replica
            return Application(directory, alone, key, log)

        replicas = serve.deployment(
            serve.ingress(build)(), name=NAME,
            ray_actor_options={"num_cpus": threads}, max_ongoing_requests=config.max_in_flight,
            graceful_shutdown_timeout_s=config.drain_timeout, **scaled,
        )  # fmt: skip
        try:
            serve.run(replicas.bind(), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise UnsupportedError(
                f"the replicas did not begin: {first_line(error)}", fix="see Ray's logs, and whether it has the CPUs"
            ) from error
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        ready({
            "ready": True, "url": f"http://{config.host}:{port}", "model": config.name or directory.name,
            "pid": os.getpid(), "replicas": [least, most], "threads": threads,
        })  # fmt: skip
        stop.wait()
    finally:
        serve.shutdown()
        if began:
            ray.shutdown()
