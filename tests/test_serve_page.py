"""What a person sees of a server: its page and the routes, in a browser, and the last minute that the page draws."""

from __future__ import annotations

import json
import re

import pytest
from browser import tab
from models import flipped, saved
from test_http import Running, running

from sparsebert.serving.recent import KEPT, SECONDS, Recent


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Running:
    folder = tmp_path_factory.mktemp("served")
    with running(saved(folder / "model"), "--shadow", saved(folder / "dense", flipped())) as begun:
        yield begun


def test_a_sentence_typed_on_a_phone_is_classified_by_both_models(server, tmp_path):
    with tab(f"http://127.0.0.1:{server.port}/", tmp_path / "profile", width=390) as page:
        page.until("document.title.startsWith('model')")
        page.write("a gripping <b>film</b>")
        page.press("Enter")
        page.until("!document.getElementById('shadow').hidden")
        wanted = server.ask("/predict", {"inputs": "a gripping <b>film</b>"})[1]
        bars = "[...document.querySelectorAll('#%s .bar')].map(bar => [0, 2].map(i => bar.children[i].innerText))"
        assert page.value(bars % "served") == [[row["label"], f"{row['score']:.3f}"] for row in wanted]
        assert [label for label, _ in page.value(bars % "shadow")] == [row["label"] for row in wanted][::-1]
        said = page.until("document.getElementById('said').innerText")
        assert said == f"They differ: {wanted[0]['label']}, dense {wanted[1]['label']}"
        cost = page.value("document.querySelector('#served .cost').innerText")
        assert re.search(
            r"\d+ tokens; inference [\d.]+ ms, tokenizing [\d.]+ ms, queue [\d.]+ ms; 8 linears dense", cost
        )
        page.until("document.querySelectorAll('#charts path').length == 6")
        page.until(
            "[...document.querySelectorAll('#charts figcaption')].some(each => /most [1-9]/.test(each.innerText))"
        )
        assert page.value("document.querySelectorAll('#limits tr').length") == 7
        assert page.value("document.documentElement.scrollWidth") <= 390, "no scrolling sideways"
        assert not page.errors and page.value("document.querySelectorAll('b').length") == 0


def test_the_keyboard_alone_is_enough_and_errors_are_said(server, tmp_path):
    with tab(f"http://127.0.0.1:{server.port}/", tmp_path / "profile") as page:
        page.until("document.title.startsWith('model')")
        page.write("one")
        for wanted in ("pair", "BUTTON"):
            page.press("Tab")
            assert page.value("document.activeElement.id || document.activeElement.tagName") == wanted
        page.press("Enter")
        page.until("!document.getElementById('served').hidden")
        page.value("document.getElementById('text').focus()")
        page.write(" word" * 20_000)
        page.press("Enter")
        page.until("document.getElementById('said').className == 'bad'")
        assert "windows" in page.value("document.getElementById('said').innerText")


def test_a_key_is_asked_for_on_the_page(tmp_path):
    key = "k" * 20
    with (
        running(saved(tmp_path / "model"), env={"SPARSEBERT_API_KEY": key}) as begun,
        tab(f"http://127.0.0.1:{begun.port}/", tmp_path / "profile") as page,
    ):
        page.until("!document.getElementById('keys').hidden")
        page.value(f"document.getElementById('key').value = '{key}'")
        page.value("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.until("document.title.startsWith('model')")
        page.value("document.getElementById('text').focus()")
        page.write("a film")
        page.until("!document.getElementById('served').hidden")


def test_both_pages_load_nothing_and_are_told_not_to(server, tmp_path):
    for route in ("/", "/docs"):
        _, text, headers = server.ask(route)
        assert not re.search(r"(src|action|srcset)=|@import|https?://(?!www\.w3\.org/2000/svg)", text)
        assert "default-src 'none'" in headers["content-security-policy"]
    with tab(f"http://127.0.0.1:{server.port}/docs", tmp_path / "profile", width=390) as page:
        text = page.value("document.body.innerText")
        assert not page.errors and page.value("document.documentElement.scrollWidth") <= 390
    document = server.ask("/openapi.json")[1]
    assert all(f"{method.upper()} {path}" in text for path, methods in document["paths"].items() for method in methods)
    for name, schema in document["components"]["schemas"].items():
        assert name in text and all(field in text for field in schema.get("properties", {}))
    broken = (
        set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
        - document["components"]["schemas"].keys()
    )
    assert not broken


# --- the last minute --------------------------------------------------------------------------------------------------


def test_the_last_minute_is_told_second_by_second():
    counts = [0, 0, 0]
    recent = Recent(lambda: tuple(counts))
    for i in range(100):  # of a second each
        counts[:] = [i % 7, counts[1] + 2, counts[2] + 10]
        for latency in (0.001, 0.002, 0.003):
            recent.add(i + 0.1, latency, 200)
        recent.add(i + 0.2, 9.0, 429)
    rows = recent.rows(100.0)
    assert [row["ago"] for row in rows] == list(range(SECONDS, 0, -1))
    assert all((row["requests"], row["refused"]) == (4, 1) for row in rows)
    assert all((row["p50_ms"], row["p99_ms"], row["batch"]) == (2.0, 3.0, 5.0) for row in rows)
    assert [row["waiting"] for row in rows] == [i % 7 for i in range(40, 100)]
    quiet = recent.rows(130.0)[-30:]
    assert all(row["requests"] == 0 and row["p50_ms"] is None and row["batch"] is None for row in quiet)
    assert Recent(lambda: (0, 0, 0)).rows(5.0)[-1]["requests"] == 0


def test_a_reload_counts_from_0_and_many_latencies_are_sampled():
    counts = [0, 10, 40]
    recent = Recent(lambda: tuple(counts))
    recent.add(1.0, 0.001, 200)
    counts[:] = [0, 1, 1]
    for i in range(20 * KEPT):
        recent.add(2.5, i / (20 * KEPT), 200)
    rows = recent.rows(3.0)
    assert rows[-2]["batch"] == 4.0 and rows[-1]["batch"] is None and rows[-1]["requests"] == 20 * KEPT
    assert rows[-1]["p50_ms"] == pytest.approx(500, abs=100) and rows[-1]["p99_ms"] == pytest.approx(990, abs=20)
