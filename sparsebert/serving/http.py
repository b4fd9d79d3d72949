"""HTTP in front of a served model: routes, limits, one shape of errors, metrics. `app_of` makes the ASGI app."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import random
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from sparsebert import __version__, heads
from sparsebert.errors import InputError, SparsebertError, cut
from sparsebert.serving.batcher import Refused
from sparsebert.serving.served import Answer, Served, Text, TooLate, Unavailable

IGNORED = 64_000_000  # bytes of a body that is too large that are read and thrown away
CLIENT_LEFT = 499  # in logs and metrics; nobody receives it
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
BUCKETS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Probes have no key.
OPEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")


class Fault(Exception):
    """An answer that is an error: {error, type, request_id, hint} with this status."""

    def __init__(self, status: int, kind: str, error: str, hint: str = "", retry_after: float | None = None):
        super().__init__(error)
        self.status, self.kind, self.error, self.hint, self.retry_after = status, kind, error, hint, retry_after


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
        self.queue = Histogram("sparsebert_queue_seconds", "until the last text began", **seconds)
        self.tokenizing = Histogram("sparsebert_tokenizing_seconds", "texts to token ids", **seconds)
        self.inference = Histogram("sparsebert_inference_seconds", "of the batches that held the texts", **seconds)
        self.shadowed = Counter("sparsebert_shadow_texts", "texts that the shadow answered too", registry=self.registry)
        self.same = Counter("sparsebert_shadow_same", "those of them with the same labels", registry=self.registry)
        self.skipped = Counter("sparsebert_shadow_skipped", "requests it had no time for", registry=self.registry)
        self.both = Histogram(
            "sparsebert_shadow_seconds", "inference, of requests that both answered", ["model"], **seconds
        )
        self.flight = Gauge("sparsebert_in_flight", "requests without an answer", registry=self.registry)
        self.waiting = Gauge("sparsebert_waiting", "texts in the queue", registry=self.registry)
        self.batches = Gauge("sparsebert_batches", "batches so far", registry=self.registry)
        self.restarts = Gauge("sparsebert_engine_restarts", "engines that were begun again", registry=self.registry)


@dataclass
class State:
    """What the routes share. served: the model that answers now, which a reload replaces. log: takes a line. shadow:
    the model that a share of the requests also runs on, and `columns` where it has the labels of `served`.
    """

    served: Served
    rules: Rules
    name: str
    log: Callable[[dict], None]
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
    shadow: Served | None = None
    shadow_rate: float = 0.0
    columns: np.ndarray | None = None
    tasks: set[asyncio.Task] = field(default_factory=set)

    def beside(self, coroutine: Coroutine) -> None:
        """Lets it run beside the requests."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


# --- what clients send ------------------------------------------------------------------------------------------------


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Item(Body):
    text: str
    text_pair: str | None = None


class Predict(Body):
    """`inputs`: a text, or {"text", "text_pair"}, or a batch: a list of [text], [text, pair] or such objects."""

    inputs: str | Item | list
    truncate: bool = False
    raw_scores: bool = False
    top_k: int | None = Field(None, ge=1)
    activation: str | None = Field(None, pattern="^(softmax|sigmoid|identity)$")


class Rerank(Body):
    query: str
    texts: list[str] = Field(min_length=1)
    truncate: bool = False
    raw_scores: bool = False
    return_text: bool = False


class Classify(Body):
    input: str | list[str]
    model: str | None = None
    truncate: bool = True


