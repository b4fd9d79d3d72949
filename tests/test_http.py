"""The server, over HTTP: a process of its own, asked by sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, spawned, until
from models import classifier, flipped, saved

from sparsebert import Engine, checkpoint
from sparsebert.engine.inputs import Inputs
from sparsebert.heads import sigmoid, softmax


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("served") / "model")


class Running:
    """A server that was begun by the command, and what it says."""

    def __init__(
        self, directory: Path, *flags: object, env: dict | None = None, port: int = 0, before: tuple[str, ...] = ()
    ):
        given = ("-m", "sparsebert", "serve", directory, "--port", port, "--threads", 1, *flags)
        command = [*before, sys.executable, *given]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.told = json.loads(line)
        self.port = int(self.told["url"].rpartition(":")[2])
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def ask(self, route: str, body=None, *, headers: dict | None = None, method: str = "") -> tuple[int, object, dict]:
        """(status, document, headers) of an answer. body: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if raw is None else "POST"), route, raw, headers or {})
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if "json" in found["content-type"] else text.decode(), found

    def metric(self, name: str) -> float:
        text = self.ask("/metrics")[1]
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))

    @property
    def engines(self) -> list[int]:
        """The processes of engines."""
        return spawned(self.process.pid)

    @property
    def engine(self) -> int:
        """The process of the engine."""
        return self.engines[0]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def running(directory: Path, *flags: object, **settings) -> Iterator[Running]:
    server = Running(directory, *flags, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(server.engine, signal.SIGCONT)
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def server(model):
    with running(model) as begun:
        yield begun


# --- answers ----------------------------------------------------------------------------------------------------------


def scores(document: list[dict]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in document}


def test_a_text_a_pair_and_a_batch_get_the_engines_probabilities(model, server):
    engine = Engine.load(model)
    texts = ["a gripping film", ("it rained", "it was wet"), "so so"]
    wanted = softmax(engine.logits(texts))
    forms = [["a gripping film"], ["it rained", "it was wet"], {"text": "so so"}]
    status, document, headers = server.ask("/predict", {"inputs": forms})
    assert status == 200 and [row["label"] for row in document[0]] == [
        engine.labels[i] for i in (-wanted[0]).argsort(kind="stable")
    ]
    for row, found in zip(wanted, document, strict=True):
        assert scores(found) == pytest.approx(dict(zip(engine.labels, row, strict=True)), abs=1e-5)
    assert int(headers["x-compute-tokens"]) == sum(map(len, engine.encode(texts)[0])) and "x-truncated" not in headers
    assert all(float(headers[f"x-{name}-time"]) >= 0 for name in ("queue", "tokenization", "inference"))
    for alone in ("a gripping film", {"text": "a gripping film"}):
        status, document, _ = server.ask("/predict", {"inputs": alone})
        assert status == 200 and scores(document) == pytest.approx(
            dict(zip(engine.labels, wanted[0], strict=True)), abs=1e-5
        )
    status, document, _ = server.ask(
        "/predict", {"inputs": {"text": "it rained", "text_pair": "it was wet"}, "top_k": 1}
    )
    assert [row["label"] for row in document] == [engine.labels[wanted[1].argmax()]]


def test_scores_are_those_that_are_asked_for(model, server):
    logits = Engine.load(model).logits(["a film"])
    for flags, wanted in (
        ({"raw_scores": True}, logits), ({"activation": "sigmoid"}, sigmoid(logits)),
        ({"activation": "identity"}, logits),
    ):  # fmt: skip
        document = server.ask("/predict", {"inputs": "a film", **flags})[1]
        assert sorted(scores(document).values()) == pytest.approx(sorted(wanted[0]), abs=1e-5), flags


def test_a_long_text_is_an_error_unless_it_may_be_cut(server):
    long = "good " * 2000
    status, document, _ = server.ask("/predict", {"inputs": long})
    assert status == 422 and "at most 512 tokens" in document["error"] and document["type"] == "validation"
    status, _, headers = server.ask("/predict", {"inputs": [["a film"], [long]], "truncate": True})
    assert status == 200 and headers["x-truncated"] == "1"


def test_a_long_text_is_read_whole_in_windows(model, server):
    engine, long = Engine.load(model), "a film that is good " * 60
    (ids,), _, _ = Inputs(checkpoint.read(model)).encode([long])
    begin, end, words = ids[0], ids[-1], ids[1:-1]
    windows = [[begin, *words[i : i + 98], end] for i in range(0, len(words) - 98 + 50, 50)]
    wanted = softmax(engine.logits(windows).mean(axis=0, keepdims=True))[0]
    for settings in ({"window": 100}, {"window": 100, "stride": 50}):
        status, document, headers = server.ask("/predict", {"inputs": [["so so"], [long]], **settings})
        assert status == 200 and headers["x-windows"] == f"1,{len(windows)}"
        assert scores(document[1]) == pytest.approx(dict(zip(engine.labels, wanted, strict=True)), abs=1e-5)
        assert scores(document[0]) == pytest.approx(scores(server.ask("/predict", {"inputs": "so so"})[1]), abs=1e-5)
    status, document, headers = server.ask("/classify", {"input": long, "window": 100})
    assert status == 200 and headers["x-windows"] == str(len(windows))
    assert document["data"][0]["probs"] == pytest.approx(wanted, abs=1e-5)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [long]}
    asked = {"inputs": [tensor], "parameters": {"window": 100, "stride": 50, "binary_data_output": False}}
    document = server.ask("/v2/models/model/infer", asked)[1]
    assert document["outputs"][1]["data"] == pytest.approx(wanted, abs=1e-5)


