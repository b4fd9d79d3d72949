"""What the requests of a server share: what they may ask, the model that answers, and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from sparsebert.serving.recent import Recent
from sparsebert.serving.served import Served
from sparsebert.serving.tracing import Tracer

disable_created_metrics()
BUCKETS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Rules:
    """What a client may ask. body: bytes. items: texts of a request. tokens: of a text; None: the model's positions.
    seconds: until an answer is of no use. read: seconds in which a body must have come. key: what clients must show.
    """

    body: int = 2_000_000
    items: int = 32
    tokens: int | None = None
    seconds: float = 30.0
    read: float = 10.0
    key: str | None = None


class Metrics:
    """Counters add up: requests = those of every status together."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sparsebert_requests", "requests by route and status", ["route", "status"], registry=self.registry
        )
        self.texts = Counter("sparsebert_texts", "texts that were answered", registry=self.registry)
        self.tokens = Counter("sparsebert_tokens", "their tokens", registry=self.registry)
        seconds = {"buckets": BUCKETS, "registry": self.registry}
        self.total = Histogram(
            "sparsebert_request_seconds", "from the request's head to its answer", ["route"], **seconds
        )
        self.queue = Histogram("sparsebert_queue_seconds", "until the first text began", **seconds)
        self.tokenizing = Histogram("sparsebert_tokenizing_seconds", "texts to token ids", **seconds)
        self.inference = Histogram("sparsebert_inference_seconds", "from then to the end of the last one", **seconds)
        self.shadowed = Counter("sparsebert_shadow_texts", "texts that the shadow answered too", registry=self.registry)
        self.same = Counter("sparsebert_shadow_same", "those of them with the same labels", registry=self.registry)
        self.skipped = Counter("sparsebert_shadow_skipped", "requests it had no time for", registry=self.registry)
        self.both = Histogram(
            "sparsebert_shadow_seconds", "inference, of requests that both answered", ["model"], **seconds
        )
        self.flight = Gauge("sparsebert_in_flight", "requests without an answer", registry=self.registry)
        self.waiting = Gauge("sparsebert_waiting", "texts in the queue", registry=self.registry)
        self.batches = Gauge("sparsebert_batches", "batches so far", registry=self.registry)
        self.ran = Gauge("sparsebert_ran_texts", "texts of them, answered or not", registry=self.registry)
        self.restarts = Gauge("sparsebert_engine_restarts", "engines that were begun again", registry=self.registry)
        self.model = Gauge(
            "sparsebert_model", "1 for the model that answers", ["name", "content_sha256", "dtype"],
            registry=self.registry,
        )  # fmt: skip


@dataclass
class State:
    """What the routes share. served: the model that answers now, which a reload replaces. name: of the model. log:
    takes a line; quiet: not for requests that were answered. shadow: the model that a share of the requests also runs
    on. recent: the last minute's requests for answers.
    """

    served: Served
    rules: Rules
    name: str
    log: Callable[[dict], None]
    quiet: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False  # not ready: balancers should send no more
    refusing: bool = False  # and what they still send is refused
    shadow: Served | None = None
    shadow_rate: float = 0.0
    tracer: Tracer | None = None
    tasks: set[asyncio.Task] = field(default_factory=set)

    def __post_init__(self):
        self.recent = Recent(self._counts)

    def _counts(self) -> tuple[int, int, int]:
        return self.served.batcher.waiting, self.served.counts.batches, self.served.counts.texts

    @property
    def busy(self) -> bool:
        """Whether requests have no answer yet."""
        return any(served.busy for served in filter(None, (self.served, self.shadow)))

    def beside(self, coroutine: Coroutine) -> None:
        """Lets it run beside the requests."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
