"""HTTP in front of a served model: the routes. `app_of` makes the ASGI app."""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Callable

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from sparsebert import __version__, heads
from sparsebert.errors import InputError, SparsebertError, cut
from sparsebert.serving import bodies, pages
from sparsebert.serving.batcher import Refused
from sparsebert.serving.faults import Fault, answer_of, fault_of
from sparsebert.serving.guard import PROBES, Guard
from sparsebert.serving.served import STOPPING, Answer, Served, Text, TooLate, Unavailable
from sparsebert.serving.state import State

KEY = {"type": "http", "scheme": "bearer", "description": "the API key, if the server has one"}
# What a request for answers may come to, beside 200.
FAULTS = {
    400: "no JSON", 401: "the API key is missing or wrong", 408: "the body did not come in time",
    413: "the body is too large, or has too many texts", 422: "fields or texts that are not understood",
    429: "too many requests, or it would wait too long: see Retry-After", 503: "no engine, or it was too late",
}  # fmt: skip


def app_of(state: State) -> Guard:
    """The ASGI app: FastAPI's routes inside the guard."""
    # Without FastAPI's own pages, which load scripts from afar.
    app = FastAPI(title="sparsebert", version=__version__, docs_url=None, redoc_url=None)

    async def answered(texts: list[Text], long: bodies.Long) -> Answer:
        answer = await _answer(state.served, state, texts, long)
        state.metrics.texts.inc(len(texts))
        state.metrics.tokens.inc(answer.tokens)
        for name in ("queue", "tokenizing", "inference"):
            getattr(state.metrics, name).observe(getattr(answer, name))
        if state.shadow is not None and random.random() < state.shadow_rate:
            state.beside(_compare(state, texts, long, answer))
        return answer

    def scores_of(answer: Answer, activation: str | None) -> np.ndarray:
        name = activation or DEFAULT_ACTIVATION[answer.facts["problem"]]
        return ACTIVATIONS[name](answer.logits)

    def scored(asked: bodies.Predict, answer: Answer, alone: bool) -> Response:
        scores = scores_of(answer, "identity" if asked.raw_scores else asked.activation)
        rows = []
        for row in scores.tolist():
            ranked = sorted(zip(answer.facts["labels"], row, strict=True), key=lambda pair: -pair[1])[: asked.top_k]
            rows.append([{"label": label, "score": score} for label, score in ranked])
        return _json(rows[0] if alone else rows, answer)

    async def to_predict(request: Request) -> tuple[bodies.Predict, list[Text], bool]:
        asked = await bodies.read(request, bodies.Predict)
        if asked.raw_scores and asked.activation not in (None, "identity"):
            raise Fault(
                422, "validation", f"raw_scores and activation {asked.activation} exclude each other", "send one"
            )
        return asked, *bodies.texts_of(asked.inputs, state.rules)

    @app.post("/predict", openapi_extra=_described("Predict", "Scores"))
    async def predict(request: Request) -> Response:
        """Classify texts: of each text the labels with their scores, the highest first."""
        asked, texts, alone = await to_predict(request)
        return scored(asked, await answered(texts, asked), alone)

    @app.post("/shadow/predict", openapi_extra=_described("Predict", "Scores", {404: "there is no shadow"}))
    async def shadow_predict(request: Request) -> Response:
        """The answer of the model beside the served one, with --shadow."""
        if state.shadow is None:
            raise Fault(404, "model", "there is no shadow", "begin the server with --shadow DIR")
        asked, texts, alone = await to_predict(request)
        return scored(asked, await _answer(state.shadow, state, texts, asked), alone)

    @app.post("/rerank", openapi_extra=_described("Rerank", None, {424: "the model has other than one logit"}))
    async def rerank(request: Request) -> Response:
        """Rank texts for a query, by a model of one logit."""
        asked = await bodies.read(request, bodies.Rerank)
        if state.served.facts["problem"] != heads.ONE_LOGIT.name:
            raise Fault(424, "model", f"{state.name} has {len(state.served.facts['labels'])} labels", "ask /predict")
        bodies.require_few(len(asked.texts), state.rules)
        answer = await answered([(asked.query, text) for text in asked.texts], asked)
        scores = ACTIVATIONS["identity" if asked.raw_scores else "sigmoid"](answer.logits)[:, 0].tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        rows = [
            {"index": i, "score": scores[i]} | ({"text": asked.texts[i]} if asked.return_text else {}) for i in order
        ]
        return _json(rows, answer)

    @app.post("/classify", openapi_extra=_described("Classify", None, {404: "the model has another name"}))
    async def classify(request: Request) -> Response:
        """Classify texts, in the shape of vLLM's /classify. The label of a text that may have several is null."""
        asked = await bodies.read(request, bodies.Classify)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if asked.model not in (None, state.name):
            raise Fault(
                404, "model", f"there is no model {cut(asked.model, 64)!r}, only {state.name!r}", "leave it out"
            )
        if not texts:
            raise Fault(422, "validation", "input must hold at least one text, holds none", "send a text")
        bodies.require_few(len(texts), state.rules)
        answer = await answered(texts, asked)
        scores, count, names = scores_of(answer, None), len(answer.facts["labels"]), names_of(answer)
        rows = [
            {"index": i, "label": names[i] if names else None, "probs": row.tolist(), "num_classes": count}
            for i, row in enumerate(scores)
        ]
        return _json(
            {
                "id": f"classify-{request.state.request_id}", "object": "list", "created": int(time.time()),
                "model": state.name, "data": rows,
                "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens},
            },
            answer,
        )  # fmt: skip

    def names_of(answer: Answer) -> list[str]:
        """The label of each text; none if a text may have several."""
        facts = answer.facts
        several = facts["problem"] == heads.MULTI_LABEL.name
        return [] if several else [facts["labels"][i] for i in answer.logits.argmax(axis=1)]

    def outputs_of(facts: dict) -> dict[str, tuple[str, list[int]]]:
        """Of each output of `infer` its type and shape. There is no label where a text may have several."""
        count = len(facts["labels"])
        found = {"logits": ("FP32", [-1, count]), "scores": ("FP64", [-1, count]), "label": ("BYTES", [-1])}
        if facts["problem"] == heads.MULTI_LABEL.name:
            del found["label"]
        return found

    def require_model(name: str) -> None:
        if name != state.name:
            raise Fault(404, "model", f"there is no model {cut(name, 64)!r}, only {state.name!r}", "see /info")

    @app.post("/v2/models/{name}/infer", openapi_extra=_described("Infer", None, {404: "the model has another name"}))
    async def infer(name: str, request: Request) -> Response:
        """Classify texts, by KServe's open inference protocol. Inputs text and, for pairs, text_pair; parameters:
        truncate, window, stride.
        """
        require_model(name)
        asked = await bodies.read(request, bodies.Infer)
        texts, long = bodies.tensors_of(asked), bodies.long_of(asked)
        bodies.require_few(len(texts), state.rules)
        known = list(outputs_of(state.served.facts))
        wanted = known if asked.outputs is None else [output.name for output in asked.outputs]
        if unknown := [output for output in wanted if output not in known]:
            raise Fault(422, "validation", f"there is no output {cut(unknown[0], 40)!r}", f"known: {', '.join(known)}")
        answer = await answered(texts, long)
        values = {"logits": answer.logits, "scores": scores_of(answer, None), "label": np.array(names_of(answer))}
        outputs = [
            {
                "name": kind,
                "datatype": datatype,
                "shape": list(values[kind].shape),
                "data": values[kind].ravel().tolist(),
            }
            for kind, (datatype, _) in outputs_of(answer.facts).items()
            if kind in wanted
        ]
        said = {} if asked.id is None else {"id": asked.id}
        return _json({"model_name": state.name, "model_version": "1", **said, "outputs": outputs}, answer)

    @app.get("/v2")
    async def server() -> dict:
        return {"name": "sparsebert", "version": __version__, "extensions": []}

    @app.get("/v2/models/{name}")
    async def metadata(name: str) -> dict:
        require_model(name)
        tensors = {"text": ("BYTES", [-1]), "text_pair": ("BYTES", [-1])}, outputs_of(state.served.facts)
        inputs, outputs = (
            [{"name": kind, "datatype": datatype, "shape": shape} for kind, (datatype, shape) in each.items()]
            for each in tensors
        )
        return {"name": name, "versions": ["1"], "platform": "sparsebert", "inputs": inputs, "outputs": outputs}

    def probe(*paths: str) -> Callable:
        def add(endpoint: Callable) -> Callable:
            for path in paths:
                app.add_api_route(path, endpoint, methods=["GET"])
                app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
            return endpoint

        return add

    @probe("/health/live", "/v2/health/live")
    async def live() -> dict:
        return {"live": True}

    @probe("/health", "/health/ready", "/v2/health/ready")
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
            "truncates_at": min(facts["truncates_at"], state.rules.tokens or facts["truncates_at"]),
            "activation": DEFAULT_ACTIVATION[facts["problem"]], "shadow": state.shadow is not None,
            "limits": {
                "body_bytes": state.rules.body, "items": state.rules.items,
                "tokens": state.rules.tokens or facts["max_length"], "batch_tokens": limits.batch_tokens,
                "in_flight": limits.in_flight, "wait_seconds": limits.wait, "seconds": state.rules.seconds,
            },
        }  # fmt: skip

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        known, served = state.metrics, state.served
        known.flight.set(served.in_flight)
        known.waiting.set(served.batcher.waiting)
        known.batches.set(served.counts.batches)
        known.ran.set(served.counts.texts)
        known.restarts.set(served.counts.restarts)
        known.model.clear()
        known.model.labels(state.name, served.facts["content_sha256"], served.facts["dtype"]).set(1)
        return Response(generate_latest(known.registry), media_type="text/plain; version=0.0.4")

    @app.get("/stats")
    async def stats() -> dict:
        """The last minute, second by second."""
        return {"seconds": state.recent.rows(time.monotonic()), "in_flight": state.served.in_flight}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page(pages.front())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(pages.reference(app.openapi()))

    plain = app.openapi

    @functools.cache
    def openapi() -> dict:
        document = plain()
        document["components"] = {"schemas": bodies.schemas(), "securitySchemes": {"key": KEY}}
        document["security"] = [{}, {"key": []}]
        for path, route in document["paths"].items():
            for answers in (operation["responses"] for operation in route.values()):
                if "HTTPValidationError" in json.dumps(answers.get("422", {})):
                    del answers["422"]  # FastAPI's own error, of another shape, for a name that is no string
                if path not in PROBES and not path.endswith("/ready"):
                    answers.setdefault("401", _of_error(FAULTS[401]))
                if "{name}" in path:
                    answers.setdefault("404", _of_error("the model has another name"))
                if path.endswith("/ready"):
                    answers["503"] = {"description": FAULTS[503]}
        return document

    app.openapi = openapi

    async def told(request: Request, error: Exception) -> Response:
        request.scope["fault"] = fault_of(error)
        return answer_of(request.scope["fault"], request.state.request_id)

    for kind in (HTTPException, Fault, Refused, Unavailable, TooLate, SparsebertError, Exception):
        app.add_exception_handler(kind, told)
    direct = {"/predict": predict, "/shadow/predict": shadow_predict, "/rerank": rerank, "/classify": classify}
    return Guard(app, state, direct)