def test_windows_of_a_pair_go_over_the_second_text(model, server):
    engine, long = Engine.load(model), "a film that is good " * 60
    ids, types, _ = engine.encode([("so so", long)], max_length=512)
    first = ids[0].index(engine.encode(["so"])[0][0][-1], 1) + 1
    room, words = 100 - first - 1, ids[0][first:-1]
    starts = range(0, len(words) - room + 40, 40)
    rows = [(ids[0][:first] + words[i : i + room] + ids[0][-1:]) for i in starts]
    kinds = [types[0][:first] + [1] * (len(row) - first) for row in rows]
    wanted = softmax(engine.forward(rows, kinds).mean(axis=0, keepdims=True))[0]
    asked = {"inputs": {"text": "so so", "text_pair": long}, "window": 100, "stride": 40}
    status, document, headers = server.ask("/predict", asked)
    assert status == 200 and headers["x-windows"] == str(len(rows))
    assert scores(document) == pytest.approx(dict(zip(engine.labels, wanted, strict=True)), abs=1e-5)


def test_windows_that_would_leave_tokens_out_or_are_too_many_are_refused(server):
    long = "good " * 2000
    for settings, said in (
        ({"window": 100, "stride": 99}, "tokens between two that begin 99 apart would be left out"),
        ({"window": 2}, "greater than or equal to 3"), ({"window": 513}, "may have 512 tokens"),
        ({"window": 32}, "at most 32 are allowed"), ({"stride": 5}, "there is no window"),
        ({"window": 100, "truncate": True}, "exclude each other"), ({"window": 100, "stride": 0}, "stride"),
    ):  # fmt: skip
        status, document, _ = server.ask("/predict", {"inputs": long, **settings})
        assert status == 422 and said in document["error"], settings
    status, document, _ = server.ask("/predict", {"inputs": [["good " * 300]] * 20, "window": 200})
    assert status == 422 and "at most 32 are allowed" in document["error"]
    status, document, _ = server.ask("/predict", {"inputs": {"text": long, "text_pair": "a"}, "window": 200})
    assert status == 422 and "the first part of the pair" in document["error"]


def test_texts_are_ranked_by_a_model_of_one_logit(tmp_path, server):
    directory = saved(tmp_path / "reranker", labels=1)
    with running(directory) as begun:
        texts = ["it was wet", "it was dry", "so so"]
        status, document, _ = begun.ask("/rerank", {"query": "it rained", "texts": texts, "return_text": True})
        logits = Engine.load(directory).logits([("it rained", text) for text in texts])[:, 0]
        assert status == 200 and [row["index"] for row in document] == (-logits).argsort().tolist()
        assert [row["score"] for row in document] == pytest.approx(sorted(sigmoid(logits), reverse=True), abs=1e-5)
        assert document[0]["text"] == texts[logits.argmax()]
    status, document, _ = server.ask("/rerank", {"query": "it rained", "texts": texts})
    assert status == 424 and "2 labels" in document["error"]


def test_the_shape_of_vllm(model, server):
    probabilities = softmax(Engine.load(model).logits(["a film", "so so"]))
    status, document, _ = server.ask("/classify", {"input": ["a film", "so so"], "model": "model"})
    assert status == 200 and document["object"] == "list" and document["usage"]["total_tokens"] > 4
    for row, wanted in zip(document["data"], probabilities, strict=True):
        assert row["probs"] == pytest.approx(wanted, abs=1e-5) and row["num_classes"] == 2
        assert row["label"] == Engine.load(model).labels[wanted.argmax()]
    assert server.ask("/classify", {"input": "a film", "model": "another"})[0] == 404


