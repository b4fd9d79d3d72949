"""What a server costs and stands: overhead, saturation, overload, malformed requests, clients who leave, a long run,
and the same server in front of other engines.

python -m bench.bench_serving MODEL [--dense DENSE] [--parts overhead,…] [--seconds-of-soak 1800] [--markdown FILE]

MODEL and DENSE are model directories; texts are SST-2's reported sentences. The client runs on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import uvloop

from bench import harness
from bench.http_client import Server, connected, request, serving
from sparsebert import data
from sparsebert.engine import Engine
from sparsebert.ops import _dispatch
from sparsebert.serving import loadtest

COLUMNS = {"part": "", "case": "", "asked": "", "measured": "", "holds": ""}
NOTES = (
    "Server, engine and client share {threads} cores. Direct: `Engine.logits` in the client's process, in turns with "
    "the server. Ratios are medians over turns, with their 95 % interval. Latencies count from when a request was due. "
    "MODEL: {model}."
)
PARTS = ("overhead", "saturated", "overload", "malformed", "disconnects", "ready", "engines", "soak")
BLOCK = 100  # texts that are asked one after another, of the engine and of the server in turns
TURNS, TURN = 8, 3.0  # of a saturated server and of the engine; seconds
CAPACITY = 50.0  # texts per second of the stub
Row = dict[str, str]


def row(part: str, case: str, asked: str, measured: str, holds: bool | None = None) -> Row:
    said = {None: "", True: "yes", False: "no"}[holds]
    print(f"{part}: {case}: {measured}", file=sys.stderr, flush=True)
    return {"part": part, "case": case, "asked": asked, "measured": measured, "holds": said}


def bodies(texts: list[str], size: int) -> list[bytes]:
    return [request(body) for body in loadtest.bodies(texts, size, 0)]


# --- overhead and saturation ------------------------------------------------------------------------------------------


async def overhead(server: Server, engine: Engine, texts: list[str], rounds: int) -> AsyncIterator[Row]:
    connection, direct, through = await connected(server.port), [], []
    raws = [request(json.dumps({"inputs": text}).encode()) for text in texts[:BLOCK]]
    for block in range(rounds + 1):  # the first one warms up
        await asyncio.sleep(0.02)  # the threads of the other engine stop spinning
        for text in texts[:BLOCK]:
            start = time.perf_counter()
            engine.logits([text])
            direct.append(time.perf_counter() - start)
        await asyncio.sleep(0.02)
        for raw in raws:
            start = time.perf_counter()
            status, _ = await connection.ask(raw)
            through.append(time.perf_counter() - start)
            assert status == 200
        if block == 0:
            direct.clear()
            through.clear()
    p50, own = 1e3 * statistics.median(through), 1e3 * statistics.median(direct)
    worst = [1e3 * np.quantile(each, 0.99) for each in (through, direct)]
    yield row(
        "overhead", "one text, one client", "p50 at most engine + 1.0 ms", f"{p50:.2f} ms, engine {own:.2f}: "
        f"+{p50 - own:.2f} ms (p99 {worst[0]:.2f}, engine {worst[1]:.2f})",
        p50 <= own + 1.0,
    )  # fmt: skip


async def closed_loop(server: Server, raws: list[bytes], clients: int, seconds: float) -> int:
    """Requests that were answered, by clients who ask again as soon as they have an answer."""
    connections = [await connected(server.port) for _ in range(clients)]
    end, answered = time.perf_counter() + seconds, 0

    async def client(connection, number: int) -> None:
        nonlocal answered
        while time.perf_counter() < end:
            status, body = await connection.ask(raws[number % len(raws)])
            if status == 200:
                answered += 1
                number += clients
            elif status == 429:  # the machine stood still for a moment
                await asyncio.sleep(5e-3)
            else:
                raise SystemExit(f"status {status}: {body.decode(errors='replace')}")

    await asyncio.gather(*(client(connection, i) for i, connection in enumerate(connections)))
    for connection in connections:
        connection.transport.close()
    return answered


async def saturated(
    server: Server, engine: Engine, texts: list[str], size: int, clients: int, turns: int
) -> AsyncIterator[Row]:
    raws = bodies(texts, size)
    batches = [texts[i : i + 16] for i in range(0, len(texts), 16)]
    await closed_loop(server, raws, clients, 1.0)
    rates: dict[str, list[float]] = {"direct": [], "server": []}
    spent = Counter()
    requests = 0
    for _ in range(turns):
        start, ran, i = time.perf_counter(), 0, 0
        while time.perf_counter() < start + TURN:
            ran += len(engine.logits(batches[i % len(batches)]))
            i += 1
        rates["direct"].append(ran / (time.perf_counter() - start))
        await asyncio.sleep(0.05)
        before, start = server.cpu(), time.perf_counter()
        answered = await closed_loop(server, raws, clients, TURN)
        rates["server"].append(answered * size / (time.perf_counter() - start))
        spent.update({name: seconds - before[name] for name, seconds in server.cpu().items()})
        requests += answered
    shares = sorted(a / b for a, b in zip(rates["server"], rates["direct"], strict=True))
    share = statistics.median(shares)
    goal = 0.85 if size == 16 else 0.6
    cost = ", ".join(f"{name} {1e6 * seconds / requests:.0f}" for name, seconds in spent.items())
    yield row(
        "saturated", f"texts per request: {size}, {clients} clients", f"at least {goal:.0%} of the engine",
        f"{share:.0%} [{shares[0]:.0%}, {shares[-1]:.0%}]: {statistics.median(rates['server']):,.0f} texts/s, direct "
        f"{statistics.median(rates['direct']):,.0f} (batches of 16); microseconds of a core per request: {cost}",
        share >= goal,
    )  # fmt: skip


# --- overload, faults, long runs --------------------------------------------------------------------------------------


async def offered(server: Server, texts: list[str], rate: float, seconds: float, arrivals: str) -> dict:
    """`loadtest.offered` with a client that takes a fifth of the time, and the same figures."""
    raws, idle, found, open_ = bodies(texts, 1), [], [], set()
    start = time.perf_counter() + loadtest.SETTLE

    async def one(due: float, raw: bytes) -> None:
        sent = time.perf_counter() - start
        while idle and idle[-1].transport.is_closing():  # the server ends those that it has not heard of for long
            idle.pop()
        connection = idle.pop() if idle else await connected(server.port)
        status, _ = await connection.ask(raw, 30.0)
        if status:
            idle.append(connection)
        found.append(loadtest.Sent(due, sent, time.perf_counter() - start, status))

    for i, due in enumerate(loadtest.due_times(rate, seconds, arrivals, 0)):
        if (wait := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(one(due, raws[i % len(raws)]))
        open_.add(task)
        task.add_done_callback(open_.discard)
    while open_:
        await asyncio.wait(open_)
    for connection in idle:
        connection.transport.close()
    return loadtest.row(rate, seconds, 1, found)


async def overload(server: Server, texts: list[str], seconds: float) -> AsyncIterator[Row]:
    for arrivals in ("constant", "poisson"):
        calm = await offered(server, texts, 0.8 * CAPACITY, max(20.0, seconds / 2), arrivals)
        for times in (2, 10):
            await asyncio.sleep(1.0)
            busy = await offered(server, texts, times * CAPACITY, seconds, arrivals)
            goodput = busy["answered"] / seconds / CAPACITY
            told = (
                f"p99 {busy['p99_ms']:.0f} ms, at 80 % load {calm['p99_ms']:.0f}; refused ones p99 "
                f"{busy['refused_p99_ms']:.1f} ms; goodput {goodput:.0%}; {busy['failed']} without an answer; refused "
                f"at 80 % load: {calm['refused'] / calm['requests']:.1%}"
            )
            holds = busy["p99_ms"] <= 2 * calm["p99_ms"] and busy["refused_p99_ms"] <= 20 and goodput >= 0.95
            yield row(
                "overload", f"{times} times 50 texts/s, {arrivals} arrivals, {seconds:g} s",
                "p99 at most 2x, 429 within 20 ms, goodput 95 %, all answered", told, holds and not busy["failed"],
            )  # fmt: skip


def malformed(draw: random.Random) -> bytes:
    """A request that is not right."""
    nested = "[" * draw.randint(100, 50_000)
    word = "a" * draw.randint(10_000, 1_000_000)
    body: bytes | str = draw.choice([
        lambda: b"{", lambda: draw.randbytes(draw.randint(1, 400)), lambda: '{"inputs": NaN}', lambda: nested,
        lambda: '{"inputs": ' + nested + "]" * len(nested) + "}", lambda: '{"inputs": []}', lambda: '{"inputs": [[]]}',
        lambda: '{"inputs": "\\ud800"}', lambda: b'{"inputs": "\xff\xfe"}', lambda: '{"inputs": ""}',
        lambda: json.dumps({"inputs": word}), lambda: json.dumps({"inputs": [["a"], ["a", "b"], ["a", 1]]}),
        lambda: json.dumps({"inputs": [["a"]] * 33}), 
        lambda: json.dumps({"inputs": "a", "top_k": draw.choice([0, -1, 1.5, "x"])}),
        lambda: json.dumps({"inputs": {"text": 5}}), lambda: json.dumps(draw.choice([1, None, [], "a", True])),
        lambda: '{"inputs": 1e999}', lambda: json.dumps({"inputs": "a", "window": draw.choice([-1, 2, 10**9])}),
        lambda: b" " * 10_000_000 if draw.random() < 0.02 else b" " * 2_100_000,
    ])()  # fmt: skip
    raw = body if isinstance(body, bytes) else body.encode()
    path = draw.choice(
        ["/predict", "/predict", "/classify", "/rerank", "/v2/models/x/infer", "/nowhere", "/%00", "/a" * 500]
    )
    if draw.random() < 0.03:
        return draw.randbytes(200) + b"\r\n\r\n"
    return request(raw, path, draw.choice(["POST", "POST", "POST", "PUT", "DELETE"]))


async def broken(server: Server, count: int) -> AsyncIterator[Row]:
    draw, found = random.Random(0), Counter()

    async def some(number: int) -> None:
        for _ in range(number):
            try:
                connection = await connected(server.port)
                status, _ = await connection.ask(malformed(draw), 30.0)
                connection.transport.close()
            except OSError:
                status = 0
            found[status] += 1

    await some(count // 10)  # buffers have their size afterwards
    before, engine = server.memory(), server.pids["engine"]
    found.clear()
    await asyncio.gather(*(some(count // 8) for _ in range(8)))
    after, alive = server.memory(), server.process.poll() is None and server.pids.get("engine") == engine
    growth = {name: after[name] / before[name] - 1 for name in after}
    bad = sum(number for status, number in found.items() if status >= 500)
    told = ", ".join(f"{status or 'closed'}: {number:,}" for status, number in sorted(found.items()))
    yield row(
        "malformed", f"{sum(found.values()):,} requests", "0 exits, 0 of 5xx, memory below +5 %",
        f"{told}; memory {', '.join(f'{name} {value:+.1%}' for name, value in growth.items())}",
        alive and not bad and max(growth.values()) < 0.05,
    )  # fmt: skip


async def disconnects(server: Server, texts: list[str], count: int) -> AsyncIterator[Row]:
    raws, draw, left, found = bodies(texts, 4), random.Random(0), 0, Counter()
    whole = server.metric("sparsebert_requests_total")

    async def client(number: int) -> None:
        nonlocal left
        connection = await connected(server.port)
        for i in range(count // 64):
            leaves = draw.random() < 0.3
            status, _ = await connection.ask(
                raws[(number + 64 * i) % len(raws)], draw.random() * 0.05 if leaves else None
            )
            found[status] += 1
            if status == 0:
                left += 1
                connection = await connected(server.port)

    start = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(64)))
    seconds = time.perf_counter() - start
    await asyncio.sleep(1.0)
    open_, waiting = server.metric("sparsebert_in_flight"), server.metric("sparsebert_waiting")
    counted = server.metric("sparsebert_requests_total") - whole
    ran, answered = server.metric("sparsebert_ran_texts"), server.metric("sparsebert_texts_total")
    total = sum(found.values())
    told = (
        f"{total:,} requests in {seconds:.0f} s, {left:,} left; in flight afterwards {open_:.0f}, in the queue "
        f"{waiting:.0f}; counted {counted:,.0f}; of {ran:,.0f} texts that ran nobody wanted {ran - answered:,.0f}"
    )
    yield row(
        "disconnects", f"{count:,} requests of 4 texts, 64 clients, 30 % leave within 50 ms",
        "0 permits leaked, counters add up", told, open_ == 0 and waiting == 0 and 0 <= counted - total <= 3,
    )  # fmt: skip


async def soak(server: Server, texts: list[str], seconds: float) -> AsyncIterator[Row]:
    """Batches of 1 to 16 texts, long texts, malformed requests and clients who leave, by four clients."""
    raws = {size: bodies(texts, size) for size in (1, 4, 16)}
    long = request(json.dumps({"inputs": " ".join(texts[:60]), "window": 128}).encode())
    end, samples, count = time.monotonic() + seconds, [], 0

    async def client(seed: int) -> None:
        nonlocal count
        draw, connection = random.Random(seed), await connected(server.port)
        while time.monotonic() < end:
            kind, patience = draw.random(), None
            raw = draw.choice(raws[draw.choice((1, 4, 16))])
            if kind < 0.05:
                raw = malformed(draw)
            elif kind < 0.1:
                raw = long
            elif kind < 0.15:
                patience = draw.random() * 0.01
            status, _ = await connection.ask(raw, patience or 30.0)
            count += 1
            if status in (0, 400, 408, 413):
                connection.transport.close()
                connection = await connected(server.port)
            await asyncio.sleep(draw.random() * 0.01)

    async def watch() -> None:
        while time.monotonic() < end:
            samples.append((time.monotonic(), server.memory()))
            await asyncio.sleep(min(10.0, seconds / 50))

    await asyncio.gather(watch(), *(client(i) for i in range(4)))
    warm = [(when, used) for when, used in samples if when > samples[0][0] + seconds / 6]
    hours = [(when - warm[0][0]) / 3600 for when, _ in warm]
    slopes = {name: float(np.polyfit(hours, [used[name] for _, used in warm], 1)[0]) for name in warm[0][1]}
    told = ", ".join(
        f"{name} {slope:+.2f} MB/h ({warm[0][1][name]:.1f} MB, at the end {warm[-1][1][name]:.1f})"
        for name, slope in slopes.items()
    )
    yield row(
        "soak", f"{seconds / 60:g} minutes, {count:,} mixed requests", "below 1 MB/h after warm-up",
        f"{told}; in flight afterwards {server.metric('sparsebert_in_flight'):.0f}", sum(slopes.values()) < 1.0,
    )  # fmt: skip


# --- starting, and other engines --------------------------------------------------------------------------------------


def ready(model: Path, rounds: int) -> Iterator[Row]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        with serving("-m", "sparsebert", "serve", model, "--port", 0):
            seconds.append(time.perf_counter() - start)
    p50 = statistics.median(seconds)
    yield row(
        "ready", f"{rounds} starts, warm cache", "at most 1.5 s",
        f"{p50:.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]", p50 <= 1.5,
    )  # fmt: skip


async def highest_rate(server: Server, texts: list[str], most_ms: float, seconds: float) -> dict:
    """The load test at the highest rate of those tried at which p99 is at most `most_ms` and 99 % are answered."""
    await closed_loop(server, bodies(texts, 1), 16, 2.0)
    start = time.perf_counter()
    low, high, best = 1.0, await closed_loop(server, bodies(texts, 1), 32, 3.0) / (time.perf_counter() - start), None
    high *= 1.3
    for _ in range(7):
        rate = (low + high) / 2
        tried = await offered(server, texts, rate, seconds, "poisson")
        fits = tried["answered"] >= 0.99 * tried["requests"] and tried["p99_ms"] <= most_ms
        if fits:
            low, best = rate, tried
        else:
            high = rate
    return best or tried


async def engines(model: Path, dense: Path, texts: list[str], threads: int, seconds: float) -> AsyncIterator[Row]:
    ours = ("-m", "sparsebert", "serve", model, "--port", 0, "--threads", threads)
    commands = {f"sparsebert, {model.name}": ours}
    commands |= {
        f"{name}, {dense.name}": ("-m", "bench.serving_engines", name, dense, threads)
        for name in ("torch-bf16", "openvino-int8")
    }
    first = None
    for name, command in commands.items():
        with serving(*command) as server:
            best = await highest_rate(server, texts, 50.0, seconds)
        first = first or best["texts_per_s"]
        yield row(
            "engines", name, "side by side", f"{best['texts_per_s']:,.0f} texts/s at p99 {best['p99_ms']:.0f} ms (p50 "
            f"{best['p50_ms']:.1f}); ours {first / best['texts_per_s']:.2f}x",
        )  # fmt: skip


async def measure(args: argparse.Namespace) -> list[Row]:
    spec = data.get_task("sst2")
    texts, rows, quick = list(data.load(spec, spec.test).texts), [], args.quick
    parts, ours = (
        args.parts.split(","),
        ("-m", "sparsebert", "serve", args.model, "--port", 0, "--threads", args.threads),
    )

    async def take(found) -> None:
        async for each in found:
            rows.append(each)

    if {"overhead", "saturated"} & set(parts):
        engine = Engine.load(args.model, threads=args.threads)
        with serving(*ours) as server:
            if "overhead" in parts:
                await take(overhead(server, engine, texts, 2 if quick else 20))
            if "saturated" in parts:
                for size, clients in ((16, 4), (1, 32)):
                    await take(saturated(server, engine, texts, size, clients, 2 if quick else TURNS))
    if "overload" in parts:
        with serving("-m", "bench.serving_engines", "stub", args.model, 1) as server:
            same = texts[:1]  # the stub takes as long for any text, and the queue reckons in tokens
            await take(overload(server, same, 5.0 if quick else 60.0))
    if "malformed" in parts:
        with serving(*ours) as server:
            await take(broken(server, 800 if quick else 10_000))
    if "disconnects" in parts:
        with serving(*ours, "--max-wait-ms", 10_000) as server:
            await take(disconnects(server, texts, 6_400 if quick else 100_000))
    if "ready" in parts:
        rows += ready(args.model, 3 if quick else 9)
    if "engines" in parts:
        await take(engines(args.model, args.dense, texts, args.threads, 2.0 if quick else 10.0))
    if "soak" in parts:
        with serving(*ours) as server:
            await take(soak(server, texts, 20.0 if quick else args.seconds_of_soak))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dense", type=Path, help="for the part engines")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--seconds-of-soak", type=float, default=1800.0)
    harness.add_options(parser, threads=_dispatch.threads())
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if "engines" in args.parts.split(",") and args.dense is None:
        parser.error("the part engines needs --dense")
    rows = uvloop.run(measure(args))
    notes = NOTES.format(threads=_dispatch.cores(), model=args.model.name)
    harness.report("Serving", rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
