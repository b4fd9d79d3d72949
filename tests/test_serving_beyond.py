"""A server beyond one process: on Ray, traced, under a load test, beside another one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import http.server
import importlib.util
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from command_line import refused, run
from models import saved
from test_http import Running, running

from bench.bench_serving import malformed
from bench.http_client import connected
from sparsebert import Engine
from sparsebert.config import LoadtestConfig
from sparsebert.errors import InputError
from sparsebert.heads import softmax
from sparsebert.serving import loadtest
from sparsebert.serving.loadtest import Sent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(model):
    with running(model) as begun:
        yield begun


# --- Ray --------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_two_replicas_on_a_ray_cluster_of_one_node_answer_as_the_engine_does(model, tmp_path):
    key = "k" * 20
    (file := tmp_path / "key").write_text(key)
    file.chmod(0o600)
    with running(
        model, "--ray", "--replicas", 2, "--api-key-file", file, env={"RAY_ADDRESS": "local"}, port=free_port()
    ) as begun:
        assert begun.told["replicas"] == [2, 2] and begun.told["threads"] == 1
        texts = ["a gripping film", "so so"]
        wanted, headers = softmax(Engine.load(model).logits(texts)), {"Authorization": f"Bearer {key}"}
        for _ in range(8):
            status, document, _ = begun.ask("/predict", {"inputs": [[text] for text in texts]}, headers=headers)
            assert status == 200
            for row, found in zip(wanted, document, strict=True):
                assert {each["label"]: each["score"] for each in found} == pytest.approx(
                    dict(zip(Engine.load(model).labels, row, strict=True)), abs=1e-5
                )
        assert begun.ask("/predict", {"inputs": "a"})[0] == 401 and begun.ask("/health/ready")[0] == 200
        assert begun.ask("/predict", b"{", headers=headers)[1]["type"] == "json"
        assert begun.end() == 0


def test_what_ray_cannot_serve_is_said_before_it_is_begun(model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SPARSEBERT_API_KEY", raising=False)
    for arguments, said in (
        (("--host", "0.0.0.0"), "there is no API key"), (("--replicas", "0"), "replicas"),
        (("--replicas", "two"), "replicas"),
    ):  # fmt: skip
        assert said in refused(capsys, "serve", model, "--ray", *arguments)
    assert "config.json" in refused(capsys, "serve", tmp_path, "--ray")


# --- requests that are made from the OpenAPI document -----------------------------------------------------------------


def test_no_request_that_the_openapi_document_suggests_is_answered_otherwise_than_it_says(server):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    statuses = set()
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case):
            answer = case.call()
            statuses.add(answer.status_code)
            assert answer.status_code < 500, (case.path, case.body, answer.text)
            checks = [status_code_conformance, response_schema_conformance]
            case.validate_response(answer, checks=checks)

        ask()
    assert {200, 422} <= statuses and server.ask("/health/ready")[0] == 200


def test_malformed_requests_end_nothing_and_are_all_answered(server):
    async def ask() -> Counter:
        draw, found = random.Random(3), Counter()
        for _ in range(400):
            connection = await connected(server.port)
            status, _ = await connection.ask(malformed(draw), 30.0)
            connection.transport.close()
            found[status] += 1
        return found

    engine, found = server.engine, asyncio.run(ask())
    assert max(found) < 500 and {400, 413, 422} <= found.keys() and found[0] < 20, found
    assert server.engine == engine and server.ask("/health/ready")[0] == 200


# --- traces -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def collector():
    """An OpenTelemetry collector: the spans that it was sent, by name."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *told):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", spans
    finally:
        listener.shutdown()
        listener.server_close()


def test_every_request_is_a_span_of_the_callers_trace(model):
    trace = "0af7651916cd43dd8448eb211c80319c"
    with collector() as (url, spans):
        with running(model, env={"OTEL_EXPORTER_OTLP_ENDPOINT": url}) as begun:
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
            assert begun.ask("/predict", {"inputs": "a film"}, headers=headers)[0] == 200
            assert begun.ask("/predict", b"{")[0] == 400
            assert begun.end() == 0
        assert [span.name for span in spans] == ["POST /predict"] * 2
        told = {each.key: each.value for each in spans[0].attributes}
    assert spans[0].trace_id.hex() == trace and spans[1].trace_id.hex() != trace
    assert told["http.response.status_code"].int_value == 200 and told["sparsebert.request_id"].string_value == "mine"
    assert told["sparsebert.inference_ms"].double_value > 0
    assert 0 < spans[0].end_time_unix_nano - spans[0].start_time_unix_nano < 60e9