def test_the_open_inference_protocol(model, server):
    engine = Engine.load(model)
    pairs = [("it rained", "it was wet"), ("so so", "a film")]
    columns = [{"name": name, "shape": [2], "datatype": "BYTES", "data": [pair[i] for pair in pairs]}
               for i, name in enumerate(("text", "text_pair"))]  # fmt: skip
    status, document, _ = server.ask("/v2/models/model/infer", {"id": "42", "inputs": columns})
    assert status == 200 and (document["id"], document["model_name"]) == ("42", "model")
    found = {output["name"]: output for output in document["outputs"]}
    wanted = engine.logits(pairs)
    assert found["logits"]["data"] == pytest.approx(wanted.ravel(), abs=1e-5) and found["logits"]["shape"] == [2, 2]
    assert found["scores"]["data"] == pytest.approx(softmax(wanted).ravel(), abs=1e-5)
    assert found["label"]["data"] == [engine.labels[i] for i in wanted.argmax(1)]
    alone = {"inputs": [columns[0] | {"shape": [2, 1]}], "outputs": [{"name": "label"}]}
    status, document, _ = server.ask("/v2/models/model/infer", alone)
    assert status == 200 and [output["name"] for output in document["outputs"]] == ["label"]
    metadata = server.ask("/v2/models/model")[1]
    assert [part["name"] for part in metadata["inputs"]] == ["text", "text_pair"] and metadata["outputs"][0][
        "shape"
    ] == [-1, 2]
    for route in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/model/ready"):
        assert server.ask(route)[0] == 200
    assert server.ask("/v2/models/another")[0] == server.ask("/v2/models/another/infer", alone)[0] == 404
    for bad in (
        {"inputs": []}, {"inputs": [columns[1]]}, {"inputs": [columns[0], columns[0]]},
        {"inputs": [columns[0] | {"shape": [3]}]},
        {"inputs": [columns[0] | {"datatype": "INT32"}]}, {"inputs": [columns[0] | {"data": [1, 2]}]},
        {"inputs": [columns[0], columns[1] | {"shape": [1], "data": ["a"]}]},
        {"inputs": [columns[0]], "parameters": {"truncate": "yes"}},
        {"inputs": [columns[0] | {"shape": [0], "data": []}]},
        {"inputs": [columns[0]], "outputs": [{"name": "probabilities"}]},
        {"inputs": [columns[0]], "parameters": {"window": "many"}},
        {"inputs": [columns[0]], "parameters": {"truncat": 1}},
    ):  # fmt: skip
        assert server.ask("/v2/models/model/infer", bad)[0] == 422, bad
    assert server.metric(r'sparsebert_requests_total\{route="/v2/models/\{name\}/infer",status="200"\}') >= 2


def test_a_text_that_may_have_several_labels_is_not_given_one(tmp_path):
    model = classifier()
    model.config.problem_type = "multi_label_classification"
    with running(saved(tmp_path / "several", model)) as begun:
        assert begun.ask("/classify", {"input": "a film"})[1]["data"][0]["label"] is None
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a film"]}
        document = begun.ask("/v2/models/several/infer", {"inputs": [tensor]})[1]
        assert [output["name"] for output in document["outputs"]] == ["logits", "scores"]
        assert [output["name"] for output in begun.ask("/v2/models/several")[1]["outputs"]] == ["logits", "scores"]


def test_it_says_what_it_serves_and_within_which_limits(model, server):
    assert server.told["model"] == "model" and server.told["pid"] == server.process.pid
    document = server.ask("/info")[1]
    assert document["labels"] == Engine.load(model).labels and document["activation"] == "softmax"
    assert document["limits"]["items"] == 32 and document["limits"]["tokens"] == 512
    assert server.ask("/health/live")[:2] == (200, {"live": True}) and server.ask("/health/ready")[:2] == (
        200,
        {"ready": True},
    )
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("HEAD", "/health")
        assert connection.getresponse().status == 200
    paths = server.ask("/openapi.json")[1]["paths"]
    assert {"/predict", "/rerank", "/classify", "/info", "/metrics"} <= paths.keys()


def test_every_request_has_an_id_and_is_counted_and_logged_once(model):
    with running(model) as begun:
        assert (
            begun.ask("/predict", {"inputs": "a film"}, headers={"X-Request-Id": "mine-1"})[2]["x-request-id"]
            == "mine-1"
        )
        made = begun.ask("/predict", b"{", headers={"X-Request-Id": "bad id!"})
        assert made[0] == 400 and made[1]["request_id"] == made[2]["x-request-id"] != "bad id!"
        begun.ask("/nowhere")
        assert begun.metric("sparsebert_requests_total") == 3, "the one for the metrics is not over"
        assert begun.metric("sparsebert_texts_total") == 1
        assert begun.end() == 0
    whole = [json.loads(line) for line in begun.lines]
    assert whole[0]["model"] == "model" and whole[-1]["stopping"] and all(line["time"] for line in whole)
    logged = [line for line in whole if "route" in line]
    told = [(line["route"], line["status"]) for line in logged]
    assert "error" not in logged[0] and logged[1]["error"]
    assert told[:3] == [("/predict", 200), ("/predict", 400), ("other", 404)] and logged[0]["request_id"] == "mine-1"


def test_a_shadow_is_asked_beside_and_compared_by_the_names_of_its_labels(model, tmp_path):
    other = flipped()
    for shadow, same in ((turned(tmp_path / "turned"), 10), (saved(tmp_path / "opposite", other), 0)):
        with running(model, "--shadow", shadow, "--shadow-rate", 1) as begun:
            document = begun.ask("/shadow/predict", {"inputs": "so so"})[1]
            engine = Engine.load(shadow)
            (row,) = softmax(engine.logits(["so so"]))
            assert scores(document) == pytest.approx(dict(zip(engine.labels, row, strict=True)), abs=1e-5)
            for i in range(5):
                assert begun.ask("/predict", {"inputs": [[f"a film {i}"], ["so so"]]})[0] == 200
            until(lambda begun=begun: begun.metric("sparsebert_shadow_texts_total") == 10)
            assert begun.metric("sparsebert_shadow_same_total") == same
            assert begun.metric("sparsebert_shadow_seconds_count") == 10
            assert begun.end() == 0