class Tensor(BaseModel):
    """One of KServe. data: texts, flat or in lists as the shape says."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int]
    datatype: str
    data: list


class Infer(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=2)
    outputs: list[dict] | None = None
    parameters: dict = Field(default_factory=dict)


def _column(tensor: Tensor) -> list[str]:
    """The texts of a tensor of n texts, shape [n] or [n, 1]."""
    if tensor.datatype != "BYTES":
        raise Fault(
            422, "validation", f"{tensor.name} must be of datatype BYTES, is {cut(tensor.datatype, 20)}", "send texts"
        )
    texts = [part[0] if isinstance(part, list) and len(part) == 1 else part for part in tensor.data]
    count = len(texts)
    if not all(isinstance(text, str) for text in texts) or tensor.shape not in ([count], [count, 1]):
        raise Fault(
            422, "validation", f"{tensor.name} has {count} entries and the shape {cut(str(tensor.shape), 60)}",
            "send texts, of shape [n] or [n, 1]",
        )  # fmt: skip
    return texts


def _inputs(given: str | Item | list, rules: Rules) -> tuple[list[Text], bool]:
    """(the texts, whether it was one and no batch)."""
    if not isinstance(given, list):
        return [_text(given, "inputs")], True
    if not given:
        raise Fault(422, "validation", "inputs must hold at least one text, holds none", "send a text")
    _require_few(len(given), rules)
    return [_text(item, f"inputs[{i}]") for i, item in enumerate(given)], False


def _text(item, where: str) -> Text:
    if where != "inputs" and isinstance(item, str):
        raise Fault(
            422, "validation", f"{where} is a text in a plain list, which may mean a pair or a batch",
            'write [["a"], ["b"]] for two texts, [["a", "b"]] for a pair',
        )  # fmt: skip
    if isinstance(item, dict):
        try:
            item = Item.model_validate(item)
        except ValidationError as error:
            raise Fault(422, "validation", f"{where}: {_first(error)}", 'write {"text": …, "text_pair": …}') from error
    if isinstance(item, Item):
        return item.text if item.text_pair is None else (item.text, item.text_pair)
    if isinstance(item, str):
        return item
    if isinstance(item, list) and 1 <= len(item) <= 2 and all(isinstance(part, str) for part in item):
        return item[0] if len(item) == 1 else (item[0], item[1])
    raise Fault(422, "validation", f"{where} must be [text], [text, pair] or an object with text", "correct it")


def _require_few(count: int, rules: Rules) -> None:
    if count > rules.items:
        raise Fault(
            413, "too_many_items", f"a request may have {rules.items} texts, has {count}", "send several requests"
        )


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    at = ".".join(map(str, found["loc"]))
    return cut(f"{at}: {found['msg']}" if at else found["msg"], 200)


async def _read(request: Request, model: type[Body]):
    body = await request.body()
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        broken = error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid"
        hint = "send JSON in UTF-8" if broken else f"see {model.__name__} in /openapi.json"
        raise Fault(400 if broken else 422, "json" if broken else "validation", _first(error), hint) from error


# --- routes -----------------------------------------------------------------------------------------------------------


def app_of(state: State) -> Guard:
    """The ASGI app: FastAPI's routes inside the guard."""
    app = FastAPI(
        title="sparsebert", version=__version__, docs_url=None, redoc_url=None
    )  # their pages load scripts from afar

    def takes(model: type[Body]) -> dict:
        return {
            "requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}
        }

    async def answered(texts: list[Text], truncate: bool) -> Answer:
        answer = await state.served.answer(
            texts, truncate=truncate, max_length=state.rules.tokens, seconds=state.rules.seconds
        )
        state.metrics.texts.inc(len(texts))
        state.metrics.tokens.inc(sum(answer.tokens))
        for name in ("queue", "tokenizing", "inference"):
            getattr(state.metrics, name).observe(getattr(answer, name))
        if state.shadow is not None and random.random() < state.shadow_rate:
            state.beside(_compare(state, texts, truncate, answer))
        return answer

    def scores_of(answer: Answer, activation: str | None) -> np.ndarray:
        name = activation or DEFAULT_ACTIVATION[state.served.facts["problem"]]
        return ACTIVATIONS[name](answer.logits)

    @app.post("/predict", openapi_extra=takes(Predict))
    async def predict(request: Request) -> Response:
        """Classify texts: of each text the labels with their scores, the highest first."""
        asked = await _read(request, Predict)
        if asked.raw_scores and asked.activation not in (None, "identity"):
            raise Fault(
                422, "validation", f"raw_scores and activation {asked.activation} exclude each other", "send one"
            )
        texts, alone = _inputs(asked.inputs, state.rules)
        answer = await answered(texts, asked.truncate)
        scores = scores_of(answer, "identity" if asked.raw_scores else asked.activation)
        labels = state.served.facts["labels"]
        rows = []
        for row in scores.tolist():
            ranked = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])[: asked.top_k]
            rows.append([{"label": label, "score": score} for label, score in ranked])
        return _json(rows[0] if alone else rows, answer)

    @app.post("/rerank", openapi_extra=takes(Rerank))
    async def rerank(request: Request) -> Response:
        """Rank texts for a query, by a model of one logit."""
        if state.served.facts["problem"] != heads.ONE_LOGIT.name:
            raise Fault(424, "model", f"{state.name} has {len(state.served.facts['labels'])} labels", "ask /predict")
        asked = await _read(request, Rerank)
        _require_few(len(asked.texts), state.rules)
        answer = await answered([(asked.query, text) for text in asked.texts], asked.truncate)
        scores = ACTIVATIONS["identity" if asked.raw_scores else "sigmoid"](answer.logits)[:, 0].tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        rows = [
            {"index": i, "score": scores[i]} | ({"text": asked.texts[i]} if asked.return_text else {}) for i in order
        ]
        return _json(rows, answer)

    @app.post("/classify", openapi_extra=takes(Classify))
    async def classify(request: Request) -> Response:
        """Classify texts, in the shape of vLLM's /classify."""
        asked = await _read(request, Classify)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if asked.model not in (None, state.name):
            raise Fault(
                404, "model", f"there is no model {cut(asked.model, 64)!r}, only {state.name!r}", "leave it out"
            )
        if not texts:
            raise Fault(422, "validation", "input must hold at least one text, holds none", "send a text")
        _require_few(len(texts), state.rules)
        answer = await answered(texts, asked.truncate)
        scores, labels = scores_of(answer, None), state.served.facts["labels"]
        rows = [
            {"index": i, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)}
            for i, row in enumerate(scores)
        ]
        tokens = sum(answer.tokens)
        return _json(
            {
                "id": f"classify-{request.state.request_id}", "object": "list", "created": int(time.time()),
                "model": state.name, "data": rows, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            answer,
        )  # fmt: skip

    def require_model(name: str) -> None:
        if name != state.name:
            raise Fault(404, "model", f"there is no model {cut(name, 64)!r}, only {state.name!r}", "see /info")

    @app.post("/v2/models/{name}/infer", openapi_extra=takes(Infer))
    async def infer(name: str, request: Request) -> Response:
        """Classify texts, by KServe's open inference protocol. Inputs text and, for pairs, text_pair; parameters:
        truncate.
        """
        require_model(name)
        asked = await _read(request, Infer)
        columns = {tensor.name: _column(tensor) for tensor in asked.inputs}
        first, second = columns.get("text"), columns.get("text_pair")
        twice = len(columns) < len(asked.inputs)
        if twice or first is None or (len(columns) == 2 and (second is None or len(second) != len(first))) or not first:
            raise Fault(
                422, "validation", f"inputs must be text, and text_pair of as many, are {list(columns)}", "see /v2"
            )
        if not isinstance(truncate := asked.parameters.get("truncate", False), bool):
            raise Fault(422, "validation", "parameters.truncate must be true or false", "correct it")
        _require_few(len(first), state.rules)
        answer = await answered(first if second is None else list(zip(first, second, strict=True)), truncate)
        wanted = None if asked.outputs is None else {output.get("name") for output in asked.outputs}
        outputs = [
            {"name": kind, "datatype": datatype, "shape": list(values.shape), "data": values.ravel().tolist()}
            for kind, datatype, values in (
                ("logits", "FP32", answer.logits), ("scores", "FP64", scores_of(answer, None)),
                ("label", "BYTES", np.array(state.served.facts["labels"])[answer.logits.argmax(axis=1)]),
            )
            if wanted is None or kind in wanted
        ]  # fmt: skip
        said = {} if asked.id is None else {"id": asked.id}
        return _json({"model_name": state.name, "model_version": "1", **said, "outputs": outputs}, answer)

    @app.get("/v2")
    async def server() -> dict:
        return {"name": "sparsebert", "version": __version__, "extensions": []}

    @app.get("/v2/models/{name}")
    async def metadata(name: str) -> dict:
        require_model(name)
        count = len(state.served.facts["labels"])
        tensors = {"text": ("BYTES", [-1]), "text_pair": ("BYTES", [-1])}, {
            "logits": ("FP32", [-1, count]), "scores": ("FP64", [-1, count]), "label": ("BYTES", [-1])
        }  # fmt: skip
        inputs, outputs = (
            [{"name": kind, "datatype": datatype, "shape": shape} for kind, (datatype, shape) in each.items()]
            for each in tensors
        )
        return {"name": name, "versions": ["1"], "platform": "sparsebert", "inputs": inputs, "outputs": outputs}

    @app.get("/health/live")
    @app.get("/v2/health/live")
    async def live() -> dict:
        return {"live": True}

    @app.get("/health/ready")
    @app.get("/v2/health/ready")
    async def ready() -> Response:
        up = state.served.ready and not state.stopping
        return JSONResponse({"ready": up}, 200 if up else 503)

    @app.get("/v2/models/{name}/ready")
    async def model_ready(name: str) -> Response:
        require_model(name)
        return await ready()

    @app.get("/info")
    async def info() -> dict:
        """The model, its labels in the order of the logits, how it runs, and what a client may ask."""
        facts, limits = state.served.facts, state.served.batcher.limits
        return {
            "model": state.name, "version": __version__, **facts, "sparsity": 1 - facts["density"],
            "activation": DEFAULT_ACTIVATION[facts["problem"]],
            "limits": {
                "body_bytes": state.rules.body, "items": state.rules.items,
                "tokens": state.rules.tokens or facts["max_length"], "batch_tokens": limits.batch_tokens,
                "in_flight": limits.in_flight, "wait_seconds": limits.wait, "seconds": state.rules.seconds,
            },
        }  # fmt: skip

    @app.get("/metrics")
    async def metrics() -> Response:
        known, served = state.metrics, state.served
        known.flight.set(served.batcher.in_flight)
        known.waiting.set(served.batcher.waiting)
        known.batches.set(served.counts.batches)
        known.restarts.set(served.counts.restarts)
        return Response(generate_latest(known.registry), media_type="text/plain; version=0.0.4")

    async def told(request: Request, error: Exception) -> Response:
        return _error(fault_of(error), request.state.request_id)

    for kind in (HTTPException, Fault, Refused, Unavailable, TooLate, SparsebertError, Exception):
        app.add_exception_handler(kind, told)
    return Guard(app, state)


async def _compare(state: State, texts: list[Text], truncate: bool, answer: Answer) -> None:
    """Runs texts that were answered on the shadow, and counts how often it says the same."""
    metrics, rules = state.metrics, state.rules
    try:
        dense = await state.shadow.answer(texts, truncate=truncate, max_length=rules.tokens, seconds=rules.seconds)
    except (Refused, Unavailable, TooLate, SparsebertError):
        metrics.skipped.inc()
        return
    problem = heads.PROBLEMS[state.served.facts["problem"]]
    if problem is heads.ONE_LOGIT:
        said = [logits[:, 0] > 0 for logits in (answer.logits, dense.logits)]
    else:
        said = [problem.predict(logits) for logits in (answer.logits, dense.logits[:, state.columns])]
    metrics.shadowed.inc(len(texts))
    metrics.same.inc(int((said[0] == said[1]).reshape(len(texts), -1).all(axis=1).sum()))
    for name, each in (("served", answer), ("shadow", dense)):
        metrics.both.labels(name).observe(each.inference)


DEFAULT_ACTIVATION = {
    heads.SINGLE_LABEL.name: "softmax", heads.MULTI_LABEL.name: "sigmoid", heads.ONE_LOGIT.name: "identity"
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": heads.softmax, "sigmoid": heads.sigmoid, "identity": lambda logits: logits.astype(np.float64)
}  # fmt: skip


def _json(content, answer: Answer) -> Response:
    headers = {
        "x-queue-time": f"{1e3 * answer.queue:.3f}", "x-tokenization-time": f"{1e3 * answer.tokenizing:.3f}",
        "x-inference-time": f"{1e3 * answer.inference:.3f}", "x-compute-tokens": str(sum(answer.tokens)),
    }  # fmt: skip
    if answer.cut:
        headers["x-truncated"] = ",".join(map(str, answer.cut))
    return Response(json.dumps(content, allow_nan=False), media_type="application/json", headers=headers)


# --- the guard --------------------------------------------------------------------------------------------------------


class Guard:
    """Stands between the network and the routes: checks the key, reads the body within its limits, ends the work of
    clients who leave, gives every error one shape, and counts and logs every request once.
    """

    def __init__(self, app, state: State):
        self._app, self._state = app, state

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, state = time.perf_counter(), self._state
        heads_ = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        shown = heads_.get("x-request-id", "")
        request_id = shown if REQUEST_ID.fullmatch(shown) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status, begun = CLIENT_LEFT, False

        async def sending(message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, sending, heads_)
        except ClientLeft:
            pass
        except Exception as error:  # noqa: BLE001  the last resort: no request is without an answer
            fault = fault_of(error)
            if fault.status == 500:
                state.log({"level": "error", "request_id": request_id, "error": repr(error)})
            if not begun:
                await _error(fault, request_id)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            state.metrics.requests.labels(route, str(status)).inc()
            state.metrics.total.labels(route).observe(seconds)
            state.log({
                "level": "info", "request_id": request_id, "method": scope["method"], "route": route, "status": status,
                "ms": round(1e3 * seconds, 3),
            })  # fmt: skip

    async def _guarded(self, scope, receive, send, heads_: dict[str, str]) -> None:
        rules = self._state.rules
        if rules.key is not None and scope["path"] not in OPEN:
            given = heads_.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), rules.key.encode()):
                raise Fault(401, "key", "the API key is missing or wrong", "send Authorization: Bearer KEY")
        body = await self._body(receive, heads_)
        sent = False

        async def given_body():
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await asyncio.Future()  # `_until_left` listens

        work = asyncio.ensure_future(self._app(scope, given_body, send))
        left = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                raise ClientLeft
            await work
        finally:
            left.cancel()
            work.cancel()

    async def _body(self, receive, heads_: dict[str, str]) -> bytes:
        """The body. One that is too large is read to its end, or to IGNORED, before it is refused: a client that is
        still sending would not see the answer.
        """
        most, parts, size = self._state.rules.body, [], 0
        length = heads_.get("content-length", "")
        too_large = Fault(413, "body", f"a body may have {most:,} bytes", "send less")
        if length.isdecimal() and int(length) > IGNORED:
            raise too_large
        try:
            async with asyncio.timeout(self._state.rules.read):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    if size > IGNORED or (size > most and not message.get("more_body")):
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            seconds = self._state.rules.read
            raise Fault(408, "body", f"the body did not come within {seconds:g} s", "send it at once") from error


class ClientLeft(Exception):
    """Nobody waits for the answer."""


async def _until_left(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def fault_of(error: Exception) -> Fault:
    """The answer to what went wrong."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, HTTPException):
        return Fault(error.status_code, "route", str(error.detail), "see /openapi.json")
    if isinstance(error, InputError):
        return Fault(422, "validation", cut(error.problem), cut(error.fix))
    if isinstance(error, Refused):
        return Fault(429, "overloaded", str(error), "come again later", error.retry_after)
    if isinstance(error, Unavailable):
        return Fault(503, "unavailable", str(error), "come again later", error.retry_after)
    if isinstance(error, TooLate):
        return Fault(503, "deadline", str(error), "come again later", 1.0)
    if isinstance(error, SparsebertError):
        return Fault(500, "model", cut(error.problem), cut(error.fix))
    return Fault(500, "internal", "the server failed", "its log has more, under the request's id")


def _error(fault: Fault, request_id: str) -> Response:
    headers = {} if fault.retry_after is None else {"retry-after": str(max(1, math.ceil(fault.retry_after)))}
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    if fault.status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    content = {"error": fault.error, "type": fault.kind, "request_id": request_id, "hint": fault.hint}
    return JSONResponse(content, fault.status, headers)