def _described(asked: str, answered: str | None, faults: dict[int, str] | None = None) -> dict:
    """A route's part of the OpenAPI document: what it takes, by name, and what it may answer."""
    schema = {"type": "object"} if answered is None else {"$ref": bodies.COMPONENT.format(model=answered)}
    found = {status: _of_error(text) for status, text in sorted({**FAULTS, **(faults or {})}.items())}
    content = {"application/json": {"schema": {"$ref": bodies.COMPONENT.format(model=asked)}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "the answer", "content": {"application/json": {"schema": schema}}},
            **{str(status): response for status, response in found.items()},
        },
    }


def _of_error(description: str) -> dict:
    schema = {"$ref": bodies.COMPONENT.format(model="Error")}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _page(text: str) -> Response:
    """Nothing from elsewhere is loaded, whatever a text says."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return HTMLResponse(text, headers={"content-security-policy": f"{policy}; frame-ancestors 'self'; base-uri 'none'"})


async def _answer(served: Served, state: State, texts: list[Text], long: bodies.Long) -> Answer:
    if state.refusing:
        raise Unavailable(STOPPING, 1.0)
    rules, windows = state.rules, long.windows(state.rules)
    how = {"truncate": long.truncate, "max_length": rules.tokens} if windows is None else {"windows": windows}
    try:
        return await served.answer(texts, seconds=rules.seconds, **how)
    except InputError as error:
        if "truncate=True" not in error.fix:
            raise
        hint = 'send "truncate": true, or "window": so many tokens, or a shorter text'
        raise Fault(422, "validation", cut(error.problem), hint) from error


async def _compare(state: State, texts: list[Text], long: bodies.Long, answer: Answer) -> None:
    """Runs texts that were answered on the shadow, and counts how often it says the same."""
    metrics = state.metrics
    try:
        dense = await _answer(state.shadow, state, texts, long)
    except (Refused, Unavailable, TooLate, SparsebertError):
        metrics.skipped.inc()
        return
    if answer.facts is not state.served.facts:
        return  # a model that was swapped meanwhile, with labels of its own
    problem = heads.PROBLEMS[answer.facts["problem"]]
    if problem is heads.ONE_LOGIT:
        said = [logits[:, 0] > 0 for logits in (answer.logits, dense.logits)]
    else:
        columns = heads.columns(dense.facts["labels"], answer.facts["labels"], str(state.shadow.directory))
        said = [problem.predict(logits) for logits in (answer.logits, dense.logits[:, columns])]
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
        "x-inference-time": f"{1e3 * answer.inference:.3f}", "x-compute-tokens": str(answer.tokens),
    }  # fmt: skip
    if answer.cut:
        headers["x-truncated"] = ",".join(map(str, answer.cut))
    if max(answer.windows) > 1:
        headers["x-windows"] = ",".join(map(str, answer.windows))
    return Response(json.dumps(content, allow_nan=False), media_type="application/json", headers=headers)