def test_without_a_shadow_there_is_none_to_ask(server):
    assert server.ask("/shadow/predict", {"inputs": "a"})[0] == 404 and server.ask("/info")[1]["shadow"] is False


def test_a_shadow_with_other_labels_is_refused(model, tmp_path, capsys):
    said = refused(capsys, "serve", model, "--port", 0, "--shadow", saved(tmp_path / "three", labels=3))
    assert "three has 3 labels (entailment, neutral, contradiction), 2" in said
    said = refused(capsys, "serve", model, "--port", 0, "--shadow", saved(tmp_path / "one", labels=1))
    assert "is a one_logit model, the served one is single_label" in said


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = {
    "no JSON": b"{", "no UTF-8": b'{"inputs": "\xff"}', "nothing": b"", "NaN": b'{"inputs": NaN}',
    "lone surrogate": b'{"inputs": "\\ud800"}', "deep": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number": {"inputs": 3}, "null": {"inputs": None}, "no inputs": {}, "a list": [1], "empty text": {"inputs": ""},
    "blank text": {"inputs": "  "}, "empty batch": {"inputs": []}, "empty item": {"inputs": [[]]},
    "plain list": {"inputs": ["a", "b"]}, "three": {"inputs": [["a", "b", "c"]]}, "mixed": {"inputs": [["a", 1]]},
    "many": {"inputs": [["a"]] * 33}, "unknown field": {"inputs": "a", "max_length": 9},
    "top 0": {"inputs": "a", "top_k": 0},
    "truncate 1": {"inputs": "a", "truncate": 1}, "unknown activation": {"inputs": "a", "activation": "tanh"},
    "both": {"inputs": "a", "raw_scores": True, "activation": "softmax"}, "object": {"inputs": {"txt": "a"}},
    "large": b" " * 2_100_000, "ten megabytes": b'{"inputs": "' + b"a" * 10_000_000 + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_question_gets_an_error_of_one_shape(server, name):
    status, document, _ = server.ask("/predict", BAD[name])
    assert 400 <= status < 500, document
    assert document.keys() == {"error", "type", "request_id", "hint"} and all(map(str, document.values()))
    assert document["error"] and "\n" not in document["error"] and len(document["error"]) < 600
    assert server.ask("/predict", {"inputs": "a film"})[0] == 200


def test_odd_texts_end_nothing(server):
    """A word of a million characters is one unknown token, and a NUL character is none."""
    for text in ("x" * 1_000_000, "a\0b", "\u202e\ufffe"):
        assert server.ask("/predict", {"inputs": text})[0] in (200, 422)


def resident(pid: int) -> float:
    """Megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_bodies_that_were_refused_are_forgotten_at_once(server):
    body = b" " * 2_100_000
    for _ in range(5):
        server.ask("/predict", body)
    before = resident(server.process.pid)
    for _ in range(60):
        assert server.ask("/predict", body)[0] == 413
    assert resident(server.process.pid) < before + 20, "of 120 MB that came"


def test_a_body_without_a_length_is_read_no_further_than_it_may_be(server):
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with contextlib.suppress(OSError):
            for _ in range(1100):
                connection.sendall(piece)
        with contextlib.suppress(OSError):
            assert b" 413 " in connection.recv(4096)
    assert server.ask("/predict", {"inputs": "a film"})[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(model):
    with (
        running(model, "--read-timeout", 0.2) as begun,
        socket.create_connection(("127.0.0.1", begun.port), 20) as connection,
    ):
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = connection.recv(4096)
        assert b" 408 " in answer and b"connection: close" in answer.lower()


def test_a_head_that_does_not_come_or_does_not_end_is_not_waited_for(model):
    def answer(*parts: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", begun.port), 20) as connection:
            with contextlib.suppress(OSError):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.01)
                return b"".join(iter(lambda: connection.recv(4096), b""))
        return b""

    whole = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(model, "--read-timeout", 0.3) as begun:
        for parts in (
            (b"",),
            (b"GET /health/li",),
            (b"GET /health/live HTTP/1.1\r\nHost: x\r\nA: ",),
            (whole, b"GET /h"),
            (whole, b"\r\n"),  # uvicorn would wait for ever
        ):
            found = answer(*parts)
            assert b"HTTP/1.1 408 " in found and b'"type": "http"' in found, parts
        found = answer(b"GET / HTTP/1.1\r\n", *[b"A: " + b"a" * 4093 + b"\r\n"] * 20)
        assert b"HTTP/1.1 431 " in found or found == b""
        assert b"HTTP/1.1 400 " in (found := answer(b"\x16\x03\x01\x02\x00")) and b"no HTTP request" in found
        assert begun.ask("/predict", {"inputs": "a film"})[0] == 200
        with socket.create_connection(("127.0.0.1", begun.port), 20) as idle:  # between two requests, as long as others
            for _ in range(3):
                idle.sendall(whole)
                time.sleep(0.5)
                assert b"200 OK" in idle.recv(4096)


def test_trailers_without_end_are_not_kept(model):
    with running(model) as begun, socket.create_connection(("127.0.0.1", begun.port), 20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        before = resident(begun.process.pid)
        for _ in range(400):
            connection.sendall(b"A: a\r\n" * 10_000)
        assert resident(begun.process.pid) < before + 20, "24 MB of trailers were sent"


def test_an_offer_to_speak_another_protocol_is_not_heard(server):
    body = b'{"inputs": "a film"}'
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    head += b"HTTP2-Settings: AAE\r\nContent-Length: %d\r\n\r\n" % len(body)
    at = head.index(b"rade: h2c")
    apart = (head[:40], head[40:at], head[at:-1], head[-1:] + body)
    for parts in ((head + body,), (head, body), apart):  # Java's client sends the second
        with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
            for _ in range(2):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.05)
                answer = connection.recv(4096)
                assert b"HTTP/1.1 200 " in answer and b"label" in answer, answer


def test_what_is_no_request_has_an_id_and_is_counted_and_logged(model):
    with running(model) as begun:
        with socket.create_connection(("127.0.0.1", begun.port), 20) as connection:
            connection.sendall(b"\x16\x03\x01\r\n\r\n")
            answer = connection.recv(4096)
        (request_id,) = re.findall(rb"x-request-id: (\w+)", answer)
        assert json.loads(answer.split(b"\r\n\r\n")[1])["request_id"] == request_id.decode()
        assert begun.metric(r'sparsebert_requests_total\{route="none",status="400"\}') == 1
        assert begun.end() == 0
    logged = [json.loads(line) for line in begun.lines]
    assert [line["status"] for line in logged if line.get("request_id") == request_id.decode()] == [400]


def test_a_key_is_asked_for_everywhere_but_by_probes_and_is_in_no_log(model, tmp_path):
    key = "k" * 20
    (file := tmp_path / "key").write_text(f"{key}\n")
    file.chmod(0o600)
    with running(model, "--api-key-file", file, "--host", "0.0.0.0") as begun:
        for route, body in (
            ("/predict", {"inputs": "a"}),
            ("/info", None),
            ("/metrics", None),
            ("/stats", None),
        ):
            assert begun.ask(route, body)[0] == 401
            assert begun.ask(route, body, headers={"Authorization": f"Bearer {key}x"})[0] == 401
            assert begun.ask(route, body, headers={"Authorization": key})[0] == 401
            assert begun.ask(route, body, headers={"Authorization": f"Bearer {key}"})[0] == 200
            assert begun.ask(route, body, headers={"Authorization": f"bearer {key}"})[0] == 200
        assert begun.ask("/predict", {"inputs": "a"})[2]["www-authenticate"] == "Bearer"
        for route in ("/health/ready", "/health/live", "/", "/docs", "/openapi.json"):
            assert begun.ask(route)[0] == 200, route
        arguments = Path(f"/proc/{begun.process.pid}/cmdline").read_text()
        assert begun.end() == 0
    assert key not in "".join(begun.lines) and key not in arguments
    with running(model, "--host", "0.0.0.0", env={"SPARSEBERT_API_KEY": key}) as begun:
        assert begun.ask("/info")[0] == 401


def test_what_would_not_be_safe_or_cannot_be_is_refused_before_anything_is_served(model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SPARSEBERT_API_KEY", raising=False)
    assert "there is no API key" in refused(capsys, "serve", model, "--host", "0.0.0.0")
    (short := tmp_path / "short").write_text("k")
    assert "at least 16 characters" in refused(capsys, "serve", model, "--api-key-file", short)
    assert "cannot be read" in refused(capsys, "serve", model, "--api-key-file", tmp_path / "none")
    short.write_text("é" * 20)
    assert "printable ASCII" in refused(capsys, "serve", model, "--api-key-file", short)
    assert "at most 512 tokens" in refused(capsys, "serve", model, "--port", 0, "--max-tokens", 513)
    monkeypatch.setenv("SPARSEBERT_API_KEY", "k")
    assert "SPARSEBERT_API_KEY must have at least 16" in refused(capsys, "serve", model, "--host", "0.0.0.0")
    monkeypatch.delenv("SPARSEBERT_API_KEY")
    assert "there is no address" in refused(capsys, "serve", model, "--host", "999.1.1.1", "--insecure")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used" in refused(capsys, "serve", model, "--port", port)
    damaged = saved(tmp_path / "damaged")
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    assert "damaged/model.safetensors" in refused(capsys, "serve", damaged, "--port", 0)
    (open_key := tmp_path / "open").write_text("k" * 20)
    open_key.chmod(0o644)
    with running(model, "--api-key-file", open_key) as begun:
        assert begun.end() == 0
    assert f"warning: {open_key} can be read by others" in begun.lines[0]


def test_the_environment_gives_what_no_flag_gives(model):
    with running(model, env={"SPARSEBERT_SERVE_MAX_ITEMS": "2", "SPARSEBERT_SERVE_THREADS": "2"}) as begun:
        document = begun.ask("/info")[1]
        assert document["limits"]["items"] == 2 and document["threads"] == 1, "a flag goes before its variable"
        assert begun.ask("/predict", {"inputs": [["a"]] * 3})[0] == 413


def test_what_would_be_left_out_is_said(model, capsys, monkeypatch):
    assert "--replicas is of --ray, which is not given" in refused(capsys, "serve", model, "--replicas", "2")
    assert "--shadow-rate is of --shadow" in refused(capsys, "serve", model, "--shadow-rate", 0.5)
    with running(model, env={"SPARSEBERT_SERVE_MAXITEMS": "2"}) as begun:
        assert begun.end() == 0
    assert begun.lines[0] == "warning: SPARSEBERT_SERVE_MAXITEMS is the variable of no flag\n"


def test_a_variable_that_is_none_is_refused(model, capsys, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_SERVE_PORT", "70000")
    assert "port" in refused(capsys, "serve", model)


# --- faults and ends --------------------------------------------------------------------------------------------------


def asked(server: Running, body: dict) -> tuple[threading.Thread, list]:
    """A question in a thread, and what will be answered."""
    found: list = []
    thread = threading.Thread(target=lambda: found.append(server.ask("/predict", body)), daemon=True)
    thread.start()
    return thread, found


def test_more_than_may_be_in_flight_is_told_to_come_again(model):
    with running(model, "--max-in-flight", 2, "--max-wait-ms", 1e6) as begun:
        os.kill(begun.engine, signal.SIGSTOP)
        threads = [asked(begun, {"inputs": "a film"}) for _ in range(2)]
        until(lambda: begun.metric("sparsebert_in_flight") == 2)
        start = time.perf_counter()
        status, document, headers = begun.ask("/predict", {"inputs": "a film"})
        assert (status, document["type"]) == (429, "overloaded") and int(headers["retry-after"]) >= 1
        assert time.perf_counter() - start < 1
        os.kill(begun.engine, signal.SIGCONT)
        for thread, found in threads:
            thread.join(10)
            assert found[0][0] == 200


def test_whoever_leaves_holds_no_place(model):
    with running(model, "--max-wait-ms", 1e6) as begun:
        os.kill(begun.engine, signal.SIGSTOP)
        first, found = asked(begun, {"inputs": "a film"})
        until(lambda: begun.metric("sparsebert_in_flight") == 1)
        body = json.dumps({"inputs": [["a film"]] * 8}).encode()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", begun.port), 20) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
                until(lambda: begun.metric("sparsebert_waiting") == 8)
            until(lambda: begun.metric("sparsebert_waiting") == 0)
        assert begun.metric("sparsebert_in_flight") == 1
        os.kill(begun.engine, signal.SIGCONT)
        first.join(10)
        assert found[0][0] == 200 and begun.metric("sparsebert_texts_total") == 1
        assert begun.metric(r"sparsebert_requests_total\{route=\"/predict\",status=\"499\"\}") == 20


def test_a_text_that_the_engine_would_refuse_is_an_error_of_its_own(tmp_path):
    with running(saved(tmp_path / "roberta", classifier("roberta"))) as begun:
        engine = begun.engine
        for body in ({"inputs": "a <pad> film"}, {"inputs": "a <pad> film " * 9, "window": 8}):
            status, document, _ = begun.ask("/predict", body)
            assert status == 422 and "holds the padding token" in document["error"], document
        assert begun.ask("/predict", {"inputs": "a film"})[0] == 200
        assert begun.engine == engine and begun.metric("sparsebert_engine_restarts") == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/classify", {"input": [1] * 600_000}),
        ("/rerank", {"query": "a", "texts": [1] * 600_000}),
        ("/v2/models/model/infer",
         {"inputs": [{"name": "text", "shape": ["a"] * 300_000, "datatype": "BYTES", "data": ["a"]}]}),
    ],
)  # fmt: skip
def test_a_body_with_many_errors_costs_what_one_does(server, route, body):
    used = spent(server.process.pid)
    status, document, _ = server.ask(route, body)
    assert status == 422 and document["type"] in ("validation", "not_supported"), document
    assert spent(server.process.pid) - used < 1.0, "an error for each takes five seconds, and a gigabyte"


def spent(pid: int) -> float:
    """Seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_directory_that_cannot_be_served_as_asked_is_not_swapped_in(tmp_path, model):
    first = saved(tmp_path / "model")
    short = saved(tmp_path / "short", max_position_embeddings=32)
    three = saved(tmp_path / "three", labels=3)
    with running(first, "--max-tokens", 48, "--shadow", model, "--shadow-rate", 1) as begun:
        for other, said in ((short, "at most 32 tokens of a text"), (three, "three labels|3 labels|2 labels")):
            first.rename(tmp_path / "aside")
            other.rename(first)
            begun.process.send_signal(signal.SIGHUP)
            until(lambda said=said: any(re.search(f"not loaded anew.*({said})", line) for line in begun.lines))
            assert begun.ask("/predict", {"inputs": "a film"})[0] == 200 and len(begun.engines) == 2
            first.rename(other)
            (tmp_path / "aside").rename(first)


def test_a_shadow_is_compared_by_the_labels_of_the_model_that_answers_after_a_restart(tmp_path, model):
    first, second = saved(tmp_path / "model"), turned(tmp_path / "turned")
    with running(first, "--shadow", model, "--shadow-rate", 1) as begun:
        engines = begun.engines
        first.rename(tmp_path / "aside")
        second.rename(first)
        os.kill(min(engines), signal.SIGKILL)
        until(lambda: any("holds another model than before" in line for line in begun.lines))
        until(lambda: begun.ask("/predict", {"inputs": [["a film"]] * 4})[0] == 200)
        until(lambda: begun.metric("sparsebert_shadow_texts_total") >= 4)
        assert begun.metric("sparsebert_shadow_same_total") == begun.metric("sparsebert_shadow_texts_total")


def test_an_engine_that_is_killed_comes_back_and_the_server_lives(model):
    with running(model, "--max-wait-ms", 1e6) as begun:
        engine = begun.engine
        os.kill(engine, signal.SIGSTOP)
        thread, found = asked(begun, {"inputs": "a film"})
        until(lambda: (begun.metric("sparsebert_in_flight"), begun.metric("sparsebert_waiting")) == (1, 0))
        start = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        thread.join(10)
        status, document, headers = found[0]
        assert (status, document["type"]) == (503, "unavailable") and "retry-after" in headers
        until(lambda: begun.ask("/health/live")[0] == 200 and begun.ask("/health/ready")[0] == 200)
        until(lambda: begun.ask("/predict", {"inputs": "a film"})[0] == 200)
        assert time.monotonic() - start < 5 and begun.metric("sparsebert_engine_restarts") == 1


def test_an_answer_that_comes_too_late_is_an_error(model):
    with running(model, "--timeout", 0.3, "--max-wait-ms", 1e6) as begun:
        os.kill(begun.engine, signal.SIGSTOP)
        status, document, _ = begun.ask("/predict", {"inputs": "a film"})
        assert (status, document["type"]) == (503, "deadline")
        os.kill(begun.engine, signal.SIGCONT)
        until(lambda: begun.ask("/predict", {"inputs": "a film"})[0] == 200)


@contextlib.contextmanager
def told_to_stop(model: Path, count: int, *flags: object) -> Iterator[tuple[Running, list]]:
    """A server that has so many requests in flight, whose engine stands still, and was sent SIGTERM."""
    with running(model, "--max-wait-ms", 1e6, *flags) as begun:
        os.kill(begun.engine, signal.SIGSTOP)
        threads = [asked(begun, {"inputs": "a film"}) for _ in range(count)]
        until(lambda: begun.metric("sparsebert_in_flight") == count)
        begun.process.send_signal(signal.SIGTERM)
        yield begun, threads


def test_told_to_stop_it_answers_what_is_in_flight(model):
    with told_to_stop(model, 3) as (begun, threads):
        engine = begun.engine
        time.sleep(0.2)
        assert begun.process.poll() is None
        os.kill(engine, signal.SIGCONT)
        for thread, found in threads:
            thread.join(10)
            assert found[0][0] == 200
        assert begun.process.wait(10) == 0 and not Path(f"/proc/{engine}").exists()


def test_when_its_time_is_over_those_in_flight_get_an_error_of_the_usual_shape(model):
    with told_to_stop(model, 3, "--drain-timeout", 0.5) as (begun, threads):
        for thread, found in threads:
            thread.join(10)
            assert found[0][0] == 503 and found[0][1]["type"] == "unavailable", found
        assert begun.process.wait(10) == 0
    begun._reader.join(5)
    assert all(json.loads(line) for line in begun.lines)


def test_told_to_stop_it_answers_on_for_a_while_and_says_that_it_is_not_ready(model):
    with running(model, "--stop-delay", 1.5, "--name", "mine", "--quiet") as begun:
        assert begun.told["model"] == "mine" and begun.ask("/v2/models/mine/ready")[0] == 200
        begun.process.send_signal(signal.SIGTERM)
        until(lambda: begun.ask("/health/ready")[0] == 503)
        assert begun.ask("/predict", {"inputs": "a film"})[0] == 200 and begun.ask("/health/live")[0] == 200
        assert begun.process.wait(10) == 0
    begun._reader.join(5)
    assert all(json.loads(line).get("status", 503) == 503 for line in begun.lines), "answered requests are not logged"


def test_while_requests_are_answered_a_server_that_stops_says_so(model):
    with told_to_stop(model, 1) as (begun, [(thread, found)]):
        until(lambda: begun.ask("/health")[0] == 503)
        status, document, _ = begun.ask("/predict", {"inputs": "a film"})
        assert status == 503 and document["error"] == "the server is stopping"
        os.kill(begun.engine, signal.SIGCONT)
        thread.join(10)
        assert found[0][0] == 200 and begun.process.wait(10) == 0


def test_told_to_stop_twice_it_exits_at_once(model):
    with told_to_stop(model, 1) as (begun, [(thread, _)]):
        time.sleep(0.3)
        begun.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        begun.process.wait(10)
        assert time.monotonic() < start + 3
        thread.join(5)


def turned(folder: Path) -> Path:
    """A model that says the same as `model` by the names of its labels, in another order."""
    other = flipped()
    other.config.id2label = {0: "positive", 1: "negative"}
    other.config.label2id = {"positive": 0, "negative": 1}
    return saved(folder, other)


def test_labels_are_those_of_the_model_that_answered_whatever_is_swapped_or_dies(tmp_path):
    first, second = saved(tmp_path / "model"), turned(tmp_path / "turned")
    wanted = dict(
        zip(Engine.load(first).labels, softmax(Engine.load(first).logits(["a film"]))[0].tolist(), strict=True)
    )
    with running(first) as begun:
        stop, seen = threading.Event(), []

        def keep_asking() -> None:
            while not stop.is_set():
                seen.append(begun.ask("/predict", {"inputs": [["a film"]] * 16})[:2])

        threads = [threading.Thread(target=keep_asking, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):  # the directory is replaced, and reread by request
            first.rename(tmp_path / "aside")
            second.rename(first)
            (tmp_path / "aside").rename(second)
            swapped = sum("reloaded" in line for line in begun.lines)
            begun.process.send_signal(signal.SIGHUP)
            until(lambda swapped=swapped: sum("reloaded" in line for line in begun.lines) > swapped)
        first.rename(tmp_path / "aside")  # and found to be another one when the engine is begun again
        second.rename(first)
        until(lambda: len(seen) > 5 and len(begun.engines) == 1)
        os.kill(begun.engine, signal.SIGKILL)
        until(lambda: any("holds another model than before" in line for line in begun.lines))
        many = len(seen)
        until(lambda: sum(status == 200 for status, _ in seen[many:]) > 5)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert begun.metric("sparsebert_engine_restarts") == 1
    assert {status for status, _ in seen} <= {200, 503} and {200} <= {status for status, _ in seen}
    for status, document in seen:
        if status == 200:
            assert all(scores(row) == pytest.approx(wanted, abs=1e-4) for row in document)


LONG = "a!" * 400_000  # has no place where it may be cut before it is read


def test_a_request_that_is_still_read_when_the_model_is_swapped_gets_an_answer(model):
    with running(model) as begun:
        found = [asked(begun, {"inputs": LONG, "truncate": True}) for _ in range(3)]
        time.sleep(0.2)
        begun.process.send_signal(signal.SIGHUP)
        for thread, answers in found:
            thread.join(30)
            assert answers[0][0] in (200, 503), answers


def test_long_texts_keep_no_probe_waiting(model):
    with running(model) as begun:
        found = [asked(begun, {"inputs": LONG, "truncate": True}) for _ in range(3)]
        slowest = 0.0
        while any(thread.is_alive() for thread, _ in found):
            start = time.monotonic()
            assert begun.ask("/health/live")[0] == 200
            slowest = max(slowest, time.monotonic() - start)
        assert all(answers[0][0] == 200 for _, answers in found)
    assert slowest < 2.0, "one of them alone takes as long"


def test_a_log_that_nobody_reads_stops_nothing(model):
    given = ("-m", "sparsebert", "serve", model, "--port", 0, "--threads", 1)
    process = subprocess.Popen(
        [sys.executable, *map(str, given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            for _ in range(1500):  # a pipe takes 64 kB
                connection.request("GET", "/health/live")
                assert connection.getresponse().read()
    finally:
        process.kill()
        process.wait()


def test_a_model_is_swapped_without_a_lost_request(tmp_path):
    directory = saved(tmp_path / "model", seed=1)
    before = Engine.load(directory).logits(["a film"])
    with running(directory) as begun:
        stop, seen = threading.Event(), []

        def keep_asking() -> None:
            while not stop.is_set():
                seen.append(begun.ask("/predict", {"inputs": "a film", "raw_scores": True})[:2])

        thread = threading.Thread(target=keep_asking, daemon=True)
        thread.start()
        until(lambda: len(seen) > 3)
        other = saved(tmp_path / "other", seed=2)
        directory.rename(tmp_path / "old")
        other.rename(directory)
        after = Engine.load(directory).logits(["a film"])
        begun.process.send_signal(signal.SIGHUP)

        def shown(logits: np.ndarray) -> list[float]:
            return sorted(logits[0].tolist())

        until(lambda: sorted(scores(seen[-1][1]).values()) == pytest.approx(shown(after), abs=1e-4))
        stop.set()
        thread.join(10)
        assert all(status == 200 for status, _ in seen)
        for _, document in seen:
            found = sorted(scores(document).values())
            assert found == pytest.approx(shown(before), abs=1e-4) or found == pytest.approx(shown(after), abs=1e-4)
        (directory / "config.json").write_text("{")
        begun.process.send_signal(signal.SIGHUP)
        until(lambda: any("was not loaded anew" in line for line in begun.lines))
        assert begun.ask("/predict", {"inputs": "a film"})[0] == 200
