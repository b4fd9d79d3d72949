"""A model that is being served: answers, refusals and ends of requests; engines that die and begin again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
from models import saved

from sparsebert import Engine
from sparsebert.engine.inputs import Inputs
from sparsebert.errors import CheckpointError, InputError, SparsebertError
from sparsebert.serving.batcher import Limits, Refused
from sparsebert.serving.process import EngineProcess, load_engine
from sparsebert.serving.served import INLINE, Answer, Served, TooLate, Unavailable

WORDS = ["good", "bad", "film", "the", "a", "not", "so", "very", "long", "story"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("served") / "model")


def serving(model, scenario, **settings):
    """Runs the coroutine scenario(served) beside a served model."""

    async def run():
        served = await Served.begin(model, threads=1, **settings)
        try:
            return await scenario(served)
        finally:
            await served.close()

    return asyncio.run(run())


def texts_of(seed: int) -> list:
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(draw.randint(1, 6))]
    return [(text, "so it was") if draw.random() < 0.2 else text for text in made]


def test_many_at_once_get_what_the_engine_gives_each(model):
    engine = Engine.load(model, threads=1)
    asked = [texts_of(seed) for seed in range(60)]

    async def scenario(served):
        return await asyncio.gather(*(served.answer(texts) for texts in asked)), served.counts

    answers, counts = serving(model, scenario, limits=Limits(wait=60))
    for texts, answer in zip(asked, answers, strict=True):
        assert answer.logits == pytest.approx(engine.logits(texts), abs=1e-5)
        assert answer.tokens == sum(map(len, engine.encode(texts)[0])) and answer.cut == []
        assert min(answer.tokenizing, answer.queue, answer.inference) >= 0
    assert counts.texts == sum(map(len, asked)) and counts.batches < len(asked) and counts.restarts == 0


def test_a_long_text_is_an_error_or_is_cut(model):
    engine = Engine.load(model, threads=1)
    long = "good " * 2000

    async def scenario(served):
        with pytest.raises(InputError, match="truncate=True"):
            await served.answer([long])
        return await served.answer(["a film", long], truncate=True), await served.answer(
            [long], truncate=True, max_length=9
        )

    both, short = serving(model, scenario)
    assert (
        both.cut == [1]
        and both.tokens == len(engine.encode(["a film"])[0][0]) + engine.truncates_at
        and short.tokens == 9
    )
    assert both.logits == pytest.approx(engine.logits(["a film", long], truncate=True), abs=1e-5)


def test_whoever_leaves_is_forgotten_and_whoever_is_late_is_told(model):
    async def scenario(served):
        process = served._process
        os.kill(process.pid, signal.SIGSTOP)  # an engine that takes its time
        running = asyncio.create_task(served.answer(["a film"]))
        await asyncio.sleep(0.05)
        leaves = asyncio.create_task(served.answer(["a film"] * 3))
        late = asyncio.create_task(served.answer(["a film"], seconds=0.1))
        await asyncio.sleep(0.02)
        assert served.batcher.in_flight == 3 and served.batcher.waiting == 4
        leaves.cancel()
        with pytest.raises(TooLate):
            await late
        assert served.batcher.in_flight == 1 and served.batcher.waiting == 0
        os.kill(process.pid, signal.SIGCONT)
        await running
        return served.counts.texts, served.batcher.in_flight

    assert serving(model, scenario, limits=Limits(wait=60)) == (1, 0)


def test_a_long_question_to_an_engine_that_hangs_holds_nobody_up(model, monkeypatch):
    monkeypatch.setattr(sys.modules[Served.__module__], "HUNG", 1.0)

    async def scenario(served):
        loop = asyncio.get_running_loop()
        os.kill(served._process.pid, signal.SIGSTOP)
        running = asyncio.create_task(served.answer(["good " * 500] * 100, truncate=True))
        latest, start = loop.time(), loop.time()
        while not running.done():
            await asyncio.sleep(0.01)
            assert loop.time() - latest < 0.5, "the loop stood still"
            latest = loop.time()
        with pytest.raises(Unavailable, match="the engine failed"):
            await running
        seconds = loop.time() - start
        while not served.ready:
            await asyncio.sleep(0.01)
        return seconds, await served.answer(["a film"])

    limits = Limits(batch_tokens=100_000, batch_seconds=100.0, wait=100.0)
    seconds, answer = serving(model, scenario, limits=limits)
    assert 0.9 < seconds < 5 and answer.logits.shape == (1, 2)


def test_more_than_is_worth_waiting_for_is_refused(model):
    async def scenario(served):
        os.kill(served._process.pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(served.answer(["a film"])) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused, match="4 requests are in flight"):
            await served.answer(["a film"])
        os.kill(served._process.pid, signal.SIGCONT)
        await asyncio.gather(*waiting)
        return await served.answer(["a film"])

    assert serving(model, scenario, limits=Limits(in_flight=4, wait=60)).logits.shape == (1, 2)


def test_a_killed_engine_fails_what_it_was_at_and_comes_back_for_the_rest(model):
    async def scenario(served):
        loop, pid = asyncio.get_running_loop(), served._process.pid
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.create_task(served.answer(["a film"]))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(served.answer(["so so"]))
        await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        start = loop.time()
        with pytest.raises(Unavailable, match="the engine failed"):
            await running
        told = loop.time() - start
        while not served.ready:
            await asyncio.sleep(0.01)
        return told, await waiting, loop.time() - start, served.counts.restarts

    told, answer, back, restarts = serving(model, scenario, limits=Limits(wait=60))
    assert told < 1 and back < 5 and restarts == 1
    assert answer.logits == pytest.approx(Engine.load(model).logits(["so so"]), abs=1e-5)


def test_a_killed_engine_is_noticed_though_nobody_asks(model):
    async def scenario(served):
        os.kill(served._process.pid, signal.SIGKILL)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if served.counts.restarts and served.ready:
                return await served.answer(["a film"])

    assert serving(model, scenario).logits.shape == (1, 2)


def test_closing_answers_those_in_flight_and_takes_no_more(model):
    async def scenario():
        served = await Served.begin(model, threads=1)
        answers = [asyncio.create_task(served.answer(texts_of(i))) for i in range(10)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(served.close(10.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the server is stopping"):
            await served.answer(["a film"])
        return await closing, await asyncio.gather(*answers)

    closed, answers = asyncio.run(scenario())
    assert closed and len(answers) == 10 and all(np.isfinite(answer.logits).all() for answer in answers)


def refuses_seven_tokens(directory, dtype, threads):
    """An engine, as `load_engine`, that refuses texts of seven tokens."""
    forward, facts = load_engine(directory, dtype, threads)

    def picky(ids, types):
        if any(len(row) == 7 for row in ids):
            raise CheckpointError("logits are not finite", fix="train it again")
        return forward(ids, types)

    return picky, facts


def test_a_request_that_the_engine_refuses_ends_alone_and_the_engine_stays(model):
    async def scenario(served):
        pid = served._process.pid
        found = await asyncio.gather(
            *(served.answer([text]) for text in ("a film", "a very long story so", "good")), return_exceptions=True
        )
        return found, served._process.pid == pid, served.counts.restarts

    found, same, restarts = serving(model, scenario, load=refuses_seven_tokens, limits=Limits(wait=60))
    assert isinstance(found[1], CheckpointError) and same and restarts == 0
    for answer, text in ((found[0], "a film"), (found[2], "good")):
        assert answer.logits == pytest.approx(Engine.load(model).logits([text]), abs=1e-5)


def test_a_deadline_holds_while_a_text_is_tokenized(model, monkeypatch):
    original = Inputs.encode

    def slow(self, texts, **how):
        if len(texts[0]) > INLINE:
            time.sleep(0.4)
        return original(self, texts, **how)

    async def scenario(served):
        monkeypatch.setattr(Inputs, "encode", slow)
        start = time.monotonic()
        asked = [served.answer(["a film " * 1000], truncate=True, seconds=0.6) for _ in range(8)]
        pending = [asyncio.ensure_future(each) for each in asked]
        await asyncio.sleep(0.05)
        flight = served.in_flight
        found = await asyncio.gather(*pending, return_exceptions=True)
        took = time.monotonic() - start
        await served.answer(["a film"])
        return flight, found, took

    flight, found, took = serving(model, scenario, limits=Limits(wait=60))
    assert flight == 8 and took < 2.0
    late = [each for each in found if isinstance(each, TooLate)]
    assert len(late) >= 4 and all(isinstance(each, (Answer, TooLate)) for each in found)


def test_a_process_that_is_of_no_use_is_ended(model, monkeypatch):
    begun, original = [], EngineProcess.__init__

    def noted(self, *given, **settings):
        original(self, *given, **settings)
        begun.append(self)

    def no_use(facts):
        raise InputError("other labels", fix="name another model")

    monkeypatch.setattr(EngineProcess, "__init__", noted)
    with pytest.raises(InputError, match="other labels"):
        asyncio.run(Served.begin(model, threads=1, accept=no_use))
    with monkeypatch.context() as patch:
        patch.setattr(Served, "_warm_up", lambda self: no_use(None))
        with pytest.raises(InputError, match="other labels"):
            asyncio.run(Served.begin(model, threads=1))
    assert len(begun) == 2 and not any(process.alive for process in begun)


def ends(directory, dtype, threads):
    os._exit(137)


def test_an_engine_that_ends_while_it_is_loaded_is_an_error_of_one_line(model):
    with pytest.raises(SparsebertError, match="has ended, exit code 137"):
        asyncio.run(Served.begin(model, threads=1, load=ends))


def test_a_model_that_is_damaged_is_not_served(tmp_path):
    damaged = saved(tmp_path / "damaged")
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged/model\.safetensors"):
        asyncio.run(Served.begin(damaged))