def test_without_an_endpoint_nothing_of_it_is_imported(model):
    code = (
        "import sys, sparsebert.serving.server as s, sparsebert.serving.tracing as t; assert t.tracer() is None; "
        "print([m for m in sys.modules if m in ('opentelemetry.sdk', 'opentelemetry.exporter', 'ray', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- load test --------------------------------------------------------------------------------------------------------


def test_a_load_test_tells_latencies_at_every_rate(server, tmp_path, capsys):
    url = f"http://127.0.0.1:{server.port}"
    (texts := tmp_path / "texts.csv").write_text("text,text_b\na film,so so\nit rained,it was wet\n")
    command = ("loadtest", url, "--seconds", 0.5, "--batch", 3, "--file", texts, "--arrivals", "constant")
    code, out, _ = run(capsys, *command, "--rate", "20,40", "--json")
    document = json.loads(out)
    assert code == 0 and [row["requests"] for row in document["rows"]] == [10, 20] and document["model"] == "model"
    for row in document["rows"]:
        assert row["answered"] == row["requests"] and row["refused"] == row["failed"] == 0
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
    code, out, _ = run(capsys, "loadtest", url, "--rate", "5", "--seconds", 0.5)
    assert code == 0 and "requests/s" in out and "p99.9 ms" in out


def test_a_load_test_is_drawn_or_says_what_that_needs(server, tmp_path, capsys, monkeypatch):
    command = ("loadtest", f"http://127.0.0.1:{server.port}", "--rate", "10,20", "--seconds", 0.5, "--plot")
    if importlib.util.find_spec("matplotlib") is not None:  # of the extra `bench`
        assert run(capsys, *command, tmp_path / "p.png")[0] == 0
        assert (tmp_path / "p.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'sparsebert[bench]'" in refused(capsys, *command, tmp_path / "q.png")


def test_latencies_count_from_when_a_request_was_due():
    requests = [Sent(i, i + 0.5, i + 1.0, 200) for i in range(10)]
    requests += [Sent(0.0, 0.0, 0.002, 429), Sent(0.0, 0.0, 0.0, 0, "refused"), Sent(0.0, 0.0, 0.0, 503)]
    row = loadtest.row(10.0, 20.0, 4, requests)
    assert row["p50_ms"] == row["max_ms"] == pytest.approx(1000) and row["late_ms"] == pytest.approx(500)
    assert (row["answered"], row["refused"], row["failed"]) == (10, 1, 2) and row["texts_per_s"] == 2.0
    assert row["why"] == {"refused": 1, "status 503": 1} and row["refused_p99_ms"] == pytest.approx(2.0)
    nothing = loadtest.row(1.0, 1.0, 1, [Sent(0.0, 0.0, 0.0, 0, "x")])
    assert nothing["p50_ms"] is None and nothing["texts_per_s"] == 0


def test_arrivals_are_as_many_as_the_rate_says():
    assert loadtest.due_times(10, 2, "constant", 0) == pytest.approx([i / 10 for i in range(20)])
    drawn = loadtest.due_times(100, 100, "poisson", 0)
    assert drawn == sorted(drawn) and drawn[-1] < 100 and len(drawn) == pytest.approx(10_000, rel=0.05)
    assert drawn == loadtest.due_times(100, 100, "poisson", 0) != loadtest.due_times(100, 100, "poisson", 1)
    assert loadtest.due_times(1e-3, 1, "poisson", 0) == [0.0]


def test_every_text_is_sent():
    texts = [f"text {i}" for i in range(7)] + [("a", "b")]
    sent = [json.loads(body) for body in loadtest.bodies(texts, 3, 0)]
    found = [tuple(item) for body in sent for item in body["inputs"]]
    assert {len(body["inputs"]) for body in sent} == {3} and all(body["truncate"] for body in sent)
    assert set(found) == {(f"text {i}",) for i in range(7)} | {("a", "b")} and len(found) == 9


def test_a_load_test_that_cannot_be_is_refused_in_one_line(server, tmp_path, capsys):
    url = f"http://127.0.0.1:{server.port}"
    port = free_port()
    for arguments, said in (
        ((f"http://127.0.0.1:{port}",), "no sparsebert server answers"), (("127.0.0.1:80",), "must begin with http://"),
        ((url + "/nowhere",), "no sparsebert server answers"), ((url, "--rate", "0"), "numbers above 0"),
        ((url, "--rate", "a"), "numbers above 0"), ((url, "--text-column", "a"), "--text-column is of a --file"),
        ((url, "--plot", tmp_path / "p.gif"), "must end in .png"), ((url, "--file", tmp_path / "none.txt"), "absent"),
    ):  # fmt: skip
        assert said in refused(capsys, "loadtest", *arguments), arguments
    with pytest.raises(InputError, match="numbers above 0"):
        from sparsebert.config import validated

        validated(LoadtestConfig, {"rate": "1,,2"})


def test_a_load_test_sends_the_key_and_says_that_one_is_missing(model, tmp_path, capsys):
    key = "k" * 20
    (file := tmp_path / "key").write_text(key)
    file.chmod(0o600)
    with running(model, "--api-key-file", file) as begun:
        url = f"http://127.0.0.1:{begun.port}"
        assert "wants an API key" in refused(capsys, "loadtest", url)
        code, out, _ = run(capsys, "loadtest", url, "--rate", 5, "--seconds", 0.4, "--api-key-file", file, "--json")
        assert code == 0 and json.loads(out)["rows"][0]["failed"] == 0


# --- beside another one -----------------------------------------------------------------------------------------------


def test_servers_that_begin_at_once_share_a_cache(model, tmp_path):
    cache = {"SPARSEBERT_CACHE": str(tmp_path / "cache")}
    begun: list[Running] = []

    def begin() -> None:
        begun.append(Running(model, env=cache))

    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        answers = [each.ask("/predict", {"inputs": "a film"})[1] for each in begun]
        assert len(answers) == 3 and answers[0] == answers[1] == answers[2]
    finally:
        for each in begun:
            assert each.end() == 0
    assert not [path for path in (tmp_path / "cache").rglob("*") if "tmp" in path.name]


def test_a_disk_that_is_full_while_it_packs_is_said_and_leaves_nothing(model, tmp_path):
    cache = tmp_path / "cache"
    with running(model, env={"SPARSEBERT_CACHE": str(cache)}, before=("prlimit", "--fsize=100000")) as begun:
        assert begun.ask("/predict", {"inputs": "a film"})[0] == 200
        assert begun.end() == 0
    assert "is not kept" in json.loads(begun.lines[0])["warning"]
    # The note on the directory is there: what it had when its hashes were right.
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_a_model_that_fails_its_golden_logits_is_not_served(model, tmp_path, capsys):
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    file = changed / "sparsebert" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["golden"]["logits"][0][0] += 1.0
    file.write_text(json.dumps(manifest))
    assert "golden" in refused(capsys, "serve", changed, "--port", 0)
